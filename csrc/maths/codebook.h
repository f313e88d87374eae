// The levels that weights may take, and how the nearest one is found: by rounding where they are evenly spaced, else in
// a table.
#pragma once

#include "pack.h"

namespace askew {

// No constraint: the base rule alone.
struct NoCodebook {
  static constexpr bool quantized = false, even = true;
};

// Levels (first + k) * unit, k = 0 .. top, the unit a power of two: the nearest one by rounding.
template <typename P>
struct UniformCodebook {
  static constexpr bool quantized = true, even = true;  // even: at one distance from each other
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

// Any sorted levels, up to `capacity` of them, a power of four; the unit is 1.
template <typename T, int capacity>
struct TableCodebook {
  static constexpr bool quantized = true, even = false;
  static constexpr T unit = 1;
  // So many entries a pack looks at, or at all of them where there are more levels.
  static constexpr int few = capacity < 64 ? capacity : 64;
  // The midpoints as a search tree for packs, in which a node has three midpoints and four children, so that what waits
  // for each other is short: a level of the tree has a row of its nodes' first midpoints, one of their second and one
  // of their third ones. A row is as long as any register.
  static constexpr int row(int nodes) { return nodes < 16 ? 16 : nodes; }
  static constexpr int rows_before(int nodes) { return nodes == 4 ? 0 : rows_before(nodes / 4) + 3 * row(nodes / 4); }

  int count;
  T levels[capacity];
  T midpoints[capacity];  // between level k and k + 1; infinity where there is none
  T root[3], tree[rows_before(capacity)];
  // Half the distance between level k - 1 and k, and 1 divided by it; at both ends there is only one neighbour.
  T gaps[capacity + 1], inverse_gaps[capacity + 1];

  ASKEW_FN T lowest() const { return levels[0]; }
  ASKEW_FN T highest() const { return levels[count - 1]; }
  // How many midpoints lie below u: a tie goes to the lower level, NaN to 0.
  template <typename P> ASKEW_FN Index<P> nearest(P u) const {
    Index<P> index{};
    if constexpr (sizeof(P) > sizeof(T)) {
      for (const T& midpoint : root) index = one_more(index, u > midpoint);
      index = descend<4, few>(u, index);
      if constexpr (few < capacity) {
        if (count > few) index = descend<few, capacity>(u, index);
      }
    } else {  // a thread of a GPU reads every entry equally fast, and needs fewer registers this way
      for (int half = capacity / 2; half > 0; half /= 2)
        index = u > lookup<capacity>(midpoints, index + (half - 1)) ? index + half : index;
    }
    return index;
  }
  // From a level of the tree that has so many nodes down to the one of `end` nodes.
  template <int nodes, int end, typename P> ASKEW_FN Index<P> descend(P u, Index<P> node) const {
    const T* midpoint = tree + rows_before(nodes);
    Index<P> child = 4 * node;
    for (int k = 0; k < 3; ++k) child = one_more(child, u > lookup<nodes>(midpoint + k * row(nodes), node));
    if constexpr (4 * nodes < end) child = descend<4 * nodes, end>(u, child);
    return child;
  }
  // table[index].
  template <typename Integer> ASKEW_FN auto find(const T* table, Integer index) const {
    if constexpr (few < capacity && !std::is_arithmetic_v<Integer>) {
      if (count <= few) return lookup<few>(table, index);
    }
    return lookup<capacity>(table, index);
  }
  template <typename Integer> ASKEW_FN auto level(Integer index) const { return find(levels, index); }
  template <typename Integer, typename P> ASKEW_FN P gap(Integer index, P e) const { return beside(gaps, index, e); }
  template <typename Integer, typename P> ASKEW_FN P inverse_gap(Integer index, P e) const {
    return beside(inverse_gaps, index, e);
  }
  // The entry of the gap that the weight lies in; e < 0: it lies above its level. A pack looks up both in a small
  // table, for neither has to wait for e; in a large one it takes care that no index gets too large.
  template <typename Integer, typename P> ASKEW_FN P beside(const T* table, Integer index, P e) const {
    if constexpr (std::is_arithmetic_v<Integer>)
      return table[one_more(index, e < T(0))];
    else if constexpr (capacity <= 16)
      return e < T(0) ? find(table + 1, index) : find(table, index);
    else
      return find(table, smaller(one_more(index, e < T(0)), Integer{} + (count - 1)));
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
  using Book = TableCodebook<T, capacity>;
  const int last = count - 1, end = count <= Book::few ? Book::few : capacity;
  const auto level = [&](int i) __attribute__((always_inline)) { return static_cast<T>(levels[i < last ? i : last]); };
  const auto midpoint = [&](int i) __attribute__((always_inline)) {
    return i < last ? (level(i) + level(i + 1)) * T(0.5) : T(INFINITY);
  };
  const int upper = k == 0 ? 1 : k < last ? k : last;
  const T gap = (level(upper) - level(upper - 1)) * T(0.5);
  book.levels[k] = level(k);
  book.midpoints[k] = midpoint(k);
  if (k < 3) book.root[k] = midpoint((k + 1) * (end / 4) - 1);
  for (int nodes = 4; nodes < capacity; nodes *= 4) {
    const int row = Book::row(nodes), below = end / nodes;  // levels below a node; none where the tree ends before
    for (int child = 0; k < row && child < 3; ++child)
      book.tree[Book::rows_before(nodes) + child * row + k] =
          k < nodes && below > 1 ? midpoint(k * below + (child + 1) * (below / 4) - 1) : T(INFINITY);
  }
  book.gaps[k] = gap;
  book.inverse_gaps[k] = 1 / gap;
  if (k == 0) {
    book.count = count;
    book.gaps[capacity] = (level(last) - level(last - 1)) * T(0.5);
    book.inverse_gaps[capacity] = 1 / book.gaps[capacity];
  }
}

}  // namespace askew
