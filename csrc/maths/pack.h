// The operations that step.h is written in, for one number (host or device) and for a SIMD pack of numbers alike.
//
// A pack is a GCC / Clang vector type: + - * /, comparisons and `mask ? a : b` work on it as on a number, so a template
// over P needs only what this file adds. A comparison of packs gives a mask of integers, of numbers a bool; both
// combine with & and |. NaN fails every comparison: a select that has to let a NaN through names it in its last
// operand.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

// always_inline: no copy compiled for one instruction set may stand in for another.
#define ASKEW_HOST_FN inline __attribute__((always_inline))
#if defined(__CUDACC__)
#define ASKEW_FN __host__ __device__ __forceinline__
#elif defined(ASKEW_NOT_INLINED)  // sanitizers take minutes over large functions
#define ASKEW_FN inline
#else
#define ASKEW_FN ASKEW_HOST_FN
#endif

namespace askew {

// 16-bit storage: the bits only. All arithmetic on it is float32.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type that arithmetic on a storage type is done in.
template <typename Storage> struct ArithmeticOf {
  using type = float;
};
template <> struct ArithmeticOf<double> {
  using type = double;
};
template <typename Storage> using Arithmetic = typename ArithmeticOf<Storage>::type;

ASKEW_FN float abs(float x) { return ::fabsf(x); }
ASKEW_FN double abs(double x) { return ::fabs(x); }
ASKEW_FN float sqrt(float x) { return ::sqrtf(x); }
ASKEW_FN double sqrt(double x) { return ::sqrt(x); }

// The smallest integer that is not below x; 0 <= x <= 255.
ASKEW_FN float ceil_index(float x) { return ::ceilf(x); }
ASKEW_FN double ceil_index(double x) { return ::ceil(x); }

// x with its sign turned where `sign` is negative: x * sign(sign), without a multiplication.
ASKEW_FN float flip(float x, float sign) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(__float_as_uint(x) ^ (__float_as_uint(sign) & 0x80000000u));
#else
  return ::copysignf(1.0f, sign) < 0 ? -x : x;
#endif
}
ASKEW_FN double flip(double x, double sign) { return ::copysign(1.0, sign) < 0 ? -x : x; }

// The smaller and the larger of two numbers, of which the second is no NaN and not -0: then a GPU's one instruction has
// the bits of the select. Of a NaN in the first place these make the second number ..
template <typename P> ASKEW_FN P at_most(P x, P most) { return x < most ? x : most; }
template <typename P> ASKEW_FN P at_least(P x, P least) { return x > least ? x : least; }
// .. and this one leaves it a NaN. (There is no such one for the larger number: a GPU takes +0 for larger than -0.)
template <typename P> ASKEW_FN P no_more(P x, P most) { return x > most ? most : x; }
#if defined(__CUDA_ARCH__)
ASKEW_FN float at_most(float x, float most) { return ::fminf(x, most); }
ASKEW_FN float at_least(float x, float least) { return ::fmaxf(x, least); }
#if __CUDA_ARCH__ >= 800
ASKEW_FN float no_more(float x, float most) {
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(most));
  return x;
}
#endif
#endif

// table[index], index below `capacity`; the table may be larger. With a pack of integers, for each lane.
template <int capacity, typename T> ASKEW_FN T lookup(const T* table, int32_t index) { return table[index]; }

// `value` in every lane of something like the second argument.
ASKEW_FN float broadcast(float value, float) { return value; }
ASKEW_FN double broadcast(double value, double) { return value; }

// A constant of a loop: as broadcast(), but kept as a pack. Otherwise compilers keep the number and broadcast it at
// each use.
ASKEW_FN float constant(float value, float) { return value; }
ASKEW_FN double constant(double value, double) { return value; }

// A flag of a loop, kept as a byte. Otherwise compilers keep the numbers that it follows from and compare them anew at
// each use.
ASKEW_FN bool kept(bool flag) {
#if !defined(__CUDA_ARCH__) && (defined(__x86_64__) || defined(__aarch64__))
  asm("" : "+r"(flag));
#endif
  return flag;
}

