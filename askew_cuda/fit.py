"""The scale of least squared error in PyTorch: the reference of the operator ``askew_cuda::fit_scales``, equal to it
bit for bit. ``csrc/maths/fit.h`` explains the search and states the same; the numbers below are the same in both.

Sums are in the order of :mod:`askew_cuda.summation`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .summation import CHUNK, add_up, in_sequence

AT_ONCE = 2**20  # weights that PyTorch works on at a time, whole chunks of sums: 8 MiB per float64 temporary


class Grids(NamedTuple):
    """How fine the grids are. A grid of 2^roots // 3 + 2 trials has a ratio of (low / high)^(3 / 2^roots)."""

    roots: int
    reach: float  # the first trial, in units of the scale at which the largest weight lies on the outermost level
    least: float  # the last one, in units of that at which the mean |weight| does
    first: float  # the finer grid: how far its first trial is from the best of the other grid,
    ratio: float  # and from the second one
    fine: int


def grids_for(levels: Sequence[float], columns: int) -> Grids:
    """The grids for rows of so many weights."""
    few, aside = len(levels) <= 17, levels[0] > 0 or levels[-1] < 0
    least = 0.005 if aside else 0.5  # where no level is 0 or beyond, weights of the other sign ask for less
    even = few and not aside and reference.UniformCodebook.fits(levels)
    if even and len(levels) <= 4:
        return Grids(6, 2, least, 0.87, 1.025, 12)
    if even:
        return Grids(6, 2, least, 0.8333, 1.018, 22) if columns >= 128 else Grids(7, 2, least, 0.8333, 1.0147, 26)
    if few:
        return Grids(8, 4, least, 0.8333, 1.0147, 26)
    if columns >= 2**14:
        return Grids(7, 2, least, 0.8333, 1.0058, 64)
    if columns >= 2**10:
        return Grids(7, 2, least, 0.92, 1.002, 84)
    if columns >= 64:
        return Grids(9, 2, least, 0.87, 1.0011, 256)
    return Grids(10, 4, least, 0.909, 1.00075, 256)


def fit_scales(rows: Tensor, levels: Sequence[float]) -> Tensor:
    """(rows,) float64: the scale of each row, by the search that ``csrc/maths/fit.h`` describes; 0 for a row of zeros.

    Args:
        rows: (rows, columns), float32, float64, bfloat16 or float16, on the CPU. Not mutated.
        levels: K strictly increasing float32 numbers, 2 <= K <= 256; level units.
    """
    if not rows.numel():
        return rows.new_zeros(len(rows), dtype=torch.float64)
    found = [_Search(part, levels).run() for part in rows.split(max(1, AT_ONCE // rows.shape[1]))]
    return torch.cat(found)


def _of_a_trial(w: Tensor, u: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    """What R, D and B are sums of."""
    d = u - q
    return d * d, d * q, q * q


def _of_least_squares(w: Tensor, u: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    """What A and B are sums of."""
    q = q.double()
    return w.double() * q, q * q


class _Search:
    """The search for some rows."""

    def __init__(self, rows: Tensor, levels: Sequence[float]):
        self.rows = rows
        self.wide = reference.arithmetic(rows.dtype)
        self.book = reference.codebook(levels, rows.new_empty(0, dtype=self.wide))
        self.grids = grids_for(levels, rows.shape[1])
        self.per_unit = float(self.book.unit)
        first, last = levels[0] / self.per_unit, levels[-1] / self.per_unit
        self.outermost = max(-first, last)
        up, down, total = self._range()
        self.largest = torch.maximum(up, down)
        self.per_largest = self.largest.reciprocal()
        above = up / last if last > 0 else torch.zeros_like(up)
        below = down / -first if first < 0 else torch.zeros_like(up)
        high = self.grids.reach * torch.maximum(above, below)
        self.high = torch.where(high > 0, high, 1)
        mean, quarter = self.grids.least * (total / rows.shape[1]) / self.outermost, 0.25 * self.high
        root = torch.where(mean < quarter, mean, quarter) / self.high
        for _ in range(self.grids.roots):
            root = reference.sqrt(root)
        self.ratio = root * root * root
        self.least, self.best = torch.full_like(self.high, torch.inf), torch.zeros_like(self.high)

    def _pieces(self) -> list[Tensor]:
        """Columns that are worked on at a time, whole chunks of them."""
        return list(self.rows.split(max(CHUNK, AT_ONCE // CHUNK * CHUNK), dim=1))

    def _range(self) -> tuple[Tensor, Tensor, Tensor]:
        """The largest weight and the largest -weight, at least 0, and the sum of all |w|."""
        up = down = total = self.rows.new_zeros(len(self.rows), dtype=torch.float64)
        for piece in self._pieces():
            w = piece.double()
            up = torch.maximum(up, torch.where(w > 0, w, 0).amax(1))  # NaN is not larger than anything
            down = torch.maximum(down, torch.where(-w > 0, -w, 0).amax(1))
            total = in_sequence(total, add_up(w.abs()))
        return up, down, total

    def _sums(self, unit: Tensor, terms_of: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
        """At a scale, in units of the codebook: of weights, of them in units of the scale, and of their levels."""
        sums: list[Tensor] = []
        inverse = unit.to(self.wide).reciprocal().unsqueeze(1)
        for piece in self._pieces():
            w = piece.to(self.wide)
            u = w * inverse
            parts = [add_up(terms) for terms in terms_of(w, u, self.book.level(self.book.nearest(u)))]
            sums = sums or [torch.zeros_like(unit)] * len(parts)
            sums = [in_sequence(total, part) for total, part in zip(sums, parts, strict=True)]
        return sums

    def _trials(self, phase: int) -> tuple[Tensor, Tensor | float, int]:
        """The first scale, from one to the next, and how many: the largest weight on the outermost level; two grids."""
        if phase == 0:
            return self.largest / self.outermost, 1.0, 1
        if phase == 1:
            return self.high, self.ratio, 2**self.grids.roots // 3 + 2
        return self._middle() * self.grids.first, self.grids.ratio, self.grids.fine

    def _middle(self) -> Tensor:
        return torch.where(self.best > 0, self.best, self.high)

    def run(self) -> Tensor:
        """The scales, weight units per level unit."""
        for phase in range(3):
            unit, ratio, count = self._trials(phase)
            for _ in range(count):
                error, along, square = self._sums(unit, _of_a_trial)
                part = unit * self.per_largest  # so that no square leaves the range of a double
                left = part * part * (error - along * (along / square))
                better = (square > 0) & (square + along > 0) & (left < self.least)
                self.best = torch.where(better, unit + unit * (along / square), self.best)
                self.least = torch.where(better, left, self.least)
                unit = unit * ratio
        for _ in range(2):
            a, b = self._sums(self._middle(), _of_least_squares)
            self.best = torch.where((a > 0) & (b > 0), a / b, 0)
        return torch.where(self.best > 0, self.best, self.largest / self.outermost) / self.per_unit
