// The step of bfloat16 weights.
#include "launches.h"

namespace askew {

cudaError_t step_bfloat16(const Launch& launch, const CudaCall& call) { return step_storage<BFloat16>(launch, call); }

}  // namespace askew
