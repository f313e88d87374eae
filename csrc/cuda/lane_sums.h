// (E7) The sums of a block of threads over its weights, in the lanes of maths/order.h: 16 threads take a block of sums.
#pragma once

#include "../maths/order.h"

namespace askew {

// What the lanes of a block of sums add up to, for the first of its 16 threads; `of` gives a lane's own sum. On a
// processor, for tests, that thread asks for all lanes.
template <typename OfLane>
ASKEW_FN double over_lanes(int thread, const OfLane& of) {
#if defined(__CUDA_ARCH__)
  double sum = of(thread % sum_lanes);
  const unsigned neighbours = 0xffffu << (threadIdx.x & 16);
#pragma unroll
  for (int half = sum_lanes / 2; half > 0; half /= 2) sum += __shfl_down_sync(neighbours, sum, half, sum_lanes);
  return sum;
#else
  double lanes[sum_lanes] = {};
  for (int lane = 0; lane < sum_lanes && thread % sum_lanes == 0; ++lane) lanes[lane] = of(lane);
  return add_lanes(lanes);
#endif
}

}  // namespace askew
