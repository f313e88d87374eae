// (E7) A scale that learns: the blocks that its weights are summed up in, and what it makes of the sums.
#pragma once

#include "order.h"

namespace askew {

// Weights of a tensor that share scales in runs, each scale's in one run, in blocks of order.h: a block never crosses a
// scale, and the last one of a run may be shorter.
struct SumBlocks {
  int64_t run, each;  // weights of a run, blocks of a run

  static ASKEW_FN SumBlocks of(int64_t run) { return {run, (run + block_size - 1) / block_size}; }

  ASKEW_FN int64_t begin(int64_t block) const { return block / each * run + block % each * block_size; }
  ASKEW_FN int64_t end(int64_t block) const {
    const int64_t next = begin(block) + block_size, last = (block / each + 1) * run;
    return next < last ? next : last;
  }
  // The first block that begins at weight i or later.
  ASKEW_FN int64_t first_from(int64_t i) const { return i / run * each + (i % run + block_size - 1) / block_size; }
};

// Sums of consecutive blocks, added up as order.h says.
ASKEW_FN double add_blocks(const double* blocks, int64_t count) {
  double total = 0;
  for (int64_t first = 0; first < count; first += chunk_blocks) {
    double chunk = 0;
    for (int64_t k = first; k < count && k < first + chunk_blocks; ++k) chunk += blocks[k];
    total += chunk;
  }
  return total;
}

constexpr double max_growth = 0.05;  // of the logarithm of a scale, in a step

// What scales learn by: the numbers of a step.
struct Learning {
  double rate;            // scale_lr * lr
  double factor;          // 1 / AMP's grad_scale, negated to maximize
  double momentum, gain;  // share of the velocity that a step keeps, and of G that it takes
  bool over;              // annealing has begun
};

template <typename T> ASKEW_FN bool is_finite(T x) { return x - x == T(0); }

// One scale. Its sums: of g w, of w^2, and, where `second` is given, of the corrected second moments; `count` weights.
template <typename T>
ASKEW_FN void learn(T& scale, T& velocity, T& growth, double gw, double ww, const double* second, double count,
                    const Learning& l) {
  double part = l.factor * gw / ww;
  if (second) part = part / sqrt(*second / count);
  if (!is_finite(part)) part = 0;
  const double v = l.momentum * static_cast<double>(velocity) + l.gain * part;
  double x = l.rate * v;
  x = x > max_growth ? max_growth : x < -max_growth ? -max_growth : x;
  const double f = (2 - x) / (2 + x);
  const T taken = scale * growth;
  const double after = static_cast<double>(taken) * f;
  const bool over = l.over || velocity == T(INFINITY) || velocity == -T(INFINITY);
  constexpr bool single = sizeof(T) == sizeof(float);
  const double least = single ? 0x1p-126 : 0x1p-1022, most = single ? 0x1.fffffep127 : 0x1.fffffffffffffp1023;
  growth = after >= least && after <= most && !over ? static_cast<T>(f) : T(1);
  velocity = over ? T(INFINITY) : static_cast<T>(v);
  scale = taken;
}

}  // namespace askew
