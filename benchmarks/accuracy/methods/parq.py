"""PARQ: latent weights, and a proximal map that steepens from the identity to rounding.

Jin, Ma, Liu, Gromov, Defazio, Xiao, "PARQ: piecewise-affine regularized quantization", ICML 2025 (arXiv 2503.15748).
Ours is a restatement for stacked weights of what torchao.prototype.parq computes: ProxPARQ, with the levels of its
UnifQuantizer, for ternary of its LSBQuantizer, estimated anew in every step: its default of every tenth costs accuracy.
Its least-squares binary levels for 2 and 4 bit are no better here (digits, H = 16, SGD, 40 tuning seeds, 2 bit: 96.2
against 96.4). A test holds it to the package where that is installed.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .latent import Grid, Latent
from .method import Method

HARD = 0.85  # share of the training until the map is rounding


def inverse_slope(progress: float, steepness: float) -> float:
    """1 at progress 0, and 0 from ``HARD`` on.

    Between them a sigmoid of the given steepness, falling, scaled to these ends.
    """
    if progress >= HARD:
        return 0.0
    first, last, here = (1 / (1 + math.exp(steepness * x)) for x in (-0.5, 0.5, progress / HARD - 0.5))
    return (here - last) / (first - last)


def package_scale(rows: Tensor, grid: Grid) -> Tensor:
    """(rows, 1): 1.1 mean|w| for ternary.

    Else the outermost level is at bits * mean|w|, or at max|w| where that is less.
    """
    size = rows.abs()
    mean = size.mean(1, keepdim=True)
    if len(grid) == 3:
        return 1.1 * mean
    return (
        torch.minimum(math.log2(len(grid)) * mean, size.amax(1, keepdim=True)).clamp_(min=torch.finfo(rows.dtype).tiny)
        / grid.highest
    )


def proximal(rows: Tensor, scale: Tensor, grid: Grid, slope: float) -> Tensor:
    """Piecewise affine, (rows, n): through the middle of each interval with 1 / ``slope``, flat around levels.

    What lies outside of the outermost levels goes onto them. 0 < ``slope`` <= 1.
    """
    place = (rows / (scale * grid.gap)).sub_(grid.lowest / grid.gap)  # 0 on the lowest level, 1 on the next
    lower = place.floor().clamp_(0, len(grid) - 2)
    share = place.sub_(lower).sub_(0.5).div_(slope).add_(0.5).clamp_(0, 1)
    return share.add_(lower).mul_(grid.gap).add_(grid.lowest).mul_(scale)


class _Parq(Latent):
    def __init__(self, *arguments: Any, steepness: float):
        self.steepness = steepness
        super().__init__(*arguments)

    def first_scale(self, rows: Tensor) -> Tensor:
        return package_scale(rows, self.grid)

    def look(self, latent: nn.Parameter, rows: Tensor) -> Tensor:
        if self.steps_done == 0:
            return rows
        scale = self.scale[latent] = package_scale(rows, self.grid)
        slope = inverse_slope(
            (self.steps_done - 1) / self.total_steps, self.steepness
        )  # the package counts the first step as 0
        return proximal(rows, scale, self.grid, slope) if slope > 0 else self.grid.nearest(rows, scale)


class Parq(Method):
    name = "PARQ"
    knob, knobs = "steepness", (10.0, 50.0)

    def begin(self, quantized, rest, base, width, knob, *, total_steps, pretrained, granularity="tensor"):
        return _Parq(quantized, rest, base, width, granularity, total_steps, steepness=knob)
