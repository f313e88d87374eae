// The step of float32 weights.
#include "launches.h"

namespace askew {

cudaError_t step_float32(const Launch& launch, const CudaCall& call) { return step_storage<float>(launch, call); }

}  // namespace askew
