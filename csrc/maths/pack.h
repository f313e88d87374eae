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

// table[index], index below `capacity`, a power of two; the table may be larger. With a pack of integers, for each
// lane.
template <int capacity, typename T> ASKEW_FN T lookup(const T* table, int32_t index) { return table[index]; }

// x, and one more where a comparison holds.
ASKEW_FN int32_t one_more(int32_t x, bool holds) { return holds ? x + 1 : x; }

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

// The smaller one of two integers, in each lane.
template <typename Integers> ASKEW_FN Integers smaller(Integers x, Integers y) {
#if defined(__x86_64__)
  if constexpr (sizeof(x) == 64 && sizeof(x[0]) == 4)
    return (Integers)_mm512_maskz_min_epi32(0xffff, (__m512i)x, (__m512i)y);
  if constexpr (sizeof(x) == 32 && sizeof(x[0]) == 4) return (Integers)_mm256_min_epi32((__m256i)x, (__m256i)y);
#endif
  return x < y ? x : y;
}
// AVX-512 has masks for it; else what holds is -1.
template <typename Integers> ASKEW_FN Integers one_more(Integers x, MaskOf<Integers> holds) {
  if constexpr (sizeof(x) == 64) return holds ? x + 1 : x;
  return x - holds;
}

// Whether a register of a table can be shuffled by a pack of indices, of which then the lower bits count.
template <typename P> constexpr bool shuffles() {
#if defined(__x86_64__)
  return sizeof(P) == 64 || (sizeof(P) == 32 && sizeof(P{}[0]) == 4);
#else
  return false;
#endif
}
#if defined(__x86_64__)
// table[index] for a table of `count` registers.
template <int count, typename P, typename Integers> ASKEW_FN P shuffled(const Lane<P>* table, Integers index) {
  constexpr int width = lanes<P>();
  P first, second;
  std::memcpy(&first, table, sizeof first);
  if constexpr (count == 2) std::memcpy(&second, table + width, sizeof second);
  if constexpr (sizeof(P) == 32) {
    const __m256 low = _mm256_permutevar8x32_ps((__m256)first, (__m256i)index);
    if constexpr (count == 1) return (P)low;
    const __m256 high = _mm256_permutevar8x32_ps((__m256)second, (__m256i)index);
    return (P)_mm256_blendv_ps(low, high, (__m256)(index << 28));
  } else if constexpr (sizeof(first[0]) == 4) {
    if constexpr (count == 1) return (P)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, (__m512)first);
    return (P)_mm512_permutex2var_ps((__m512)first, (__m512i)index, (__m512)second);
  } else {
    if constexpr (count == 1) return (P)_mm512_maskz_permutexvar_pd(0xff, (__m512i)index, (__m512d)first);
    return (P)_mm512_permutex2var_pd((__m512d)first, (__m512i)index, (__m512d)second);
  }
}
// `high` where a bit of the index is set, else `low`.
template <int bit, typename P, typename Integers> ASKEW_FN P by_bit(Integers index, P low, P high) {
  if constexpr (sizeof(P) == 32)
    return (P)_mm256_blendv_ps((__m256)low, (__m256)high, (__m256)(index << (31 - __builtin_ctz(bit))));
  else
    return (index & bit) != 0 ? high : low;
}
#endif

// A table of one or two registers is shuffled. Of a larger one both halves are looked up and the next bit chooses, as
// long as that costs less than reading it lane by lane. Whole registers are read.
template <int capacity, typename T, typename Integers> ASKEW_FN Pack<T, lanes<Integers>()> lookup(const T* table,
                                                                                                  Integers index) {
  using P = Pack<T, lanes<Integers>()>;
  constexpr int width = lanes<P>();
#if defined(__x86_64__)
  if constexpr (shuffles<P>() && capacity <= 2 * width)
    return shuffled<(capacity > width) + 1, P>(table, index);
  else if constexpr (shuffles<P>() && (capacity <= 64 || width == 16))
    return by_bit<capacity / 2>(index, lookup<capacity / 2>(table, index),
                                lookup<capacity / 2>(table + capacity / 2, index));
#endif
  P found{};
  for (int lane = 0; lane < width; ++lane) found[lane] = table[index[lane]];
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
// Round to nearest even; every NaN becomes the quiet one that torch writes. What comes out of it are the upper halves.
template <typename Word, typename P> ASKEW_FN Word rounded_bfloat16(P x) {
  const Word bits = bits_of<Word>(x);
  const Word rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return x == x ? rounded : Word{} + 0x7fc00000;
}
template <typename Word, typename P> ASKEW_FN Word narrow_bfloat16(P x) { return rounded_bfloat16<Word>(x) >> 16; }

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

// 16 bits to the lower halves of words and back. With the instructions that x86 has for it: compilers take three to
// five.
template <typename P> ASKEW_FN Pack<uint32_t, lanes<P>()> load_halves(const void* from) {
  using Word = Pack<uint32_t, lanes<P>()>;
  Pack<uint16_t, lanes<P>()> half;
  std::memcpy(&half, from, sizeof half);
#if defined(__x86_64__)
  if constexpr (sizeof(Word) == 64) return (Word)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)half);
  if constexpr (sizeof(Word) == 32) return (Word)_mm256_cvtepu16_epi32((__m128i)half);
