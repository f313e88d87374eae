// The CPU backend as the binding sees it; its kernels are compiled once for each instruction set.
#pragma once

#include "../launch.h"
#include "../setup.h"

namespace askew {

constexpr int64_t cpu_chunk =
    1 << 15;  // 640 KiB of float32 weight, gradient and momentum traffic: well below a millisecond

// Steps the weights of chunks [begin, end), of cpu_chunk weights. They touch disjoint memory: any thread may take any
// of them.
using CpuStep = void (*)(const Launch& launch, const int64_t* first_chunk, int64_t begin, int64_t end);

// Sums over chunks of one row: what a thread does of a row that all of them work on.
struct RowPart {
  int64_t row, begin, end;  // chunks, of sum_chunk weights
  const Sequence* trials;   // null: the range of the row
  Range* ranges;            // of each chunk
  Sums* sums;               // of each chunk, for each trial
};

// Finds the scales of rows [begin, end), or sums over a part of one row. No two threads write to the same place.
struct CpuFit {
  void (*rows)(const Rows& rows, int64_t begin, int64_t end, double* scales);
  void (*part)(const Rows& rows, const RowPart& part);
};

// Counts add up in any order.
struct Seen {
  int64_t on_level, away;
  int64_t lost, nan;  // without a distance, since the weight or its scale is NaN; weights that are NaN
  int64_t flipped;
  int64_t occupancy[256];
  double largest;  // distance
};

// Sums of a chunk, over weights that have a distance: of w^2 and of (w - snapped)^2.
struct Squares {
  double weights, errors;
};

// Looks at chunks [begin, end), of sum_chunk weights. Adds to `seen`; squares has a place for each chunk.
using CpuLook = void (*)(const Looking& looking, int64_t begin, int64_t end, Seen& seen, Squares* squares);

// Restores chunks [begin, end), of sum_chunk weights. They touch disjoint memory.
using CpuRestore = void (*)(const Restoring& restoring, int64_t begin, int64_t end);

// All kernels of an instruction set.
struct CpuKernels {
  CpuStep step;
  CpuFit fit;
  CpuLook look;
  CpuRestore restore;
};

#define ASKEW_DECLARE(name)                                                                               \
  void cpu_step_##name(const Launch& launch, const int64_t* first_chunk, int64_t begin, int64_t end);     \
  extern const CpuFit cpu_fit_##name;                                                                     \
  void cpu_look_##name(const Looking& looking, int64_t begin, int64_t end, Seen& seen, Squares* squares); \
  void cpu_restore_##name(const Restoring& restoring, int64_t begin, int64_t end)
ASKEW_DECLARE(baseline);
#if defined(__x86_64__)
ASKEW_DECLARE(avx2);
ASKEW_DECLARE(avx512);
#endif
#undef ASKEW_DECLARE

}  // namespace askew