// The type of one lane.
template <typename P> struct LaneOf {
  using type = std::remove_reference_t<decltype(P{}[0])>;
};
template <> struct LaneOf<float> {
  using type = float;
};
template <> struct LaneOf<double> {
  using type = double;
};
template <typename P> using Lane = typename LaneOf<P>::type;

// An index into a table for each lane: an integer, or a pack of integers as wide as the lanes.
template <typename P> struct IndexOf {
  using type = decltype(P{} < P{});
};
template <> struct IndexOf<float> {
  using type = int32_t;
};
template <> struct IndexOf<double> {
  using type = int32_t;
};
template <typename P> using Index = typename IndexOf<P>::type;

#if !defined(__CUDACC__)

template <typename T, int N> struct PackOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <typename T, int N> using Pack = typename PackOf<T, N>::type;

template <typename P> constexpr int lanes() {
  if constexpr (std::is_arithmetic_v<P>)
    return 1;
  else
    return sizeof(P) / sizeof(P{}[0]);
}
template <typename P> using MaskOf = decltype(P{} < P{});  // integers as wide as the lanes

template <typename P> constexpr auto sign_bit() {
  if constexpr (sizeof(P{}[0]) == 4)
    return static_cast<int32_t>(INT32_MIN);
  else
    return static_cast<int64_t>(INT64_MIN);
}

// Subtracting zero folds to nothing; adding it does not (-0 + 0 = +0).
template <typename T, typename P> ASKEW_FN P broadcast(T value, P) { return value - P{}; }

template <typename T, typename P> ASKEW_FN P constant(T value, P like) {
  P all = broadcast(value, like);
#if defined(__x86_64__)
  asm("" : "+x"(all));
#elif defined(__aarch64__)
  asm("" : "+w"(all));
#endif
  return all;
}

template <typename P> ASKEW_FN P abs(P x) { return (P)((MaskOf<P>)x & ~sign_bit<P>()); }
template <typename P> ASKEW_FN P flip(P x, P sign) { return (P)((MaskOf<P>)x ^ ((MaskOf<P>)sign & sign_bit<P>())); }

template <typename P> ASKEW_FN P sqrt(P x) {
  for (int lane = 0; lane < lanes<P>(); ++lane) x[lane] = sqrt(x[lane]);
  return x;
}

template <typename P> constexpr bool has_ceil() {
#if defined(__x86_64__)
  return sizeof(P) > 16;  // SSE2, the baseline, has none
#else
  return true;
#endif
}
template <typename P> ASKEW_FN P ceil_index(P x) {
  if constexpr (has_ceil<P>()) {
    for (int lane = 0; lane < lanes<P>(); ++lane) x[lane] = ceil_index(x[lane]);
    return x;
  } else {  // adding 2^23 (2^52) leaves no room for a fraction: it rounds, to even in a tie
    using T = Lane<P>;
    const T room = sizeof(T) == 4 ? T(0x1p23) : T(0x1p52);
    const P rounded = (x + room) - room;
    return rounded + (rounded < x ? broadcast(T(1), x) : P{});
  }
}

// A table of one or two registers is shuffled by the lower bits of the index. Of a larger one both halves are looked up
// and the next bit chooses, as long as that costs less than reading it lane by lane. Whole registers are read, so a
// table has 16 entries at least.
template <int capacity, typename T, typename Integers> ASKEW_FN Pack<T, lanes<Integers>()> lookup(const T* table,
                                                                                                  Integers index) {
  using P = Pack<T, lanes<Integers>()>;
#if !defined(__clang__)
  constexpr int width = lanes<P>();
  if constexpr (width >= 8 && capacity <= 2 * width) {
    P first, second;
    std::memcpy(&first, table, sizeof first);
    if constexpr (capacity <= width) return __builtin_shuffle(first, index);
    std::memcpy(&second, table + width, sizeof second);
    return __builtin_shuffle(first, second, index);
  } else if constexpr (width >= 8 && (capacity <= 4 * width || width >= 16)) {
    const P low = lookup<capacity / 2>(table, index), high = lookup<capacity / 2>(table + capacity / 2, index);
    return (index & (capacity / 2)) != 0 ? high : low;
  }
#endif
  P found{};
  for (int lane = 0; lane < lanes<P>(); ++lane) found[lane] = table[index[lane]];
  return found;
}

#endif  // !__CUDACC__

