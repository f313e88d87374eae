// What the CPU kernels share: packs of a register's size, codebooks for them, sums in lanes. Compiled with each of
// them, for each instruction set.
#pragma once

#include <type_traits>

#include "../maths/order.h"
#include "../variants.h"

#if !defined(ASKEW_PACK_BYTES)
#define ASKEW_PACK_BYTES 16
#endif

namespace askew {
namespace {

// A pack of a register's size, of the type that arithmetic on Storage is done in.
template <typename Storage> using NativePack =
    Pack<Arithmetic<Storage>, ASKEW_PACK_BYTES / sizeof(Arithmetic<Storage>)>;
using Doubles = Pack<double, ASKEW_PACK_BYTES / sizeof(double)>;

template <typename Any> ASKEW_FN Any* at(void* base, int64_t i) { return static_cast<Any*>(base) + i; }
template <typename Any> ASKEW_FN const Any* at(const void* base, int64_t i) {
  return static_cast<const Any*>(base) + i;
}

// A codebook for packs of Storage's arithmetic; `book` says which kind.
template <typename Storage, Book book>
ASKEW_FN auto native_codebook(Levels levels) {
  if constexpr (book == Book::none) {
    return NoCodebook{};
  } else if constexpr (book == Book::uniform) {
    return uniform_codebook<NativePack<Storage>>(levels);
  } else {
    constexpr int capacity = book == Book::table16 ? 16 : 256;
    TableCodebook<Arithmetic<Storage>, capacity> table;
    for (int k = 0; k < capacity; ++k) fill_entry(table, levels.values, levels.count, k);
    return table;
  }
}

// Calls visit(codebook) with the kind that fits the levels.
template <typename Storage, typename Visitor>
ASKEW_FN void visit_codebook(Levels levels, const Visitor& visit) {
  if (is_uniform(levels))
    visit(native_codebook<Storage, Book::uniform>(levels));
  else if (levels.count <= 16)
    visit(native_codebook<Storage, Book::table16>(levels));
  else
    visit(native_codebook<Storage, Book::table256>(levels));
}

// The first or second half of a pack (all of it, where it is of doubles) as doubles. Written with instructions, since
// GCC converts a part of a register by way of memory.
template <int part, typename P> ASKEW_FN Doubles widened(P x) {
  if constexpr (sizeof(x[0]) == sizeof(double)) {
    return x;
  } else {
#if defined(__x86_64__)
    if constexpr (sizeof(P) == 64)
      return (Doubles)_mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, (__m512)x, part));
    else if constexpr (sizeof(P) == 32)
      return (Doubles)_mm256_cvtps_pd(part ? _mm256_extractf128_ps((__m256)x, 1) : _mm256_castps256_ps128((__m256)x));
    else
      return (Doubles)_mm_cvtps_pd(part ? _mm_movehl_ps((__m128)x, (__m128)x) : (__m128)x);
#else
    Pack<float, lanes<Doubles>()> half;
    std::memcpy(&half, reinterpret_cast<const char*>(&x) + part * sizeof half, sizeof half);
    return __builtin_convertvector(half, Doubles);
#endif
  }
}

// sum + x * y. A product of two floats is exact in double, so fusing it with the sum changes no bit.
template <typename Factor> ASKEW_FN Doubles plus_product(Doubles sum, Doubles x, Doubles y) {
#if defined(__x86_64__)
  if constexpr (sizeof(Factor) == sizeof(float) && sizeof(Doubles) == 64)
    return (Doubles)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)sum);
  else if constexpr (sizeof(Factor) == sizeof(float) && sizeof(Doubles) == 32)
    return (Doubles)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)sum);
  else
#endif
    return sum + x * y;
}

