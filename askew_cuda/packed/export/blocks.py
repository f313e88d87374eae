"""Blocks of GGUF files: weights that share a scale, as digits. Written from codes as they were trained, and read back;
nothing is ever rounded here.

A block type stands for ``d (step q + first)``, or ``d q + m`` where its blocks have a shift m of their own; q is a
digit, d and m are float16 numbers. Which digit stands for which level follows from the codebook: see
:func:`digits_for`.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class BlockType(NamedTuple):
    """A block type of ggml."""

    name: str
    number: int  # in files
    weights: int  # of a block
    first: int | None  # what digit 0 stands for, in units of d; None: blocks have a shift
    step: int  # from digit to digit, in units of d
    base: int  # of the digits in a byte
    grid: tuple[int, int, int] | None  # the block's weights as (.., places of a byte, ..); None: those of TQ1_0
    layout: str  # of a block's bytes: d, m; n: -m; q: digits; s: a scale and a shift of 4 bits for 16 weights, 1 here

    @property
    def size(self) -> int:
        """Bytes of a block."""
        return sum(_sizes(self))

    @property
    def digits(self) -> int:
        """How many there are."""
        return 3 if self.number in (34, 35) else self.base


class Blocks(NamedTuple):
    """Weights of one block type, in order."""

    digits: Tensor  # (blocks, weights) uint8
    d: Tensor  # (blocks, 1) float16
    m: Tensor | None  # the same, where there is a shift


class Digits(NamedTuple):
    """How a block type holds a codebook."""

    of_code: Tensor  # (K,) uint8
    factor: float  # d is the scale times this
    shift: float | None  # m is the scale times this


TYPES = {
    kind.name: kind
    for kind in (  # smallest first
        BlockType("Q1_0", 41, 128, -1, 2, 2, (16, 8, 1), "dq"),
        BlockType("TQ1_0", 34, 256, -1, 1, 3, None, "qd"),
        BlockType("TQ2_0", 35, 256, -1, 1, 4, (2, 4, 32), "qd"),
        BlockType("Q2_0", 42, 64, -1, 1, 4, (16, 4, 1), "dq"),
        BlockType("Q2_K", 10, 256, None, 1, 4, (2, 4, 32), "sqdn"),
        BlockType("Q4_0", 2, 32, -8, 1, 16, (1, 2, 16), "dq"),
        BlockType("Q4_1", 3, 32, None, 1, 16, (1, 2, 16), "dmq"),
        BlockType("Q8_0", 8, 32, -128, 1, 256, (32, 1, 1), "dq"),
    )
}
_TERNARY = ((160, 5, 32), (80, 5, 16), (16, 4, 4))  # parts of TQ1_0: weights, places of a byte, bytes
_ONES = 0x11  # a scale and a shift of 1


def digits_for(kind: BlockType, levels: Sequence[float]) -> Digits | None:
    """The digit of each level, where all of them lie on the grid of the block type; None where they don't.

    >>> digits_for(TYPES["Q4_0"], (-8, 0, 7))
    Digits(of_code=tensor([ 0,  8, 15], dtype=torch.uint8), factor=1.0, shift=None)
    >>> digits_for(TYPES["Q4_1"], (-1.5, -0.5, 0.5, 1.5))
    Digits(of_code=tensor([0, 1, 2, 3], dtype=torch.uint8), factor=1.0, shift=-1.5)
    """
    return level_digits(levels, kind.first, kind.step, kind.digits)


def level_digits(levels: Sequence[float], first: int | None, step: int, count: int) -> Digits | None:
    """The same for ``count`` digits, the lowest of which stands for ``first`` units, or, None, for the lowest level."""
    gaps = {upper - lower for lower, upper in itertools.pairwise(levels)}
    powers = {2.0**power for power in range(-8, 8)}
    for factor in sorted(powers | {min(gaps), *(abs(level) for level in levels if level)}, reverse=True):
        lowest = levels[0] / factor if first is None else first
        found = [(level / factor - lowest) / step for level in levels]
        if all(digit == math.floor(digit) and 0 <= digit < count for digit in found):
            return Digits(torch.tensor(found, dtype=torch.uint8), factor, levels[0] if first is None else None)
    return None


def values(kind: BlockType, blocks: Blocks) -> Tensor:
    """What blocks stand for, as every reader of them computes it: (blocks, weights) float32."""
    if blocks.m is not None:
        return blocks.d.float() * blocks.digits + blocks.m.float()
    assert kind.first is not None
    return blocks.d.float() * (blocks.digits.float() * kind.step + kind.first)


def written_blocks(kind: BlockType, blocks: Blocks) -> Tensor:
    """(blocks, size) uint8."""
    count = len(blocks.digits)
    m = torch.zeros_like(blocks.d) if blocks.m is None else blocks.m
    parts = {"d": blocks.d, "m": m, "n": -m}
    parts = {key: part.contiguous().view(torch.uint8) for key, part in parts.items()}
    parts["s"] = torch.full((count, 16), _ONES, dtype=torch.uint8)
    parts["q"] = _written_ternary(blocks.digits) if kind.grid is None else _written_digits(kind, blocks.digits)
    return torch.cat([parts[key] for key in kind.layout], 1)


def read_blocks(kind: BlockType, raw: Tensor) -> Blocks:
    """From (blocks, size) uint8.

    Raises: ValueError: a digit is none of the type's, or 16 weights in a block have a scale of their own.
    """
    parts = dict(zip(kind.layout, raw.split(_sizes(kind), 1), strict=True))
    if "s" in parts and bool((parts["s"] != _ONES).any()):
        raise ValueError(f"blocks of {kind.name} in which 16 weights have a scale of their own, which is no codebook's")
    d, m, n = (parts[key].contiguous().view(torch.float16) if key in parts else None for key in "dmn")
    digits = _read_ternary(parts["q"]) if kind.grid is None else _read_digits(kind, parts["q"])
    if kind.digits < kind.base and digits.numel() and int(digits.max()) >= kind.digits:
        raise ValueError(f"a digit of {kind.name} is {int(digits.max())}; at most {kind.digits - 1} is needed")
    assert d is not None
    return Blocks(digits, d, -n if n is not None else m)


def _sizes(kind: BlockType) -> list[int]:
    """Bytes of each part of a block, as its layout has them."""
    digits = 52 if kind.grid is None else kind.grid[0] * kind.grid[2]
    return [{"q": digits, "s": 16}.get(key, 2) for key in kind.layout]


def _places(base: int, count: int) -> Tensor:
    return torch.tensor([base**k for k in range(count)], dtype=torch.uint8).unsqueeze(1)


def _written_digits(kind: BlockType, digits: Tensor) -> Tensor:
    assert kind.grid is not None
    if kind.base == 256:
        return digits ^ 0x80  # two's complement
    return (digits.view(-1, *kind.grid) * _places(kind.base, kind.grid[1])).sum(2, dtype=torch.uint8).flatten(1)


def _read_digits(kind: BlockType, packed: Tensor) -> Tensor:
    assert kind.grid is not None
    if kind.base == 256:
        return packed ^ 0x80
    outer, places, inner = kind.grid
    packed = packed.reshape(-1, outer, 1, inner)
    return ((packed // _places(kind.base, places)) % kind.base).flatten(1)


def _written_ternary(digits: Tensor) -> Tensor:
    """Five digits to a byte, as a fraction of 243 in 256ths, the first one highest: digits come out by multiplying."""
    packed = []
    for part, (_, places, count) in zip(digits.split([each[0] for each in _TERNARY], 1), _TERNARY, strict=True):
        whole = (part.reshape(-1, places, count) * _places(3, 5).flip(0)[:places]).sum(1, dtype=torch.int32)
        packed.append(((whole * 256 + 242) // 243).to(torch.uint8))
    return torch.cat(packed, 1)


def _read_ternary(packed: Tensor) -> Tensor:
    digits = []
    for part, (_, places, count) in zip(packed.split([each[2] for each in _TERNARY], 1), _TERNARY, strict=True):
        fractions = part.reshape(-1, 1, count) * _places(3, places)  # modulo 256
        digits.append((fractions.int() * 3 // 256).to(torch.uint8).reshape(-1, places * count))
    return torch.cat(digits, 1)