// 16-bit storage by integer arithmetic, as words of 32 bits whose lower half holds the bits. P is float or a pack of
// it, Word uint32_t or a pack of that.
template <typename Word, typename P> ASKEW_FN Word bits_of(P x) {
  Word word;
  std::memcpy(&word, &x, sizeof word);
  return word;
}
template <typename P, typename Word> ASKEW_FN P of_bits(Word word) {
  P x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}

template <typename P, typename Word> ASKEW_FN P widen_bfloat16(Word half) { return of_bits<P>(half << 16); }
// Round to nearest even; every NaN becomes the quiet one that torch writes.
template <typename Word, typename P> ASKEW_FN Word narrow_bfloat16(P x) {
  const Word bits = bits_of<Word>(x);
  const Word rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? rounded : Word{} + 0x7fc0;
}

#if !defined(__CUDACC__)

// F16C and AVX-512 convert a pack of binary16 by an instruction, to nearest even. Of a NaN it would keep more than
// torch does.
template <typename P> constexpr bool converts_float16() {
#if defined(__x86_64__)
  return sizeof(P) >= 32;
#else
  return false;
#endif
}
template <typename P> using PackOfHalves = Pack<uint16_t, lanes<P>()>;
template <typename P> ASKEW_FN P widen_by_instruction([[maybe_unused]] PackOfHalves<P> half) {
#if defined(__x86_64__)
  if constexpr (sizeof(P) == 32)
    return (P)_mm256_cvtph_ps((__m128i)half);
  else
    return (P)_mm512_maskz_cvtph_ps(0xffff, (__m256i)half);
#endif
}
template <typename P> ASKEW_FN PackOfHalves<P> narrow_by_instruction([[maybe_unused]] P x) {
#if defined(__x86_64__)
  const P nan = (P)(((MaskOf<P>)x & sign_bit<P>()) | 0x7fc00000);
  x = x == x ? x : nan;
  if constexpr (sizeof(P) == 32)
    return (PackOfHalves<P>)_mm256_cvtps_ph((__m256)x, 0);
  else
    return (PackOfHalves<P>)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, 0);
#endif
}

#endif  // !__CUDACC__

// 2^112 moves a binary16's exponent, set into a binary32's field, to its value; subnormals come out right by
// themselves.
template <typename P, typename Word> ASKEW_FN P widen_float16(Word half) {
#if !defined(__CUDACC__)
  if constexpr (converts_float16<P>()) return widen_by_instruction<P>(__builtin_convertvector(half, PackOfHalves<P>));
#endif
  const Word magnitude = half & 0x7fff;
  const Word finite = bits_of<Word>(of_bits<P>(magnitude << 13) * 0x1p112f);
  const Word special = (magnitude << 13) | 0x7f800000;
  return of_bits<P>((magnitude < 0x7c00 ? finite : special) | ((half & 0x8000) << 16));
}
// Round to nearest even, by adding a power of two that leaves the ten bits of a binary16's mantissa room and no more.
// The two products saturate what is too large to infinity.
template <typename Word, typename P> ASKEW_FN Word narrow_float16(P x) {
#if !defined(__CUDACC__)
  if constexpr (converts_float16<P>()) return __builtin_convertvector(narrow_by_instruction(x), Word);
#endif
  const Word bits = bits_of<Word>(x);
  const Word exponent = (bits + bits) & 0xff000000u;  // the sign bit is shifted out
  const Word bias = exponent < 0x71000000u ? Word{} + 0x71000000u : exponent;
  const P saturated = (abs(x) * 0x1p112f) * 0x1p-110f;
  const Word sum = bits_of<Word>(of_bits<P>((bias >> 1) + 0x07800000u) + saturated);
  const Word magnitude = ((sum >> 13) & 0x7c00) + (sum & 0x0fff);
  return (x == x ? magnitude : Word{} + 0x7e00) | ((bits >> 16) & 0x8000);
}

// Floats that hold integers to words of 32 bits and back.
ASKEW_FN uint32_t to_word(float x) { return static_cast<uint32_t>(static_cast<int32_t>(x)); }
ASKEW_FN float of_word(uint32_t word) { return static_cast<float>(static_cast<int32_t>(word)); }

