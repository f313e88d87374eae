"""ProxQuant: a step of the base rule, then a proximal step towards the levels, by the weights themselves.

There is no latent copy.

Bai, Wang, Liberty, "ProxQuant: quantized neural networks via proximal operators", ICLR 2019 (arXiv 1810.00861). The
regulariser is lambda |w - Q(w)|, a W with its zeros on the levels, lambda grows linearly with the step. For the last
part the weights are rounded and stay, and what is not quantized trains on.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .latent import Latent
from .method import Method

HARD = 0.85  # share of the training with a regulariser


def proximal(rows: Tensor, level: Tensor, strength: Tensor) -> Tensor:
    """The minimum over x of |x - w|^2 / 2 + strength |x - level|.

    It is w moved by ``strength`` towards its level, never past it.
    """
    away = rows - level
    return level + away.sign() * (away.abs() - strength).clamp_(min=0)


class _Proximal(Latent):
    """What is seen is the weight itself.

    The regulariser is in units of the scale: in the paper the levels are -1 and 1.
    """

    def __init__(self, *arguments: Any, rate: float):
        self.rate, self.fixed = rate, {}
        super().__init__(*arguments)

    def look(self, latent: nn.Parameter, rows: Tensor) -> Tensor:
        if latent not in self.fixed:
            level, self.scale[latent] = self.grid.refit(rows, self.scale[latent])
            level.mul_(self.scale[latent])
            if self.progress >= HARD:
                self.fixed[latent] = level
            else:
                rows.copy_(proximal(rows, level, self.rate * self.progress * self.scale[latent]))
        if latent in self.fixed:
            rows.copy_(self.fixed[latent])  # whatever momentum and weight decay did
        return rows

    def weight(self, latent: nn.Parameter) -> Tensor:
        return latent

    @torch.no_grad()
    def finish(self) -> None:
        for latent, rows in self.rows.items():
            rows.copy_(self.fixed.get(latent, self.settle(latent, rows)))


class ProxQuant(Method):
    """The scale follows the weights by one least-squares refit per step, the paper's alternating minimisation."""

    name = "ProxQuant"
    knob, knobs = "rate: the proximal step, in units of the scale, that the training would end with", (0.01, 0.1, 0.3)

    def begin(self, quantized, rest, base, width, knob, *, total_steps, pretrained, granularity="tensor"):
        return _Proximal(quantized, rest, base, width, granularity, total_steps, rate=knob)
