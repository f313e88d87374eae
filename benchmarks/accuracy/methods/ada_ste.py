"""AdaSTE: a straight-through estimator with a slope.

The slope depends on where the latent weight is, and on where its gradient would move it.

Le, Hoier, Lin, Zach, "AdaSTE: an adaptive straight-through estimator to train binary neural networks", CVPR 2022 (arXiv
2112.02880), with the slopes of the authors' code. Binary weights are the inner solution of a bilevel problem. For the
latent weight theta, in units of the scale, a double well of strength beta with its minima at -1 and 1 gives

    w(theta) = clip((theta + beta (1 + alpha) sign(theta)) / (1 + beta), -1, 1),

affine on each side of a jump at 0, flat where |theta| > 1 - beta alpha, and the sign itself once beta alpha >= 1. The
derivative is replaced by a finite difference, whose reach is chosen by the gradient g of the loss by w. Gradient
descent takes theta outwards when theta g <= 0:

                                outwards        inwards
    beta alpha >= 1             0               min(1/2, 1 / |theta|)
    |theta| >  1 - beta alpha   0               min(1/2, (1 + 2 beta + beta alpha) / ((1 + beta) |theta|))
    |theta| <= 1 - beta alpha   1 / (1 + beta)  min(1/2, max(0, 2 beta (1 + alpha) - |theta|) / ((1 + beta) |theta|))

is what g is multiplied by. beta grows geometrically from 1 to 1 / alpha. Left out of the authors' code: gradients and
latent weights below 1e-3, which it passes straight through, their gradient's factor of the number of samples, and the
start at theta = +-10.

Gradients that lead outwards are dropped, so latent weights gather around the jump. They need smaller steps than others'
there: the learning rate is a tenth of the base rule's.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from .latent import Latent
from .method import Method

ALPHA = 0.01  # the authors'
HARD = 0.85  # share of the training until beta alpha = 1


def forward(theta: Tensor, beta: float, alpha: float = ALPHA) -> Tensor:
    """w(theta); theta = 0 counts as negative, as ties do elsewhere."""
    sign = torch.where(theta > 0, 1.0, -1.0)
    return ((theta + beta * (1 + alpha) * sign) / (1 + beta)).clamp_(-1, 1) if beta * alpha < 1 else sign


def slope(theta: Tensor, grad: Tensor, beta: float, alpha: float = ALPHA) -> Tensor:
    """The table above."""
    size = theta.abs()
    if beta * alpha >= 1:
        outwards, inwards = torch.zeros_like(size), size.reciprocal()
    else:
        flat = size > 1 - beta * alpha
        outwards = torch.where(flat, 0.0, 1 / (1 + beta))
        reach = torch.where(flat, 1 + 2 * beta + beta * alpha, (2 * beta * (1 + alpha) - size).clamp_(min=0))
        inwards = reach / ((1 + beta) * size)
    return torch.where(theta * grad > 0, inwards.clamp_(max=0.5), outwards)


class _AdaSte(Latent):
    def __init__(self, *arguments: Any, factor: float):
        self.factor = factor
        super().__init__(*arguments)
        self.optimizer.register_step_pre_hook(lambda *_: self._slope())

    @property
    def beta(self) -> float:
        return (1 / ALPHA) ** min(self.progress / HARD, 1)

    def first_scale(self, rows: Tensor) -> Tensor:
        return self.factor * self.grid.absmean(rows)

    def look(self, latent: nn.Parameter, rows: Tensor) -> Tensor:
        return forward(rows / self.scale[latent], self.beta).mul_(self.scale[latent])

    @torch.no_grad()
    def _slope(self) -> None:
        for latent, rows in self.rows.items():
            if latent.grad is not None:
                grad = latent.grad.view_as(rows)
                grad.mul_(slope(rows / self.scale[latent], grad, self.beta))


class AdaSte(Method):
    """In the paper the scale is 1 and batch normalisation follows; here it is a multiple of mean|w| at the start."""

    name, widths = "AdaSTE", ("binary",)
    knob, knobs = "scale, as a multiple of the initial mean|w|", (1.0, 2.0, 4.0)

    def begin(self, quantized, rest, base, width, knob, *, total_steps, pretrained, granularity="tensor"):
        slower = dataclasses.replace(base, lr=base.lr / 10)
        return _AdaSte(quantized, rest, slower, width, granularity, total_steps, factor=knob)