#endif
  return __builtin_convertvector(half, Word);
}
template <typename Word> ASKEW_FN void store_halves(void* to, Word word) {  // words below 2^16
  using Half = Pack<uint16_t, lanes<Word>()>;
  Half half;
#if defined(__x86_64__)
  if constexpr (sizeof(Word) == 64)
    half = (Half)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)word);
  else if constexpr (sizeof(Word) == 32)
    half = (Half)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)word), _mm256_extracti128_si256((__m256i)word, 1));
  else
#endif
    half = __builtin_convertvector(word, Half);
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

// Packs side by side to storage.
template <typename Storage, typename P, int count> ASKEW_FN void store_all(Storage* to, const P (&x)[count]) {
#if defined(__x86_64__) && !defined(__clang__)
  // What is stored of two packs fills a register.
  if constexpr (std::is_same_v<Storage, BFloat16> && count == 2 && sizeof(P) == 64) {
    using Half = Pack<uint16_t, 32>;
    using Word = Pack<uint32_t, 16>;
    Half upper;
    for (int k = 0; k < 32; ++k) upper[k] = static_cast<uint16_t>(2 * k + 1);
    const Half half = __builtin_shuffle((Half)rounded_bfloat16<Word>(x[0]), (Half)rounded_bfloat16<Word>(x[1]), upper);
    std::memcpy(to, &half, sizeof half);
    return;
  }
#endif
#pragma GCC unroll 4
  for (int k = 0; k < count; ++k) store(to + k * lanes<P>(), x[k]);
}

// Level indices (0 .. 255, integers or not) as bytes; by way of 16 bits, since the direct way goes lane by lane.
template <typename P> ASKEW_FN void store_codes(uint8_t* to, P index) {
  using Codes = Pack<uint8_t, lanes<P>()>;
  const auto word = __builtin_convertvector(index, Pack<int32_t, lanes<P>()>);
  Codes codes;
#if defined(__x86_64__)
  if constexpr (sizeof(word) == 64) {
    codes = (Codes)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)word);
  } else if constexpr (sizeof(word) == 32) {
    const __m128i low = _mm256_castsi256_si128((__m256i)word), high = _mm256_extracti128_si256((__m256i)word, 1);
    const __m128i both = _mm_packs_epi32(low, high);
    const __m128i bytes = _mm_packus_epi16(both, both);
    std::memcpy(&codes, &bytes, sizeof codes);
  } else
#endif
    codes = __builtin_convertvector(__builtin_convertvector(word, Pack<int16_t, lanes<P>()>), Codes);
  std::memcpy(to, &codes, sizeof codes);
}
template <typename P, int count> ASKEW_FN void store_codes(uint8_t* to, const P (&index)[count]) {
#pragma GCC unroll 4
  for (int k = 0; k < count; ++k) store_codes(to + k * lanes<P>(), index[k]);
}
// .. and back, to a pack of numbers or of integers.
template <typename P> ASKEW_FN P load_codes(const uint8_t* from) {
  Pack<uint8_t, lanes<P>()> code;
  std::memcpy(&code, from, sizeof code);
  const auto half = __builtin_convertvector(code, Pack<int16_t, lanes<P>()>);
  const auto word = __builtin_convertvector(half, Pack<int32_t, lanes<P>()>);
  return __builtin_convertvector(word, P);
}

#endif  // !__CUDACC__

}  // namespace askew
