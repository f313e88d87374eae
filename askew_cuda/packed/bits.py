"""Codes to bytes and back, and codes to weights: what packed files and packed layers share.

A byte holds its codes as digits, the first code in the lowest place: base 2, 4, 16 and 256 are 1, 2, 4 and 8 bits,
little end first; base 3 puts five ternary codes into a byte (3^5 = 243), 1.6 bits each, where log2(3) = 1.585 is the
least possible. Codes are in logical row-major order, whatever the memory format of the weight; the last byte is filled
up with zeros.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends, look, reference


class Packing(NamedTuple):
    """The base of the digits, and how many of them a byte holds."""

    base: int
    per_byte: int


# By bits per weight.
PACKINGS = {1: Packing(2, 8), 1.6: Packing(3, 5), 2: Packing(4, 4), 4: Packing(16, 2), 8: Packing(256, 1)}
_AT_ONCE = 2**20  # bytes
TERNARY = {"1.6bit": 1.6, "2bit": 2}


def width(levels: int, ternary: str = "1.6bit") -> float:
    """Bits per weight for a codebook of 2 to 256 levels: the smallest of 1, 2, 4, 8 that holds them; three levels as
    ``ternary`` says.

    Raises:
        ValueError: ``ternary`` is neither "1.6bit" nor "2bit".

    >>> [width(levels) for levels in (2, 3, 4, 5, 16, 17, 256)]
    [1, 1.6, 2, 4, 4, 8, 8]
    """
    if ternary not in TERNARY:
        raise ValueError(f"ternary = {ternary!r}; '1.6bit' (five codes to a byte) or '2bit' is needed")
    return TERNARY[ternary] if levels == 3 else next(bits for bits in (1, 2, 4, 8) if 2**bits >= levels)


def packed_size(numel: int, bits: float) -> int:
    """Bytes that ``numel`` codes take.

    >>> packed_size(6, 1.6)
    2
    """
    return -(-numel // PACKINGS[bits].per_byte)


def pack(codes: Tensor, bits: float) -> Tensor:
    """Codes as bytes.

    Args:
        codes: (...), uint8, each below the base of ``bits``; any memory format. Not mutated.
        bits: 1, 1.6, 2, 4 or 8 per code.

    Returns:
        (packed_size,), uint8, on the codes' device.

    >>> pack(torch.tensor([1, 0, 2], dtype=torch.uint8), 2).tolist()  # 1 + 0 * 4 + 2 * 16
    [33]
    """
    base, per_byte = PACKINGS[bits]
    flat = codes.reshape(-1)
    if per_byte == 1:
        return flat.clone()
    digits = flat.new_zeros(packed_size(len(flat), bits) * per_byte)
    digits[: len(flat)] = flat
    digits = digits.reshape(-1, per_byte)
    packed = digits[:, -1].clone()
    for place in reversed(range(per_byte - 1)):
        packed.mul_(base).add_(digits[:, place])
    return packed


def unpack(packed: Tensor, bits: float, numel: int) -> Tensor:
    """The first ``numel`` codes of (bytes,) uint8: (numel,) uint8. Inverse of :func:`pack`.

    >>> unpack(torch.tensor([33], dtype=torch.uint8), 2, 3).tolist()
    [1, 0, 2]
    """
    return _digits(packed, bits)[:numel]


def unpack_at(packed: Tensor, bits: float, positions: Tensor) -> Tensor:
    """The codes at some positions only: (...) int64, each in [0, numel), to (...) uint8."""
    base, per_byte = PACKINGS[bits]
    if per_byte == 1:
        return packed[positions]
    place = _places_of(base, per_byte, packed.device)[positions % per_byte]
    found = packed[positions // per_byte]
    if torch.compiler.is_exporting():  # as in _digits
        return ((found.int() // place.int()) % base).to(torch.uint8)
    return (found // place) % base


def fault(packed: Tensor, bits: float, numel: int, levels: int) -> str | None:
    """What is wrong with packed codes, in words; None where nothing is: :func:`pack` may have made them of codes below
    ``levels``.
    """
    base, per_byte = PACKINGS[bits]
    if not packed.numel():
        return None
    most = base**per_byte
    if most < 256 and int(packed.max()) >= most:
        return f"a byte is {int(packed.max())}; five ternary codes make at most {most - 1}"
    last = _digits(packed[-1:], bits)
    rest = numel - (len(packed) - 1) * per_byte  # codes in the last byte
    if levels < base:
        largest = _digits(torch.arange(256, dtype=torch.uint8, device=packed.device), bits).view(-1, per_byte).amax(1)
        whole = (largest[part.int()].max() for part in packed[:-1].split(_AT_ONCE) if part.numel())
        found = max((int(each) for each in (*whole, last[:rest].max())), default=0)
        if found >= levels:
            return f"a code is {found}; codes below {levels}, the number of levels, are needed"
    if last[rest:].any():
        return "the last byte is not filled up with zeros"
    return None


def restore(codes: Tensor, scale: Tensor, levels: Sequence[float], dtype: torch.dtype) -> Tensor:
    """The weights that codes stand for, bitwise what ``look.snap`` gives: scale * level, rounded once more to
    ``dtype``.

    Args:
        codes: (...), uint8, each below K. Not mutated.
        scale: of a shape that :func:`askew_cuda.reference.spread` takes, of the arithmetic type; weight units per level
            unit.
        levels: K strictly increasing float32 numbers; level units.
        dtype: of the weights.

    >>> restore(torch.tensor([0, 2], dtype=torch.uint8), torch.tensor(0.5), (-1, 0, 1), torch.float32)
    tensor([-0.5000,  0.5000])
    """
    if codes.numel() == 0:  # scales of nothing may not broadcast
        return torch.empty(codes.shape, dtype=dtype, device=codes.device)
    spread = reference.spread(scale, codes)
    if reference.UniformCodebook.fits(levels):  # as its tensors compute it, with numbers: nothing is sent to a device
        unit = levels[1] - levels[0]
        return (spread * unit * (codes.to(scale.dtype) + levels[0] / unit)).to(dtype)
    table = _level_table if torch.compiler.is_compiling() else _kept_level_table
    return (spread * table(tuple(levels), scale.dtype, scale.device)[codes.long()]).to(dtype)


def _level_table(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(levels, dtype=dtype, device=device)


_kept_level_table = functools.lru_cache(maxsize=64)(_level_table)  # sending it there waits for the device


def restore_(weight: Tensor, packed: Tensor, bits: float, scale: Tensor, levels: Sequence[float]) -> None:
    """Overwrites a weight by what packed codes stand for, as :func:`restore` says: in one pass, where there are
    compiled kernels for the codes' device.

    Args:
        weight: (...), of any dtype, device and memory format. Mutated.
        packed: (packed_size,), uint8, codes of its weights in logical order, each below K; on the CPU or its device.
        scale, levels: as for :func:`restore`; the scale where the codes are.
    """
    there = weight.detach()
    base, per_byte = PACKINGS[bits]
    real = type(packed) is Tensor and torch._C._len_torch_dispatch_stack() == 0 and not torch.compiler.is_compiling()
    if not (real and weight.numel() and backends.has_operators(packed.device)):
        codes = unpack(packed, bits, weight.numel()).reshape(weight.shape)
        there.copy_(restore(codes, scale, levels, weight.dtype))
        return
    plain = there.device == packed.device and there.is_contiguous() and type(weight.data) is Tensor
    laid = look.runs(there if plain else torch.empty(there.shape, dtype=there.dtype, device=packed.device), scale)
    torch.ops.askew_cuda.restore_(laid.weight, packed, base, per_byte, laid.scale, laid.run, levels)
    if not plain:
        there.copy_(laid.weight.view(there.shape))


def _digits(packed: Tensor, bits: float) -> Tensor:
    """All digits, those of the padding included: (bytes * per_byte,) uint8."""
    base, per_byte = PACKINGS[bits]
    if per_byte == 1:
        return packed
    places = _places_of(base, per_byte, packed.device)
    if torch.compiler.is_exporting():  # ONNX has no shift that torch's exporter knows, and runtimes divide int32
        return ((packed.unsqueeze(1).int() // places.int()) % base).to(torch.uint8).reshape(-1)
    if base == 3:
        return (packed.unsqueeze(1) // places).remainder_(base).reshape(-1)
    # the same digits, without a division
    shifts = torch.arange(per_byte, dtype=torch.uint8, device=packed.device) * int(bits)
    return (packed.unsqueeze(1) >> shifts).bitwise_and_(base - 1).reshape(-1)


def _places_of(base: int, count: int, device: torch.device) -> Tensor:
    """What a digit counts in each place of a byte: (count,) uint8, made on the device."""
    made: Tensor = base ** torch.arange(count, dtype=torch.uint8, device=device)
    return made
