// The levels that weights may take, and how the nearest one is found: by rounding where they are evenly spaced, else in
// a table.
#pragma once

#include "pack.h"

namespace askew {

// No constraint: the base rule alone.
struct NoCodebook {
  static constexpr bool quantized = false;
};

// Levels (first + k) * unit, k = 0 .. top, the unit a power of two: the nearest one by rounding.
template <typename P>
struct UniformCodebook {
  static constexpr bool quantized = true;
  P unit;  // in level units; all below in this unit, so that products with it are exact
  P first, last;
  P shift;        // -first - 1/2
  P bottom, top;  // index of the first level (0) and of the last

  ASKEW_FN P lowest() const { return first; }
  ASKEW_FN P highest() const { return last; }
  ASKEW_FN P nearest(P u) const {  // ties go to the lower level; NaN: 0
    return ceil_index(at_most(at_least(u + shift, bottom), top));
  }
  ASKEW_FN P level(P index) const { return index + first; }
  ASKEW_FN P gap(P index, P) const { return broadcast(Lane<P>(0.5), index); }
  ASKEW_FN P inverse_gap(P index, P) const { return broadcast(Lane<P>(2), index); }
};

// Any sorted levels, up to `capacity` of them, a power of two; the unit is 1.
template <typename T, int capacity>
struct TableCodebook {
  static constexpr bool quantized = true;
  static constexpr T unit = 1;
  int count;
  T levels[capacity];
  T midpoints[capacity];  // between level k and k + 1; infinity where there is none
  T tree[capacity];       // the same as a search tree: the children of node n are 2n and 2n + 1, the root is 1
  // Half the distance between level k - 1 and k, the first entry as the second; and 1 divided by it.
  T gaps[capacity], inverse_gaps[capacity];

  ASKEW_FN T lowest() const { return levels[0]; }
  ASKEW_FN T highest() const { return levels[count - 1]; }
  // How many midpoints lie below u: a tie goes to the lower level, NaN to 0.
  template <typename P> ASKEW_FN Index<P> nearest(P u) const {
    if constexpr (sizeof(P) > sizeof(T)) return descend<2>(u, Index<P>{} + 1) - capacity;
    Index<P> index{};  // a thread of a GPU reads every entry equally fast, and needs fewer registers this way
    for (int half = capacity / 2; half > 0; half /= 2)
      index = u > lookup<capacity>(midpoints, index + (half - 1)) ? index + half : index;
    return index;
  }
  // A pack finds the upper nodes in a register or two.
  template <int nodes, typename P> ASKEW_FN Index<P> descend(P u, Index<P> node) const {
    node = u > lookup<nodes>(tree, node) ? node + node + 1 : node + node;
    if constexpr (nodes < capacity) return descend<2 * nodes>(u, node);
    return node;
  }
  template <typename Integer> ASKEW_FN auto level(Integer index) const { return lookup<capacity>(levels, index); }
  template <typename Integer, typename P> ASKEW_FN P gap(Integer index, P e) const {
    return lookup<capacity>(gaps, upper(index, e));
  }
  template <typename Integer, typename P> ASKEW_FN P inverse_gap(Integer index, P e) const {
    return lookup<capacity>(inverse_gaps, upper(index, e));
  }
  // The upper one of the two levels around the weight; e < 0: it lies above its level. At the ends there is only one
  // neighbour.
  template <typename Integer, typename P> ASKEW_FN Integer upper(Integer index, P e) const {
    const Integer above = e < T(0) ? index + 1 : index;
    const Integer last = Integer{} + (capacity - 1);  // beyond the last level stand copies of its gap
    return above < last ? above : last;
  }
};

// A list of levels, as the caller gave it.
struct Levels {
  const double* values;  // each representable in float32
  int count;             // 0: not quantized
};

// Levels that arithmetic reproduces exactly need no table: their distance is a power of two, and they are multiples of
// half of it.
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

// Entry k of a table, from the levels alone: threads may fill one together. Beyond the last level stand copies of it.
template <typename T, int capacity, typename Number>
ASKEW_FN void fill_entry(TableCodebook<T, capacity>& book, const Number* levels, int count, int k) {
  const int last = count - 1;
  const auto level = [&](int i) __attribute__((always_inline)) { return static_cast<T>(levels[i < last ? i : last]); };
  const auto midpoint = [&](int i) __attribute__((always_inline)) {
    return i < last ? (level(i) + level(i + 1)) * T(0.5) : T(INFINITY);
  };
  const int upper = k == 0 ? 1 : k < last ? k : last;
  const T gap = (level(upper) - level(upper - 1)) * T(0.5);
  int leftmost = 1;  // node on the level of the tree that node k is on
  while (2 * leftmost <= k) leftmost *= 2;
  const int below = (2 * (k - leftmost) + 1) * (capacity / 2 / leftmost) - 1;  // the level below the midpoint of node k
  book.levels[k] = level(k);
  book.midpoints[k] = midpoint(k);
  book.tree[k] = k > 0 ? midpoint(below) : T(INFINITY);
  book.gaps[k] = gap;
  book.inverse_gaps[k] = 1 / gap;
  if (k == 0) book.count = count;
}

}  // namespace askew
