// What a kernel is compiled for beyond its variant. Of a usual launch the kernel knows the flags, so that no weight
// asks for them; kernels of any launch ask.
#pragma once

#include "../variants.h"

namespace askew {

template <typename V> struct Any : V {
  static constexpr bool usual = false;
  static constexpr bool may_learn = V::book != Book::none;
};

// SGD with momentum, without dampening and nesterov; AdamW without amsgrad; capture annealing, evenly spaced levels;
// gradients of the weights' type.
template <typename V, bool learns, Rounding rounding_, bool wide_state_>
struct Usual : V {
  static constexpr bool usual = true;
  static constexpr bool may_learn = learns;
  static constexpr Rounding rounding = rounding_;
  static constexpr bool wide_state = wide_state_;
  static constexpr int states = std::is_same_v<typename V::RuleType, Sgd> ? 1 : 2;  // that there are
};

// Where usual launches have kernels of their own: the storage that large models are trained in.
template <typename V> constexpr bool has_usual() {
  using Storage = typename V::Storage;
  return V::book == Book::uniform && std::is_same_v<typename V::Annealing, Capture> &&
         (std::is_same_v<Storage, float> || std::is_same_v<Storage, BFloat16>);
}

ASKEW_HOST_FN bool is_usual(const Launch& launch) {
  const Settings& s = launch.settings;
  const bool rule = launch.rule == Rule::sgd ? s.momentum != 0 && s.dampening == 0 && !s.nesterov : !s.amsgrad;
  return rule && !launch.wide_grad && !launch.sums_alone;
}

template <typename V, Rounding rounding, bool wide_state, typename Visitor>
ASKEW_HOST_FN void visit_learning(const Launch& launch, const Visitor& visit) {
  if (!launch.settings.learns) return visit(Usual<V, false, rounding, wide_state>{});
  if constexpr (sizeof(typename V::Storage) == 4 || rounding != Rounding::nearest)
    visit(Usual<V, true, rounding, wide_state>{});
  else
    visit(Any<V>{});  // to nearest, a growth would be rounded away: the optimizer asks for none
}

template <typename V, Rounding rounding, typename Visitor>
ASKEW_HOST_FN void visit_state(const Launch& launch, const Visitor& visit) {
  if (launch.wide_state)
    visit_learning<V, rounding, true>(launch, visit);
  else
    visit_learning<V, rounding, false>(launch, visit);
}

// Calls visit(Usual<V, ..>{}) or visit(Any<V>{}).
template <typename V, typename Visitor>
ASKEW_HOST_FN void visit_kind(const Launch& launch, V, const Visitor& visit) {
  if constexpr (has_usual<V>()) {
    if (is_usual(launch)) {
      if constexpr (sizeof(typename V::Storage) == 4) {
        return visit_learning<V, Rounding::nearest, false>(launch, visit);
      } else {
        switch (launch.rounding) {
          case Rounding::nearest:
            return visit_state<V, Rounding::nearest>(launch, visit);
          case Rounding::remainder:
            return visit_state<V, Rounding::remainder>(launch, visit);
          case Rounding::stochastic:
            return visit_state<V, Rounding::stochastic>(launch, visit);
        }
      }
    }
  }
  visit(Any<V>{});
}

}  // namespace askew
