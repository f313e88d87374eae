// The step of float64 weights.
#include "launches.h"

namespace askew {

cudaError_t step_float64(const Launch& launch, const CudaCall& call) { return step_storage<double>(launch, call); }

}  // namespace askew