// One number to storage and back.
ASKEW_FN float widen(float x) { return x; }
ASKEW_FN double widen(double x) { return x; }
ASKEW_FN void narrow(float& to, float x) { to = x; }
ASKEW_FN void narrow(double& to, double x) { to = x; }
#if defined(__CUDA_ARCH__)
ASKEW_FN float widen(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
ASKEW_FN float widen(Float16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
ASKEW_FN void narrow(BFloat16& to, float x) {
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  to.bits = static_cast<uint16_t>(narrow_bfloat16<uint32_t>(x));
#endif
}
ASKEW_FN void narrow(Float16& to, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x)); }
#else
ASKEW_FN float widen(BFloat16 x) { return widen_bfloat16<float>(uint32_t{x.bits}); }
ASKEW_FN float widen(Float16 x) { return widen_float16<float>(uint32_t{x.bits}); }
ASKEW_FN void narrow(BFloat16& to, float x) { to.bits = static_cast<uint16_t>(narrow_bfloat16<uint32_t>(x)); }
ASKEW_FN void narrow(Float16& to, float x) { to.bits = static_cast<uint16_t>(narrow_float16<uint32_t>(x)); }
#endif

#if !defined(__CUDACC__)

// Storage to pack and back. Pointers need no alignment.
template <typename P, typename T> ASKEW_FN P load(const T* from) {
  P x;
  static_assert(sizeof(T) == sizeof(x[0]), "a number is loaded as it is");
  std::memcpy(&x, from, sizeof x);
  return x;
}
template <typename P, typename T> ASKEW_FN void store(T* to, P x) {
  static_assert(sizeof(T) == sizeof(x[0]), "a number is stored as it is");
  std::memcpy(to, &x, sizeof x);
}

template <typename P> ASKEW_FN Pack<uint32_t, lanes<P>()> to_word(P x) {
  return (Pack<uint32_t, lanes<P>()>)__builtin_convertvector(x, Pack<int32_t, lanes<P>()>);
}
template <typename Word> ASKEW_FN Pack<float, lanes<Word>()> of_word(Word word) {
  return __builtin_convertvector((Pack<int32_t, lanes<Word>()>)word, Pack<float, lanes<Word>()>);
}

template <typename P> ASKEW_FN Pack<uint32_t, lanes<P>()> load_halves(const void* from) {
  Pack<uint16_t, lanes<P>()> half;
  std::memcpy(&half, from, sizeof half);
  return __builtin_convertvector(half, Pack<uint32_t, lanes<P>()>);
}
template <typename Word> ASKEW_FN void store_halves(void* to, Word word) {
  const auto half = __builtin_convertvector(word, Pack<uint16_t, lanes<Word>()>);
  std::memcpy(to, &half, sizeof half);
}
template <typename P> ASKEW_FN P load(const BFloat16* from) { return widen_bfloat16<P>(load_halves<P>(from)); }
template <typename P> ASKEW_FN P load(const Float16* from) {
  if constexpr (converts_float16<P>())
    return widen_by_instruction<P>(load<PackOfHalves<P>>(reinterpret_cast<const uint16_t*>(from)));
  return widen_float16<P>(load_halves<P>(from));
}
template <typename P> ASKEW_FN void store(BFloat16* to, P x) {
  store_halves(to, narrow_bfloat16<Pack<uint32_t, lanes<P>()>>(x));
}
template <typename P> ASKEW_FN void store(Float16* to, P x) {
  if constexpr (converts_float16<P>()) return store(reinterpret_cast<uint16_t*>(to), narrow_by_instruction(x));
  store_halves(to, narrow_float16<Pack<uint32_t, lanes<P>()>>(x));
}

// Level indices (0 .. 255, integers or not) as bytes; by way of 16 bits, since the direct way goes lane by lane.
template <typename P> ASKEW_FN void store_codes(uint8_t* to, P index) {
  const auto word = __builtin_convertvector(index, Pack<int32_t, lanes<P>()>);
  const auto half = __builtin_convertvector(word, Pack<int16_t, lanes<P>()>);
  const auto code = __builtin_convertvector(half, Pack<uint8_t, lanes<P>()>);
  std::memcpy(to, &code, sizeof code);
}

#endif  // !__CUDACC__

}  // namespace askew
