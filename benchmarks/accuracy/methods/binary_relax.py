"""BinaryRelax: what the network sees lies between latent weights and their levels, nearer and nearer to these.

Yin, Zhang, Lyu, Osher, Qi, Xin, "BinaryRelax: a relaxation approach for training deep neural networks with quantized
weights", SIAM Journal on Imaging Sciences 11, 2018 (arXiv 1801.06313).
"""

import math
from typing import Any

from torch import Tensor, nn

from .latent import Latent
from .method import Method

HARD = 0.8  # share of the training with a strength; after it, as in the paper, the levels themselves are seen


def relax_(level: Tensor, latent: Tensor, strength: float) -> Tensor:
    """(strength level + latent) / (strength + 1), in place of ``level``.

    It is the minimum over x of |x - latent|^2 + strength |x - level|^2.
    """
    return level.mul_(strength).add_(latent).div_(strength + 1)


def strength_at(progress: float, growth: float | str) -> float:
    """How strongly levels attract at a progress in [0, 1]; infinite from ``HARD`` on.

    A number: from 1 to ``growth`` by the same factor in every step, the paper's schedule. "linear": the share strength
    / (strength + 1) of the level grows linearly from 0 to 1, the schedule of torchao's ProxBinaryRelax.
    """
    if progress >= HARD:
        return math.inf
    share = progress / HARD
    return share / (1 - share) if growth == "linear" else float(growth) ** share


class _Relaxed(Latent):
    def __init__(self, *arguments: Any, growth: float | str):
        self.growth = growth
        super().__init__(*arguments)

    def look(self, latent: nn.Parameter, rows: Tensor) -> Tensor:
        level, self.scale[latent] = self.grid.refit(rows, self.scale[latent])
        level.mul_(self.scale[latent])
        strength = strength_at(self.progress, self.growth)
        return level if strength == math.inf else relax_(level, rows, strength)


class BinaryRelax(Method):
    """The scale follows the latent weights by one least-squares refit per step: the paper's alternating projection."""

    name = "BinaryRelax"
    knob, knobs = "growth of the strength", ("linear", 10.0, 100.0)

    def begin(self, quantized, rest, base, width, knob, *, total_steps, pretrained, granularity="tensor"):
        return _Relaxed(quantized, rest, base, width, granularity, total_steps, growth=knob)
