"""How a float32 result becomes a 16-bit weight where rounding to nearest would lose it: ``csrc/maths/rounding.h`` in
PyTorch.

Rounding to nearest lets a weight stand still whose step is below half of its last place. A *remainder* of 16 bits
beside the weight keeps what is rounded off; *stochastic* rounding goes up or down by chances whose mean is the result.
Words of 32 bits are int64 here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Number = float | Tensor  # a tensor of one element

WORD = 0xFFFFFFFF


def bits_of(x: Tensor) -> Tensor:
    """The bits of float32 numbers."""
    return x.contiguous().view(torch.int32).long() & WORD


def of_bits(word: Tensor) -> Tensor:
    return (((word & WORD) ^ 0x80000000) - 0x80000000).to(torch.int32).view(torch.float32)


def signed(half: Tensor) -> Tensor:
    """The lower 16 bits as a signed number."""
    return ((half & 0xFFFF) ^ 0x8000) - 0x8000


def _weight(half: Tensor, dtype: torch.dtype) -> Tensor:
    return signed(half).to(torch.int16).view(dtype)


def _exponent(wide: Tensor) -> Tensor:
    return (bits_of(wide) & 0x7F800000).clamp(min=0x38800000)  # subnormal float16 numbers all have the same last place


def split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float32 numbers as 16-bit weights and int16 remainders.

    bfloat16: the upper half, rounded, ties away from zero, and the lower half; both together are the number, exactly.
    float16: the nearest, and how far it is in units of 2^-15 of its last place: exact from 2^-16 on, within 2^-40
    below.
    """
    if dtype == torch.bfloat16:
        bits = bits_of(x)
        half = torch.where(x.isnan(), 0x7FC0, (bits + 0x8000) >> 16)
        return _weight(half, dtype), signed(torch.where(x.isnan(), 0, bits)).to(torch.int16)
    weight = x.to(dtype)
    wide = weight.float()
    units = (x - wide) * of_bits(0x7F000000 - _exponent(wide)) * 2.0**25
    return weight, torch.where(units.abs() <= 2.0**14, units.round(), 0).to(torch.int16)


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """The float32 numbers that :func:`split` took apart."""
    if weight.dtype == torch.bfloat16:
        return of_bits((weight.contiguous().view(torch.int16).long() << 16) + remainder.long())
    wide = weight.float()
    return wide + remainder.float() * (of_bits(_exponent(wide)) * 2.0**-25)


class Key(NamedTuple):
    """What random bits depend on, beside the element's number: two words, 0-d."""

    low: Tensor
    high: Tensor


def make_key(seed: Tensor | int, stream: int) -> Key:
    """A step of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014). Its words of
    64 bits are int64, which wraps; a seed that is a tensor stays on its device.
    """
    x = seed.reshape(()).long() if isinstance(seed, Tensor) else torch.tensor(seed, dtype=torch.int64, device="cpu")
    x = x + torch.full_like(x, stream + 1) * _signed64(0x9E3779B97F4A7C15)
    x = (x ^ _shifted64(x, 30)) * _signed64(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted64(x, 27)) * _signed64(0x94D049BB133111EB)
    x = x ^ _shifted64(x, 31)
    return Key(x & WORD, _shifted64(x, 32))


def _signed64(word: int) -> int:
    return (word ^ 2**63) - 2**63


def _shifted64(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32 bits (lowbias32, Wellons)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & WORD
    return x ^ (x >> 16)


def random_bits(key: Key, element: Tensor) -> Tensor:
    """32 random bits for each element number, int64."""
    low, high = element & WORD, element >> 32
    return _mix(_mix((low + key.low) & WORD) ^ ((high * 0x9E3779B9 + key.high) & WORD))


def stochastic(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """The nearest 16-bit number, or its neighbour on the other side of x: with such chances that the mean is x."""
    nearest = x.to(dtype)
    wide, half = nearest.float(), nearest.view(torch.int16).long() & 0xFFFF
    off = x - wide
    sign = (bits_of(off) >> 16) & 0x8000
    away = torch.where((half & 0x8000) == sign, 1, -1)
    neighbour = _weight(torch.where((half & 0x7FFF) == 0, sign | 1, half + away), dtype)
    gap = (neighbour.float() - wide).abs()
    chance = (random >> 8).float() * 2.0**-24
    return torch.where(chance * gap < off.abs(), neighbour, nearest)


def elements_of(weight: Tensor, first: int) -> Tensor:
    """The number of each element, in logical order."""
    return torch.arange(first, first + weight.numel(), device=weight.device).reshape(weight.shape)


class Storage(NamedTuple):
    """How a call writes: weights to nearest; with remainders; or, with a seed, stochastically. And whether it does:
    where ``found_inf`` is a tensor other than 0, everything gets the value that it has.
    """

    remainders: Sequence[Tensor]
    seed: Tensor | int | None
    streams: Sequence[int]
    first_elements: Sequence[int]
    found_inf: Number | None

    @property
    def is_closed(self) -> bool:
        """Whether the host knows that nothing is written."""
        return self.found_inf is not None and not isinstance(self.found_inf, Tensor) and self.found_inf != 0

    def load(self, i: int, weight: Tensor) -> Tensor:
        """The weight in the arithmetic type."""
        if self.remainders:
            return join(weight, self.remainders[i])
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    def dtype(self, weight: Tensor) -> torch.dtype:
        """As which the weight is as exact as it is stored."""
        return torch.float32 if self.remainders else weight.dtype

    def write(self, kept: Tensor, value: Tensor) -> None:
        """To nearest."""
        value = value.to(kept.device, kept.dtype)
        if isinstance(self.found_inf, Tensor):
            value = torch.where(self.found_inf.reshape(()).to(kept.device) != 0, kept, value)
        # Views, since torch.compile (2.11, 2.13) loses what is written to a 0-d float64 tensor itself.
        kept[None].copy_(value[None])

    def store(self, i: int, weight: Tensor, moved: Tensor) -> None:
        """The weight from the arithmetic type."""
        if self.remainders:
            moved, remainder = split(moved, weight.dtype)
            self.write(self.remainders[i], remainder)
        elif self.seed is not None:
            key = make_key(self.seed, self.streams[i] if self.streams else 0)
            elements = elements_of(weight, self.first_elements[i] if self.first_elements else 0)
            moved = stochastic(moved, weight.dtype, random_bits(key, elements))
        self.write(weight, moved)
