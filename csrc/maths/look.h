// A weight beside its level: what is asked of weights that are not stepped. Their codes and snapped values are those
// of (E6) in step.h, but for NaN, which stays NaN where weights are snapped to be used.
#pragma once

#include "codebook.h"

namespace askew {

template <typename P, typename IndexType>
struct Look {
  IndexType index;  // of the nearest level; NaN: 0
  P snapped;        // unit * level; NaN: NaN
};

template <typename P, typename Codebook>
ASKEW_FN auto look(P w, P unit, P inverse, const Codebook& codebook) {
  const auto index = codebook.nearest(w * inverse);
  const P snapped = unit * codebook.level(index);
  return Look<P, std::decay_t<decltype(index)>>{index, w == w ? snapped : w};
}

// The distance to the level as it is stored, in units of half the distance between the levels around the weight.
template <typename P, typename IndexType, typename Codebook>
ASKEW_FN P distance(P w, P stored, IndexType index, P unit, const Codebook& codebook) {
  const P e = stored - w;
  return abs(e) / (unit * codebook.gap(index, e));
}

}  // namespace askew
