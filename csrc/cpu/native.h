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

// Adds up the lanes of a pack as a tree: upper halves onto lower ones.
template <typename P> ASKEW_FN double add_down(P x) {
  if constexpr (lanes<P>() == 2)
    return x[0] + x[1];
  else if constexpr (lanes<P>() == 4)
    return add_down(__builtin_shufflevector(x, x, 0, 1) + __builtin_shufflevector(x, x, 2, 3));
  else
    return add_down(__builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7));
}

// The lanes of a sum (order.h), as packs of doubles.
struct LaneSums {
  static constexpr int width = lanes<Doubles>(), packs = sum_lanes / width;
  Doubles sums[packs] = {};

  // Adds the products of two packs whose first weights go to lane `first`.
  template <typename P> ASKEW_FN void add(int first, P x, P y) {
    const int at = first / width;
    sums[at] = plus_product<Lane<P>>(sums[at], widened<0>(x), widened<0>(y));
    if constexpr (lanes<P>() > width) sums[at + 1] = plus_product<Lane<P>>(sums[at + 1], widened<1>(x), widened<1>(y));
  }
  // Adds the numbers of a pack times a factor.
  template <typename P> ASKEW_FN void add_times(int first, P x, double factor) {
    const int at = first / width;
    sums[at] = sums[at] + widened<0>(x) * factor;
    if constexpr (lanes<P>() > width) sums[at + 1] = sums[at + 1] + widened<1>(x) * factor;
  }
  ASKEW_FN double total() {  // add_lanes(), by packs as long as they are whole
#pragma GCC unroll 8
    for (int half = packs / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
    }
    return add_down(sums[0]);
  }
};

}  // namespace
}  // namespace askew
