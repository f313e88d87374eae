// What a launch is told: settings (the scalars of the call), spans (one per tensor: pointers, size, scales), and the map
// from a chunk's number to the span and the offset where it starts. Plain data, for host and device.
#pragma once

#include "step.h"

namespace askew {

enum class Dtype : int32_t { float32, float64, bfloat16, float16 };
enum class Rule : int32_t { sgd, adamw };

// As the caller gave them; hyper() below rounds each to the arithmetic type.
struct Settings {
  double lr, weight_decay;
  double grad_scale = 1;
  bool maximize = false;
  double momentum = 0, dampening = 0;
  bool nesterov = false;
  double beta1 = 0, beta2 = 0, adam_eps = 0;
  bool amsgrad = false;
  double epsilon = 1;
  bool interval = false, skew_gradient = false, clip = false;
  bool rate_is_alpha = false;  // the pull's rate is lr * alpha; else `recovery`, whatever lr
  double rate = 0;             // alpha or recovery
  double max_step = 0;
};

template <typename P>
ASKEW_FN Hyper<P> hyper(const Settings& s, double snap) {
  using T = Lane<P>;
  const auto all = [](T value) { return constant(value, P{}); };
  const T lr = static_cast<T>(s.lr), grad_factor = (s.maximize ? T(-1) : T(1)) / static_cast<T>(s.grad_scale);
  const T root = sqrt(static_cast<T>(s.epsilon)), half_width = half_width_inside(root), capture_radius = 1 - half_width;
  T rate = static_cast<T>(s.rate), max_step = static_cast<T>(s.max_step);
  if (s.skew_gradient)
    max_step = max_step / lr;  // the gradient is skewed per unit of lr
  else if (s.rate_is_alpha)
    rate = lr * rate;
  if (!s.interval && !(rate < 1)) rate = 1;
  Hyper<P> h;
  h.minus_lr = all(-lr);
  h.weight_decay = all(static_cast<T>(s.weight_decay));
  h.grad_factor = all(grad_factor);
  h.momentum = all(static_cast<T>(s.momentum));
  h.one_minus_dampening = all(static_cast<T>(1 - s.dampening));
  h.beta1 = all(static_cast<T>(s.beta1));
  h.one_minus_beta1 = all(static_cast<T>(1 - s.beta1));
  h.beta2 = all(static_cast<T>(s.beta2));
  h.one_minus_beta2 = all(static_cast<T>(1 - s.beta2));
  h.adam_eps = all(static_cast<T>(s.adam_eps));
  h.unscales = grad_factor != 1;
  h.moves = lr != 0;
  h.decays = s.weight_decay != 0;
  h.has_momentum = s.momentum != 0;
  h.dampens = s.dampening != 0;
  h.nesterov = s.nesterov;
  h.amsgrad = s.amsgrad;
  h.skew_gradient = s.skew_gradient;
  h.clip = s.clip;
  h.half_width = all(half_width);
  h.half_width_outside = all(half_width_outside(root));
  h.root = all(root);
  h.capture_radius = all(capture_radius < 1 ? capture_radius : T(INFINITY));
  h.rate = all(rate);
  h.max_step = all(max_step);
  h.snap = all(static_cast<T>(snap));
  return h;
}

// One tensor in memory order. Unused pointers are null.
struct Span {
  void* weight;
  const void* grad;
  void* state[3];  // Sgd: momentum_buffer; AdamW: exp_avg, exp_avg_sq, max_exp_avg_sq
  uint8_t* codes;
  void* snapped;
  const void* scale;  // of the arithmetic type; weight i has scale[(i / scale_run) % scale_count]
  int64_t scale_run, scale_count;
  int64_t size;
  Bias<double> bias;  // AdamW: of this tensor's step count
};

// A list of levels, as the caller gave it.
struct Levels {
  const double* values;  // each representable in float32
  int count;             // 0: not quantized
};

// Levels that arithmetic reproduces exactly need no table: their distance is a power of two, and they are multiples of half of it.
ASKEW_FN bool is_uniform(Levels levels) {
  const double unit = levels.values[1] - levels.values[0], first = levels.values[0] / unit;
  int exponent;
  if (::frexp(unit, &exponent) != 0.5 || ::fabs(first) > 65536 || ::floor(2 * first) != 2 * first) return false;
  for (int k = 0; k < levels.count; ++k) {
    if ((first + k) * unit != levels.values[k]) return false;
  }
  return true;
}

template <typename P>
ASKEW_FN UniformCodebook<P> uniform_codebook(Levels levels) {
  using T = Lane<P>;
  const auto all = [](T value) { return constant(value, P{}); };
  const T unit = static_cast<T>(levels.values[1] - levels.values[0]);
  const T first = static_cast<T>(levels.values[0]) / unit, top = static_cast<T>(levels.count - 1);
  return {all(unit), all(first), all(first + top), all(-first - T(0.5)), all(0), all(top)};
}

template <typename T, int capacity>
ASKEW_FN TableCodebook<T, capacity> table_codebook(Levels levels) {
  TableCodebook<T, capacity> book{};
  const int last = levels.count - 1;
  book.count = levels.count;
  for (int k = 0; k <= last; ++k) book.levels[k] = static_cast<T>(levels.values[k]);
  for (int k = 0; k < capacity; ++k) book.midpoints[k] = INFINITY;
  for (int k = 0; k < last; ++k) {
    book.midpoints[k] = (book.levels[k] + book.levels[k + 1]) * T(0.5);
    book.gap_above[k] = book.gap_below[k + 1] = (book.levels[k + 1] - book.levels[k]) * T(0.5);
  }
  book.gap_below[0] = book.gap_above[0];
  book.gap_above[last] = book.gap_below[last];
  for (int k = 0; k <= last; ++k) {
    book.inverse_gap_below[k] = 1 / book.gap_below[k];
    book.inverse_gap_above[k] = 1 / book.gap_above[k];
  }
  return book;
}

// All that a backend needs for one call.
struct Launch {
  Dtype dtype;      // of weights and gradients
  bool wide_state;  // 16-bit weights with float32 state
  Rule rule;
  Settings settings;
  Levels levels;
  Dtype snapped_dtype;
  const Span* spans;
  const int64_t* first_chunk;  // [span_count + 1]: number of the first chunk of each span; the last is their count
  int64_t span_count;
};

// (E2') The distance, in units of half the level distance, from which on a pull goes all the way: 2^-16, or where the storage would
// round a smaller move away, which would leave the weight a last bit short of its level for ever.
ASKEW_FN double snap_radius(const Launch& launch) {
  const Levels& levels = launch.levels;
  const Settings& s = launch.settings;
  const double roundoff = launch.dtype == Dtype::float64   ? 0x1p-53
                          : launch.dtype == Dtype::float32 ? 0x1p-24
                          : launch.dtype == Dtype::float16 ? 0x1p-11
                                                           : 0x1p-8;
  const double rate = s.rate_is_alpha ? s.lr * s.rate : s.rate;
  double gap = INFINITY;
  for (int k = 0; k + 1 < levels.count; ++k) gap = ::fmin(gap, levels.values[k + 1] - levels.values[k]);
  const double largest = levels.count == 0 ? 0 : ::fmax(::fabs(levels.values[0]), ::fabs(levels.values[levels.count - 1]));
  return ::fmax(0x1p-16, 2 * roundoff * largest / gap / ::fmin(rate, 1));
}

// Weights are dealt in chunks, so that one large tensor and many small ones spread over threads alike. A chunk never
// crosses a span; an empty span has none.
constexpr int64_t chunk_size = 1 << 15;  // 640 KiB of float32 weight, gradient and momentum traffic: well below a millisecond
ASKEW_FN int64_t chunks_of(int64_t size) { return (size + chunk_size - 1) / chunk_size; }

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
