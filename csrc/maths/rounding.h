// How a float32 result becomes a 16-bit weight when rounding to nearest would lose it: with a remainder of 16 bits
// beside the weight, or up or down by chance. askew_cuda/rounding.py states the same in PyTorch.
//
// P is float or a pack of it, Word uint32_t or a pack of that. A half is a word whose lower 16 bits are the weight's.
#pragma once

#include "pack.h"

namespace askew {

enum class Rounding : int32_t { nearest, remainder, stochastic };

template <typename Storage> struct Halves;
template <> struct Halves<BFloat16> {
  template <typename P, typename Word> static ASKEW_FN P widen(Word half) { return widen_bfloat16<P>(half); }
  template <typename Word, typename P> static ASKEW_FN Word narrow(P x) { return narrow_bfloat16<Word>(x); }
};
template <> struct Halves<Float16> {
  template <typename P, typename Word> static ASKEW_FN P widen(Word half) { return widen_float16<P>(half); }
  template <typename Word, typename P> static ASKEW_FN Word narrow(P x) { return narrow_float16<Word>(x); }
};

template <typename Word> struct Split {
  Word half, remainder;  // of the remainder the lower 16 bits count
};

// bfloat16: the upper half of the float32, rounded, with ties away from zero; and the lower half, whose sign tells
// which way the upper one was rounded. Both together are the float32, exactly.
template <typename Word, typename P> ASKEW_FN Split<Word> split(P x, BFloat16) {
  const Word bits = bits_of<Word>(x);
  return {x == x ? (bits + 0x8000) >> 16 : Word{} + 0x7fc0, x == x ? bits : Word{}};
}
template <typename P, typename Word> ASKEW_FN P join(Word half, Word remainder, BFloat16) {
  return of_bits<P>((half << 16) + (((remainder & 0xffff) ^ 0x8000) - 0x8000));
}

// float16: the nearest one, and how far x is from it, in units of 2^-15 of its last place. Exact from 2^-16 on, within
// 2^-40 below.
template <typename P, typename Word> ASKEW_FN Word exponent_of(P wide) {
  const Word exponent = bits_of<Word>(wide) & 0x7f800000;
  return exponent < 0x38800000 ? Word{} + 0x38800000 : exponent;  // subnormal ones all have the same last place
}
template <typename Word, typename P> ASKEW_FN Split<Word> split(P x, Float16) {
  const Word half = narrow_float16<Word>(x);
  const P wide = widen_float16<P>(half);
  const P units = (x - wide) * of_bits<P>(0x7f000000 - exponent_of<P, Word>(wide)) * 0x1p25f;
  const P whole = (units + 0x1.8p23f) - 0x1.8p23f;
  return {half, abs(units) <= 0x1p14f ? to_word(whole) : Word{}};  // not of a NaN or an infinity
}
template <typename P, typename Word> ASKEW_FN P join(Word half, Word remainder, Float16) {
  const P wide = widen_float16<P>(half);
  const P units = of_word(((remainder & 0xffff) ^ 0x8000) - 0x8000);
  return wide + units * (of_bits<P>(exponent_of<P, Word>(wide)) * 0x1p-25f);
}

// Random bits by counting: those of a weight's element depend on the key and on its number alone.
struct Key {
  uint32_t low, high;
};
ASKEW_FN Key make_key(uint64_t seed, uint64_t stream) {  // a step of splitmix64 (Steele, Lea, Flood, 2014)
  uint64_t x = seed + 0x9e3779b97f4a7c15u * (stream + 1);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  x = x ^ (x >> 31);
  return {static_cast<uint32_t>(x), static_cast<uint32_t>(x >> 32)};
}
template <typename Word> ASKEW_FN Word mix(Word x) {  // a bijection of 32 bits (lowbias32, Wellons)
  x = (x ^ (x >> 16)) * 0x7feb352d;
  x = (x ^ (x >> 15)) * 0x846ca68b;
  return x ^ (x >> 16);
}
template <typename Word> ASKEW_FN Word random_bits(Key key, Word low, Word high) {  // of element high * 2^32 + low
  return mix(mix(low + key.low) ^ (high * 0x9e3779b9 + key.high));
}

// The nearest 16-bit number, or its neighbour on the other side of x: with such chances that the mean is x.
template <typename Storage, typename Word, typename P> ASKEW_FN Word stochastic(P x, Word random) {
  using H = Halves<Storage>;
  const Word half = H::template narrow<Word>(x);
  const P wide = H::template widen<P>(half);
  const P off = x - wide;
  const Word sign = (bits_of<Word>(off) >> 16) & 0x8000;
  const Word away = ((half & 0x8000) == sign ? Word{} + 1 : Word{} - 1);
  const Word neighbour = (half & 0x7fff) == 0 ? sign | 1 : half + away;
  const P gap = abs(H::template widen<P>(neighbour) - wide);
  const P chance = of_word(random >> 8) * 0x1p-24f;
  return chance * gap < abs(off) ? neighbour : half;
}

}  // namespace askew
