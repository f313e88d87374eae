// What a step can be told. THE TABLE below is the only list of it in C++: structs and schemas follow from it, as
// Python's lists do from Settings in askew_cuda/reference.py. A number or a flag that is added is h.<name> in step.h.
#pragma once

#include "codebook.h"

namespace askew {

enum class Dtype : int32_t { float32, float64, bfloat16, float16 };
enum class Rule : int32_t { sgd, adamw };

// THE TABLE: (whose, name). A number is rounded once, to the arithmetic type; a flag is a flag.
#define ASKEW_NUMBERS(number)                                                  \
  number(both, weight_decay);                                                  \
  number(both, max_step); /* cap on the pull, in units of half the distance */ \
  number(sgd, momentum);                                                       \
  number(sgd, dampening);                                                      \
  number(adamw, beta1);                                                        \
  number(adamw, beta2);                                                        \
  number(adamw, eps)
#define ASKEW_FLAGS(flag)                                      \
  flag(both, maximize);                                        \
  flag(both, clip); /* into the box of the outermost levels */ \
  flag(sgd, nesterov);                                         \
  flag(adamw, amsgrad)

// As the caller gave them.
struct Settings {
#define ASKEW_FIELD(whose, name) double name = 0
  ASKEW_NUMBERS(ASKEW_FIELD);
#undef ASKEW_FIELD
#define ASKEW_FIELD(whose, name) bool name = false
  ASKEW_FLAGS(ASKEW_FIELD);
#undef ASKEW_FIELD
  // What is more than a number: the annealing, the one of two rates that is given, what changes from step to step.
  bool interval = false, skew_gradient = false;
  bool rate_is_alpha = false;  // the pull's rate is lr * alpha; else `recovery`, whatever lr
  bool learns = false;         // (E7): weights and scales have a growth
  double rate = 0;             // alpha or recovery
  double lr = 0, epsilon = 1, grad_scale = 1;
  double steps = 0;      // AdamW: with this one; all weights of a launch have made as many
  double snap_unit = 0;  // snap_unit() in hyper.h
  uint64_t seed = 0;     // of stochastic rounding
};

// What the maths makes of the numbers that change from step to step, and that may be known to the device only.
template <typename P>
struct Now {
  P minus_lr;
  P grad_factor;         // 1 / AMP's grad_scale, negated to maximize; mostly 1
  P root;                // (E1): sqrt(epsilon)
  P capture_radius;      // D = 1 - r in units of half the level distance; infinity once D = 1
  P rate, quarter_rate;  // a of (E2), (E2')
  P max_step;            // cap on the pull, in units of half the level distance
  P snap;                // from this distance on the pull goes all the way, in the same units
  P bias1, bias2;        // bias corrections of Adam, 1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t)
  bool moves, unscales;  // lr is not 0, grad_factor is not 1
};

// The scalars of a step, each rounded once to the arithmetic type.
template <typename P>
struct Hyper {
  Now<P> now;
#define ASKEW_FIELD(whose, name) P name
  ASKEW_NUMBERS(ASKEW_FIELD);
#undef ASKEW_FIELD
  P one_minus_dampening, one_minus_beta1, one_minus_beta2;
#define ASKEW_FIELD(whose, name) bool name
  ASKEW_FLAGS(ASKEW_FIELD);
#undef ASKEW_FIELD
  bool decays, has_momentum, dampens;  // factors that are not 0
  bool skew_gradient;  // the constraint acts on the gradient, as in the authors' code; else on the displacement
  bool learns;         // (E7): a step begins with w f and s f
};

}  // namespace askew
