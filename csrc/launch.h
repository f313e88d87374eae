// What a launch is told: settings (the scalars of the call), spans (one per tensor: pointers, size, scales), and the
// map from a chunk's number to the span and the offset where it starts. Plain data, for host and device.
#pragma once

#include "maths/hyper.h"
#include "maths/rounding.h"

namespace askew {

// One tensor in memory order. Unused pointers are null.
struct Span {
  void* weight;
  const void* grad;
  void* state[3];  // Sgd: momentum_buffer; AdamW: exp_avg, exp_avg_sq, max_exp_avg_sq
  uint8_t* codes;
  void* snapped;
  const void* scale;               // of the arithmetic type; scale_of() says which one a weight has
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

// All that a backend needs for one call.
struct Launch {
  Dtype dtype;        // of weights and gradients
  bool wide_state;    // 16-bit weights with float32 state
  Rounding rounding;  // of 16-bit weights
  Rule rule;
  Settings settings;
  Levels levels;
  Dtype snapped_dtype;
  const Span* spans;
  int64_t span_count;
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
