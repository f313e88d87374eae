// The threads of a block of the kernels around the step, which work in parts: all have done one before any begins the
// next. On a processor, for tests, one thread after the other does a part.
//
// What a part writes, no thread may ask for between that part and the one before: a fast thread writes it already.
#pragma once

#include "../variants.h"
#include "cuda.h"
#include "lane_sums.h"

namespace askew {

constexpr int team_threads = 256;
constexpr int team_halves = team_threads / sum_lanes;  // halves of a warp: each takes a block of sums

struct Team {
  int turn = 0;  // which thread a processor begins with

  template <typename Part> ASKEW_FN void all(const Part& part) const {
#if defined(__CUDA_ARCH__)
    part(static_cast<int>(threadIdx.x));
    __syncthreads();
#else
    for (int thread = 0; thread < team_threads; ++thread) part((thread + turn) % team_threads);
#endif
  }
};

// What threads count together. No order of theirs makes a difference.
template <typename Integer> ASKEW_FN void count(Integer* counter, unsigned more) {
#if defined(__CUDA_ARCH__)
  if (more) atomicAdd(counter, static_cast<Integer>(more));
#else
  *counter += more;
#endif
}
// One more of counters[which]; neighbours that count the same go there once.
ASKEW_FN void count_one(unsigned* counters, int which) {
#if defined(__CUDA_ARCH__)
  const unsigned same = __match_any_sync(__activemask(), which);
  if (__ffs(same) - 1 == static_cast<int>(threadIdx.x % 32)) atomicAdd(counters + which, __popc(same));
#else
  ++counters[which];
#endif
}

// The largest of numbers that are at least 0, whose bits are in their order.
using LargestBits = unsigned long long;
ASKEW_FN void raise_to(LargestBits* largest, double number) {
  LargestBits bits;
  std::memcpy(&bits, &number, sizeof bits);
#if defined(__CUDA_ARCH__)
  atomicMax(largest, bits);
#else
  *largest = bits > *largest ? bits : *largest;
#endif
}
ASKEW_FN double number_of(LargestBits bits) {
  double number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

// What kernels around the step are compiled for: storage, kind of levels.
template <typename Storage_, Book book_>
struct Around {
  using Storage = Storage_;
  using T = Arithmetic<Storage>;
  static constexpr Book book = book_;
  static constexpr bool is_table = book != Book::uniform;
  static constexpr int capacity = book == Book::table16 ? 16 : 256;
};

template <typename Storage, typename Visitor>
ASKEW_HOST_FN void visit_book(Levels levels, const Visitor& visit) {
  if (is_uniform(levels))
    visit(Around<Storage, Book::uniform>{});
  else if (levels.count <= 16)
    visit(Around<Storage, Book::table16>{});
  else
    visit(Around<Storage, Book::table256>{});
}
template <typename Visitor>
ASKEW_HOST_FN void visit_storage(Dtype dtype, const Visitor& visit) {
  switch (dtype) {
    case Dtype::float32:
      return visit(float{});
    case Dtype::float64:
      return visit(double{});
    case Dtype::bfloat16:
      return visit(BFloat16{});
    case Dtype::float16:
      return visit(Float16{});
  }
}
// Calls visit(Around<..>{}) with the one that fits.
template <typename Visitor>
ASKEW_HOST_FN void visit_around(Dtype dtype, Levels levels, const Visitor& visit) {
  visit_storage(dtype, [&](auto storage) { visit_book<decltype(storage)>(levels, visit); });
}

// Levels as a kernel's argument.
struct LevelList {
  int count;
  float values[256];
};
ASKEW_HOST_FN LevelList list_of(Levels levels) {
  LevelList list{levels.count, {}};
  for (int k = 0; k < levels.count; ++k) list.values[k] = static_cast<float>(levels.values[k]);
  return list;
}

// The codebook of a block: made from the list by its threads where it is a table, in each where it is not.
template <typename V>
struct BlockBook {
  using T = typename V::T;
  std::conditional_t<V::is_table, TableCodebook<T, V::capacity>, UniformCodebook<T>> book;

  ASKEW_FN void fill(const LevelList& levels, int thread) {
    if constexpr (V::is_table) {
      for (int k = thread; k < V::capacity; k += team_threads) fill_entry(book, levels.values, levels.count, k);
    } else if (thread == 0) {
      const double outer[] = {levels.values[0], levels.values[1]};
      Levels two{outer, levels.count};
      book = uniform_codebook<T>(two);
    }
  }
};

// Level units per unit of the codebook.
template <typename V> ASKEW_FN typename V::T per_unit(const LevelList& levels) {
  using T = typename V::T;
  return V::is_table ? T(1) : static_cast<T>(static_cast<double>(levels.values[1]) - levels.values[0]);
}

}  // namespace askew
