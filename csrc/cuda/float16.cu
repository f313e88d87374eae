// The step of float16 weights.
#include "launches.h"

namespace askew {

cudaError_t step_float16(const Launch& launch, const CudaCall& call) { return step_storage<Float16>(launch, call); }

}  // namespace askew
