// The one order in which numbers of many weights are summed: the same bits whatever the width of a pack, the number of
// threads and the backend.
//
// Within a block, weights are dealt in turn to `sum_lanes` lanes, each of which adds up its own from first to last;
// then the lanes are added as a tree. Blocks are added up in sequence to a chunk, and chunks in sequence to the whole,
// in double. Within a block the sum says whether it is in double, too, or in the type of its numbers, of which a lane
// has 80 at most.
#pragma once

#include "pack.h"

namespace askew {

constexpr int sum_lanes = 16;
constexpr int block_steps = 80;
constexpr int block_size = sum_lanes * block_steps;  // whole bytes in every packing, five ternary codes to a byte, too
constexpr int chunk_blocks = 16;
constexpr int64_t sum_chunk = int64_t{chunk_blocks} * block_size;  // 80 KiB of float32: stays in a core's cache

// The tree: upper halves onto lower ones. Overwrites the lanes.
template <typename Number>
ASKEW_FN Number add_lanes(Number (&lanes)[sum_lanes]) {
  for (int half = sum_lanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

}  // namespace askew
