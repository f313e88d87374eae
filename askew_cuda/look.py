"""Weights beside their levels: codes, plain or packed, snapped weights, and what reports count. By the compiled kernels
where there are some for the weight's device, in one pass and without a copy of the weights; else in PyTorch, a part of
the weights at a time. Results are the same.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, fit, reference, summation


class Runs(NamedTuple):
    """A weight in memory order, and its scales: weight i has ``scale[i // run % len(scale)]``."""

    weight: Tensor  # (numel,), a view of the weight where its memory has no holes
    scale: Tensor  # (scales,)
    run: int
    order: tuple[int, ...] | None  # of the weight's dimensions in memory; None: the weight had to be copied


def runs(weight: Tensor, scale: Tensor) -> Runs:
    """The weight as kernels take it."""
    w = weight.detach()
    order = tuple(sorted(range(w.dim()), key=lambda dim: (-w.stride()[dim], dim)))
    inside: tuple[int, ...] | None = order if w.permute(order).is_contiguous() else None
    laid = w.permute(order) if inside is not None else w.contiguous()
    scale = scale.detach()
    if scale.numel() == 1 or w.numel() == 0:
        return Runs(laid.view(-1), scale.reshape(-1), max(1, w.numel()), inside)
    logical = tuple(range(w.dim()))
    if not reference.is_scale_shape(scale.shape, w.shape):
        reference.spread(scale, w)  # says so
    if scale.dim() != w.dim():  # (rows, groups)
        if inside in (None, logical):
            return Runs(laid.view(-1), scale.reshape(-1), w.numel() // scale.numel(), inside)
    else:
        counts = [scale.shape[dim] for dim in (order if inside is not None else logical)]
        run = _run(counts, list(laid.shape))
        if run:
            flat = (scale.permute(order) if inside is not None else scale).reshape(-1)
            return Runs(laid.view(-1), flat, run, inside)
    each = reference.spread(scale, w).expand(w.shape)
    each = each.permute(order) if inside is not None else each
    return Runs(laid.view(-1), each.reshape(-1), 1, inside)


def _run(counts: list[int], sizes: list[int]) -> int:
    """How many weights side by side share a scale, where scales of so many per dimension follow each other in memory
    again and again; 0 where they don't.
    """
    varying = [dim for dim, count in enumerate(counts) if count > 1]
    first, last = varying[0], varying[-1]
    if any(counts[dim] != sizes[dim] for dim in range(first, last)):
        return 0
    return sizes[last] // counts[last] * math.prod(sizes[last + 1 :])


def non_finite(tensor: Tensor) -> Tensor:
    """How many of its numbers are NaN or infinite: (), int64, on its device, for which nothing waits. A part at a time:
    torch.isfinite takes twice the tensor's memory.
    """
    flat = runs(tensor, tensor.new_ones(())).weight
    counts = [torch.count_nonzero(part * 0) for part in flat.split(2**18)]  # times 0 they are NaN
    return torch.stack(counts).sum()


def rms(tensor: Tensor) -> float:
    """Root of the mean square, of numbers whose squares fit float32; a part at a time, as above, to some six digits."""
    flat = runs(tensor, tensor.new_ones(())).weight
    parts = (part.to(reference.arithmetic(part.dtype)) for part in flat.split(2**18))
    return math.sqrt(math.fsum(float(torch.dot(part, part)) for part in parts) / len(flat))


def outside(weight: Tensor, scale: Tensor, low: float, high: float) -> int:
    """How many weights lie below ``scale * low`` or above ``scale * high``."""
    laid, found, at_once = runs(weight, scale), 0, 2**18
    pieces: Iterator[tuple[Tensor, Tensor]] = _parts(laid)
    if len(laid.scale) == 1:
        pieces = ((part, laid.scale) for part in laid.weight.split(at_once))
    elif 64 <= laid.run <= at_once and laid.run * len(laid.scale) == len(laid.weight):
        rows, each = laid.weight.view(-1, laid.run), laid.scale.unsqueeze(1)
        pieces = zip(rows.split(at_once // laid.run), each.split(at_once // laid.run), strict=True)
    for part, each in pieces:
        found += int(torch.count_nonzero((part < each * low) | (part > each * high)))
    return found


def _parts(laid: Runs) -> Iterator[tuple[Tensor, Tensor]]:
    """(weights, the scale of each) a part at a time."""
    step = fit.AT_ONCE // summation.CHUNK * summation.CHUNK
    for first in range(0, len(laid.weight), step):
        part = laid.weight[first : first + step]
        index = torch.arange(first, first + len(part), device=part.device) // laid.run % len(laid.scale)
        yield part, laid.scale[index]


class _Place:
    """Weights with a scale each: (E6)."""

    def __init__(self, weight: Tensor, scale: Tensor, levels: Sequence[float]):
        self.w = weight.to(reference.arithmetic(weight.dtype))
        self.book = reference.codebook(levels, self.w)
        self.unit = scale * self.book.unit
        self.index = self.book.nearest(self.w * self.unit.reciprocal())
        self.level = (self.unit * self.book.level(self.index)).to(weight.dtype)

    def snapped(self, dtype: torch.dtype) -> Tensor:
        return torch.where(self.w.isnan(), self.w, self.level.to(self.w.dtype)).to(dtype)

    def distance(self) -> Tensor:
        e = self.level.to(self.w.dtype) - self.w
        return e.abs() / (self.unit * self.book.gap(self.index, e))


def _in_shape(flat: Tensor, weight: Tensor, laid: Runs) -> Tensor:
    """What was found for each weight, in the weight's shape and memory order."""
    if laid.order is None:
        return flat.view(weight.shape)
    inverse = [laid.order.index(dim) for dim in range(weight.dim())]
    return flat.view([weight.shape[dim] for dim in laid.order]).permute(inverse)


def codes(weight: Tensor, scale: Tensor, levels: Sequence[float]) -> Tensor:
    """Index of each weight's nearest level, uint8, as the weight; a tie goes to the lower level, NaN to 0.

    Args:
        weight: (...), float32, float64, bfloat16 or float16.
        scale: of a shape that :func:`askew_cuda.reference.spread` takes, of the arithmetic type, > 0; weight units per
            level unit.
        levels: K strictly increasing float32 numbers, 2 <= K <= 256; level units.
    """
    laid = runs(weight, scale)
    if backends.has_operators(weight.device):
        flat = torch.ops.askew_cuda.codes(laid.weight, laid.scale, laid.run, levels, 256, 1)
    else:
        flat = torch.empty_like(laid.weight, dtype=torch.uint8)
        _fill(flat, (_Place(part, each, levels).index for part, each in _parts(laid)))
    return _in_shape(flat, weight, laid)


def packed_codes(weight: Tensor, scale: Tensor, levels: Sequence[float], base: int, per_byte: int) -> Tensor | None:
    """The codes in logical order as digits of ``base``, ``per_byte`` to a byte, (bytes,) uint8; None where there is no
    kernel that packs.
    """
    if not backends.has_operators(weight.device):
        return None
    laid = runs(weight.detach().contiguous(), scale)
    packed: Tensor = torch.ops.askew_cuda.codes(laid.weight, laid.scale, laid.run, levels, base, per_byte)
    return packed


def snap(weight: Tensor, scale: Tensor, levels: Sequence[float]) -> Tensor:
    """Each weight's nearest ``scale * level``, in the weight's dtype; NaN stays NaN. Arguments and ties as for
    :func:`codes`.
    """
    laid = runs(weight, scale)
    if backends.has_operators(weight.device):
        flat = torch.ops.askew_cuda.snap(laid.weight, laid.scale, laid.run, levels)
    else:
        flat = torch.empty_like(laid.weight)
        _fill(flat, (_Place(part, each, levels).snapped(part.dtype) for part, each in _parts(laid)))
    return _in_shape(flat, weight, laid)


def snapping(weight: Tensor, scale: Tensor, levels: Sequence[float]) -> Callable[[], object]:
    """A call that does the same in place; all that may lack memory is done before it."""
    laid = runs(weight, scale)
    if laid.order is not None and backends.has_operators(weight.device):
        return functools.partial(torch.ops.askew_cuda.snap_, laid.weight, laid.scale, laid.run, levels)
    return functools.partial(weight.detach().copy_, snap(weight, scale, levels))


def snap_(weight: Tensor, scale: Tensor, levels: Sequence[float]) -> None:
    """The same in place, now."""
    snapping(weight, scale, levels)()


def _fill(flat: Tensor, parts: Iterator[Tensor]) -> None:
    first = 0
    for part in parts:
        flat[first : first + len(part)] = part
        first += len(part)


def distance(weight: Tensor, scale: Tensor, levels: Sequence[float]) -> Tensor:
    """Each weight's distance from its level, in units of half the distance between the levels around it: 0 on a level,
    1 half-way.

    The level as the weight's dtype stores it: a snapped weight is on its level in 16 bits, too. Of the arithmetic type;
    NaN for NaN. Arguments as for :func:`codes`.
    """
    laid = runs(weight, scale)
    flat = torch.empty_like(laid.weight, dtype=reference.arithmetic(weight.dtype))
    _fill(flat, (_Place(part, each, levels).distance() for part, each in _parts(laid)))
    return _in_shape(flat, weight, laid)


class Measured(NamedTuple):
    """What a report counts of a weight."""

    on_level: int
    away: int  # weights that are farther from their level than `near`
    lost: int  # weights without a distance: they, or their scale, are NaN
    nan: int
    flipped: int  # codes that differ from earlier ones
    occupancy: tuple[int, ...]  # weights per level, lowest level first
    largest: float  # distance
    squares: float  # sum of w^2, of weights that have a distance
    errors: float  # and of (w - snapped)^2


def counting(
    weight: Tensor,
    scale: Tensor,
    levels: Sequence[float],
    near: float,
    codes: Tensor | None = None,
    compare: bool = False,
) -> Callable[[], Measured]:
    """Distances, codes and errors in one pass, which has begun when this returns: on a GPU the numbers stay there until
    the call that comes back is made, which waits for them. Sums are in float64, in memory order, as
    ``csrc/maths/order.h`` says.

    Args:
        weight, scale, levels: as for :func:`codes`.
        near: from which distance on a weight is away from its level.
        codes: (numel,) uint8, receives the codes in memory order; or None. compare: it holds earlier ones, to be
            compared first.
    """
    laid = runs(weight, scale)
    if backends.has_operators(weight.device):
        there = torch.ops.askew_cuda.measure(
            laid.weight, laid.scale, laid.run, levels, near, codes, compare and codes is not None
        )
        return functools.partial(_read, *there)
    measured = _measure(laid, levels, near, codes, compare)
    return lambda: measured


def _read(counts: Tensor, numbers: Tensor) -> Measured:
    whole = counts.tolist()
    return Measured._make((*whole[:5], tuple(whole[5:]), *numbers.tolist()))


def _measure(laid: Runs, levels: Sequence[float], near: float, codes: Tensor | None, compare: bool) -> Measured:
    counts, occupancy = [0] * 5, torch.zeros(len(levels), dtype=torch.int64)
    largest = 0.0
    squares = errors = torch.zeros(1, dtype=torch.float64)
    first = 0
    for there, each in _parts(laid):
        part = there.cpu()  # sums are float64, which not every device has
        place = _Place(part, each.cpu(), levels)
        away, now = place.distance(), place.index.to(torch.uint8)
        fine = ~away.isnan()
        found = [away == 0, away > near, ~fine, part.isnan()]
        if codes is not None:
            before = codes[first : first + len(part)]
            if compare:
                found.append(before.cpu() != now)
            before.copy_(now)
        for k, mask in enumerate(found):
            counts[k] += int(mask.sum())
        occupancy += torch.bincount(now.int(), minlength=len(levels))
        largest = max(largest, float(torch.where(fine, away, 0).max()))
        w = torch.where(fine, place.w, 0).double()
        error = w - torch.where(fine, place.level.to(place.w.dtype), 0).double()
        squares = summation.in_sequence(squares, summation.add_up((w * w).unsqueeze(0)))
        errors = summation.in_sequence(errors, summation.add_up((error * error).unsqueeze(0)))
        first += len(part)
    return Measured._make((*counts, tuple(occupancy.tolist()), largest, float(squares), float(errors)))