// x + y as x * 1 + y: the same bits, but on AMD's processors from the units that multiply, where those that add are the
// busier ones.
template <typename P> ASKEW_FN P plus_by_product(P x, P y) {
#if defined(__x86_64__)
  P one = broadcast(Lane<P>(1), P{});
  asm("" : "+v"(one));  // or the compiler adds
  if constexpr (std::is_same_v<Lane<P>, float> && sizeof(P) == 64)
    return (P)_mm512_fmadd_ps((__m512)x, (__m512)one, (__m512)y);
  else if constexpr (std::is_same_v<Lane<P>, float> && sizeof(P) == 32)
    return (P)_mm256_fmadd_ps((__m256)x, (__m256)one, (__m256)y);
  else
#endif
    return x + y;
}

// Adds up the lanes of a pack as a tree: upper halves onto lower ones.
template <typename P> ASKEW_FN Lane<P> add_down(P x) {
  if constexpr (lanes<P>() == 2)
    return x[0] + x[1];
  else if constexpr (lanes<P>() == 4)
    return add_down(__builtin_shufflevector(x, x, 0, 1) + __builtin_shufflevector(x, x, 2, 3));
  else if constexpr (lanes<P>() == 8)
    return add_down(__builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7));
  else
    return add_down(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
}

// The lanes of a sum (order.h), as packs.
template <typename P>
struct PackSums {
  static constexpr int width = lanes<P>(), packs = sum_lanes / width;
  P sums[packs] = {};

  ASKEW_FN void add(int first, P x) { sums[first / width] += x; }  // whose first number goes to lane `first`
  ASKEW_FN void add_by_product(int first, P x) { sums[first / width] = plus_by_product(x, sums[first / width]); }
  ASKEW_FN P one_pack() {  // add_lanes(), as long as packs are whole
#pragma GCC unroll 8
    for (int half = packs / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
    }
    return sums[0];
  }
  ASKEW_FN Lane<P> total() { return add_down(one_pack()); }
};

// The numbers 0 .. count - 1, for a shuffle.
template <int... lane> struct Lanes {};
template <int count, int... lane> ASKEW_FN constexpr auto first_lanes() {
  if constexpr (count == 0)
    return Lanes<lane...>{};
  else
    return first_lanes<count - 1, count - 1, lane...>();
}
// Steps of add_down() for two packs at once: of each stretch of so many lanes the upper half is added onto the lower
// one, and what comes out takes half the room.
template <int stretch, typename P, int... lane>
ASKEW_FN P add_halves(P x, P y, Lanes<lane...>) {
  constexpr int width = lanes<P>(), half = stretch / 2;
  constexpr auto lower = [](int k) { return k / (width / 2) * width + k % (width / 2) / half * stretch + k % half; };
  return __builtin_shufflevector(x, y, lower(lane)...) + __builtin_shufflevector(x, y, (lower(lane) + half)...);
}
// add_down() of several packs, no more than one has lanes: lane k of what comes out has that of pack k.
template <int count, int stretch, typename P>
ASKEW_FN P add_down_all(const P* packs) {
  constexpr int left = (count + 1) / 2;
  P halved[left];
#pragma GCC unroll 16
  for (int k = 0; k < left; ++k)
    halved[k] =
        add_halves<stretch>(packs[2 * k], packs[2 * k + 1 < count ? 2 * k + 1 : 2 * k], first_lanes<lanes<P>()>());
  if constexpr (stretch > 2)
    return add_down_all<left, stretch / 2>(halved);
  else
    return halved[0];
}

// The lanes of a sum in double, of products of numbers of any type.
struct LaneSums : PackSums<Doubles> {
  // Adds the products of two packs whose first weights go to lane `first`.
  template <typename P> ASKEW_FN void add(int first, P x, P y) {
    const int at = first / width;
    sums[at] = plus_product<Lane<P>>(sums[at], widened<0>(x), widened<0>(y));
    if constexpr (lanes<P>() > width) sums[at + 1] = plus_product<Lane<P>>(sums[at + 1], widened<1>(x), widened<1>(y));
  }
};

}  // namespace
}  // namespace askew
