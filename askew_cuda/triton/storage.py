"""Numbers and how they are stored, in Triton: the operations of ``csrc/maths/rounding.h``, which explains them.

Halves, remainders and random bits are words of 32 bits, of which the lower 16 count. In Triton's interpreter bfloat16
is its bits (``launch.py``, STORAGE).
"""

import triton
import triton.language as tl


@triton.jit
def bits_of(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def of_bits(word):
    return word.to(tl.float32, bitcast=True)


@triton.jit
def widen(x):
    """A number as stored, in float32."""
    if x.dtype == tl.uint16:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x in its storage type, rounded to nearest even."""
    if tl.uint16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16)
    else:
        return x.to(DTYPE)


@triton.jit
def half_of(stored):
    """The bits of 16-bit numbers."""
    if stored.dtype == tl.uint16:
        return stored.to(tl.uint32)
    else:
        return stored.to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def of_half(half, DTYPE: tl.constexpr):
    """16-bit numbers, as they are stored."""
    if tl.uint16 == DTYPE:
        return half.to(tl.uint16)
    else:
        return half.to(tl.uint16).to(DTYPE, bitcast=True)


@triton.jit
def signed(half):
    """The lower 16 bits as a signed number, in a word."""
    return ((half & 0xFFFF) ^ 0x8000) - 0x8000


@triton.jit
def exponent_of(wide):
    exponent = bits_of(wide) & 0x7F800000
    return tl.where(exponent < 0x38800000, 0x38800000, exponent)  # subnormal ones all have the same last place


@triton.jit
def split(x, DTYPE: tl.constexpr):
    """float32 numbers as 16-bit ones and int16 remainders, as they are stored."""
    if tl.float16 == DTYPE:
        stored = narrow(x, DTYPE)
        wide = widen(stored)
        units = (x - wide) * of_bits(0x7F000000 - exponent_of(wide)) * 33554432.0  # 2^25
        whole = (units + 12582912.0) - 12582912.0  # 1.5 * 2^23: to an integer, ties to even
        fits = tl.abs(units) <= 16384.0  # not of a NaN or an infinity
        return stored, tl.where(fits, whole, 0.0).to(tl.int32).to(tl.int16)
    else:
        word = bits_of(x)
        half = tl.where(x == x, (word + 0x8000) >> 16, 0x7FC0)
        remainder = tl.where(x == x, word & 0xFFFF, 0).to(tl.uint16)
        return of_half(half, DTYPE), remainder.to(tl.int16, bitcast=True)


@triton.jit
def join(stored, remainder, DTYPE: tl.constexpr):
    """The float32 numbers that were split."""
    if tl.float16 == DTYPE:
        wide = widen(stored)
        return wide + remainder.to(tl.float32) * (of_bits(exponent_of(wide)) * 2.9802322387695312e-08)  # 2^-25
    else:
        return of_bits((half_of(stored) << 16) + remainder.to(tl.int32).to(tl.uint32, bitcast=True))


@triton.jit
def make_key(seed, stream, ROUNDING: tl.constexpr):
    """Two words that random bits depend on, beside the element's number: a step of splitmix64."""
    if ROUNDING == "stochastic":
        if seed[0].dtype.is_ptr():
            x = tl.load(seed[0]).to(tl.uint64)
        else:
            x = seed[0].to(tl.uint64) + (seed[1].to(tl.uint64) << 21) + (seed[2].to(tl.uint64) << 42)
        x = x + 0x9E3779B97F4A7C15 * (stream + 1).to(tl.uint64)
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB
        x = x ^ (x >> 31)
        return (x & 0xFFFFFFFF).to(tl.uint32), (x >> 32).to(tl.uint32)
    else:
        return 0, 0


@triton.jit
def mix(x):
    """A bijection of 32 bits."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_bits(key, element):
    """32 random bits for each element number."""
    low, high = (element & 0xFFFFFFFF).to(tl.uint32), (element >> 32).to(tl.uint32)
    return mix(mix(low + key[0]) ^ (high * 0x9E3779B9 + key[1]))


@triton.jit
def stochastic(x, random, DTYPE: tl.constexpr):
    """The nearest 16-bit number, as it is stored, or its neighbour on the other side of x."""
    half = half_of(narrow(x, DTYPE))
    wide = widen(of_half(half, DTYPE))
    off = x - wide
    sign = (bits_of(off) >> 16) & 0x8000
    away = tl.where((half & 0x8000) == sign, half + 1, half - 1)
    neighbour = tl.where((half & 0x7FFF) == 0, sign | 1, away)
    gap = tl.abs(widen(of_half(neighbour, DTYPE)) - wide)
    chance = (random >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    return of_half(tl.where(chance * gap < tl.abs(off), neighbour, half), DTYPE)
