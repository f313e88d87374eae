// (E7) The sums of a block of threads over its weights, in the lanes of maths/order.h: 16 threads take a block of sums.
#pragma once

#include "../maths/order.h"

namespace askew {

template <int kinds, typename Number = double> struct Totals {
  Number of[kinds];
};

// What the lanes of a block of sums add up to, several kinds at a time, for the first of its 16 threads; `add` adds up
// a lane's own. On a processor, for tests, that thread asks for all lanes.
template <int kinds, typename Number = double, typename Add>
ASKEW_FN Totals<kinds, Number> over_lanes(int thread, const Add& add) {
#if defined(__CUDA_ARCH__)
  Number total[kinds] = {};
  add(thread % sum_lanes, total);
  const unsigned neighbours = 0xffffu << (threadIdx.x & 16);
#pragma unroll
  for (int half = sum_lanes / 2; half > 0; half /= 2)
#pragma unroll
    for (int k = 0; k < kinds; ++k) total[k] += __shfl_down_sync(neighbours, total[k], half, sum_lanes);
  Totals<kinds, Number> sums;
#pragma unroll
  for (int k = 0; k < kinds; ++k) sums.of[k] = total[k];
  return sums;
#else
  Number lanes[kinds][sum_lanes] = {};
  for (int lane = 0; lane < sum_lanes && thread % sum_lanes == 0; ++lane) {
    Number total[kinds] = {};
    add(lane, total);
    for (int k = 0; k < kinds; ++k) lanes[k][lane] = total[k];
  }
  Totals<kinds, Number> sums;
  for (int k = 0; k < kinds; ++k) sums.of[k] = add_lanes(lanes[k]);
  return sums;
#endif
}

}  // namespace askew
