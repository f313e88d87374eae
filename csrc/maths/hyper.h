// From what a step is told to the scalars that it computes with: each rounded once to the arithmetic type.
#pragma once

#include "step.h"

namespace askew {

// What follows from each of the four numbers that change from step to step, and that may be known to the device only.
template <typename P>
ASKEW_FN void set_lr(Now<P>& now, const Settings& s, double value) {
  using T = Lane<P>;
  const T lr = static_cast<T>(value);
  T rate = static_cast<T>(s.rate), max_step = static_cast<T>(s.max_step);
  if (s.skew_gradient)
    max_step = max_step / lr;  // the gradient is skewed per unit of lr
  else if (s.rate_is_alpha)
    rate = lr * rate;
  if (!s.interval && !(rate < 1)) rate = 1;
  const double share = s.rate_is_alpha ? value * s.rate : s.rate;
  now.moves = kept(lr != 0);
  now.minus_lr = constant(-lr, P{});
  now.rate = constant(rate, P{});
  now.quarter_rate = constant(T(0.25) * rate, P{});
  now.max_step = constant(max_step, P{});
  now.snap = constant(static_cast<T>(::fmax(0x1p-16, s.snap_unit / ::fmin(share, 1.0))), P{});
}

template <typename P>
ASKEW_FN void set_epsilon(Now<P>& now, double value) {
  using T = Lane<P>;
  const T root = sqrt(static_cast<T>(value)), capture_radius = 1 - half_width(root);
  now.root = constant(root, P{});
  now.capture_radius = constant(capture_radius < 1 ? capture_radius : T(INFINITY), P{});
}

template <typename P>
ASKEW_FN void set_grad_scale(Now<P>& now, const Settings& s, double value) {
  using T = Lane<P>;
  const T factor = (s.maximize ? T(-1) : T(1)) / static_cast<T>(value);
  now.grad_factor = constant(factor, P{});
  now.unscales = kept(factor != 1);
}

template <typename P>
ASKEW_FN void set_steps(Now<P>& now, const Settings& s, double value) {
  using T = Lane<P>;
  now.bias1 = constant(static_cast<T>(1 / (1 - ::pow(s.beta1, value))), P{});
  now.bias2 = constant(static_cast<T>(1 / ::sqrt(1 - ::pow(s.beta2, value))), P{});
}

template <typename P>
ASKEW_FN Hyper<P> hyper(const Settings& s) {
  using T = Lane<P>;
  const auto all = [](T value) { return constant(value, P{}); };
  Hyper<P> h;
  set_lr(h.now, s, s.lr);
  set_epsilon(h.now, s.epsilon);
  set_grad_scale(h.now, s, s.grad_scale);
  set_steps(h.now, s, s.steps);
#define ASKEW_ROUND(whose, name) h.name = all(static_cast<T>(s.name))
  ASKEW_NUMBERS(ASKEW_ROUND);
#undef ASKEW_ROUND
#define ASKEW_COPY(whose, name) h.name = kept(s.name)
  ASKEW_FLAGS(ASKEW_COPY);
#undef ASKEW_COPY
  h.one_minus_dampening = all(static_cast<T>(1 - s.dampening));
  h.one_minus_beta1 = all(static_cast<T>(1 - s.beta1));
  h.one_minus_beta2 = all(static_cast<T>(1 - s.beta2));
  h.decays = kept(s.weight_decay != 0);
  h.has_momentum = kept(s.momentum != 0);
  h.dampens = kept(s.dampening != 0);
  h.skew_gradient = kept(s.skew_gradient);
  h.learns = kept(s.learns);
  return h;
}

// (E2') The distance, in units of half the level distance and of the rate, from which on a pull goes all the way: where
// the storage would round a smaller move away, which would leave the weight a last bit short of its level for ever. At
// least 2^-16 of the former.
ASKEW_FN double snap_unit(Dtype dtype, Levels levels) {
  if (levels.count == 0) return 0;
  const double roundoff = dtype == Dtype::float64   ? 0x1p-53
                          : dtype == Dtype::float32 ? 0x1p-24
                          : dtype == Dtype::float16 ? 0x1p-11
                                                    : 0x1p-8;
  double gap = INFINITY;
  for (int k = 0; k + 1 < levels.count; ++k) gap = ::fmin(gap, levels.values[k + 1] - levels.values[k]);
  const double largest = ::fmax(::fabs(levels.values[0]), ::fabs(levels.values[levels.count - 1]));
  return 2 * roundoff * largest / gap;
}

}  // namespace askew
