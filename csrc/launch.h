// What a launch is told: settings (the scalars of the call), spans (one per tensor: pointers, size, scales), and the
// map from a chunk's number to the span and the offset where it starts. Plain data, for host and device.
#pragma once

#include "maths/hyper.h"
#include "maths/learn.h"
#include "maths/rounding.h"

namespace askew {

ASKEW_FN int size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }  // bytes

// One tensor in memory order. Unused pointers are null.
struct Span {
  void* weight;
  const void* grad;
  void* state[3];  // Sgd: momentum_buffer; AdamW: exp_avg, exp_avg_sq, max_exp_avg_sq
  uint8_t* codes;
  void* snapped;
  const void* scale;               // of the arithmetic type; scale_of() says which one a weight has
  const void* growth;              // (E7): as scale
  double* sums;                    // (E7): of each block, one kind after the other; null: not summed up here
  int64_t scale_run, scale_count;  // weights that share one, scales until they begin anew
  int64_t outer_run, outer_count;  // where the next scale_count of them follow; less than two times: nowhere
  int64_t size;
  void* step;             // AdamW: steps made so far, where only the device knows them; else Settings.steps holds
  void* remainder;        // 16 bits for each weight
  uint64_t stream;        // of random bits
  int64_t first_element;  // number of the first weight, where the tensor is a part of a larger one
};

// The number of weight i's scale. Scales along one dimension of a weight are one run; those that follow expert and
// output of (experts, in, out), or groups and output of (in, out), are runs within runs.
ASKEW_FN int64_t scale_of(const Span& span, int64_t i) {
  const int64_t inner = i / span.scale_run % span.scale_count;
  return span.outer_count < 2 ? inner : i / span.outer_run % span.outer_count * span.scale_count + inner;
}

// (E7) The scales of one tensor that learn, and what they learn by.
struct ScaleSpan {
  void *scale, *velocity, *growth;  // of the arithmetic type
  const double* sums;               // of g w, of w^2, of AdamW's second moments: one kind of all scales after the other
  int64_t size;                     // scales
  double count;                     // weights that share one
  bool has_second, is_double;

  template <typename T> ASKEW_FN void learn(int64_t k, const Learning& l) const {
    askew::learn(static_cast<T*>(scale)[k], static_cast<T*>(velocity)[k], static_cast<T*>(growth)[k], sums[k],
                 sums[size + k], has_second ? sums + 2 * size + k : nullptr, count, l);
  }
};

struct ScaleSettings {
  double scale_lr, momentum, gain;
  bool maximize;
  double lr, epsilon, grad_scale;
};
ASKEW_FN Learning learning_of(const ScaleSettings& s) {
  return {s.scale_lr * s.lr, (s.maximize ? -1 : 1) / s.grad_scale, s.momentum, s.gain, s.epsilon < 1};
}

// (E7) The blocks that a span's weights are summed up in; its scales have one run each.
ASKEW_FN SumBlocks sum_blocks(const Span& span) { return SumBlocks::of(span.scale_run); }
// Weights from i on: where the first block begins that begins there or later.
ASKEW_FN int64_t whole_blocks(const Span& span, int64_t i) {
  const SumBlocks blocks = sum_blocks(span);
  return i < span.size ? blocks.begin(blocks.first_from(i)) : span.size;
}
constexpr int sum_kinds(Rule rule) { return rule == Rule::sgd ? 2 : 3; }

// All that a backend needs for one call.
struct Launch {
  Dtype dtype;        // of weights, and of gradients and state that are not wide
  bool wide_grad;     // 16-bit weights with float32 gradients
  bool wide_state;    // 16-bit weights with float32 state
  Rounding rounding;  // of 16-bit weights
  Rule rule;
  Settings settings;
  Levels levels;
  Dtype snapped_dtype;
  const Span* spans;
  int64_t span_count;
  bool sums_alone;  // (E7): no step, only the sums
};

// Weights are dealt in chunks, so that one large tensor and many small ones spread over threads alike. A chunk never
// crosses a span; an empty span has none. first_chunk[i] is the number of chunks before span i.
ASKEW_FN int64_t chunks_of(int64_t size, int64_t chunk_size) { return (size + chunk_size - 1) / chunk_size; }

// The span that holds a chunk: the last one whose first chunk is not beyond it and that is not empty.
ASKEW_FN int64_t span_of_chunk(const int64_t* first_chunk, int64_t span_count, int64_t chunk) {
  int64_t low = 0, high = span_count;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (first_chunk[middle] <= chunk)
      low = middle;
    else
      high = middle;
  }
  return low;
}

}  // namespace askew
