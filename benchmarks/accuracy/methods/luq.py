"""LUQ: weights, activations and gradients of 4 bit.

Chmiel, Banner, Hoffer, Ben-Yaacov, Soudry, "Accurate neural training with 4-bit matrix multiplications at standard
formats", ICLR 2023 (arXiv 2112.10769). Weights and activations are rounded to 16 even levels under the statistics-aware
clip (SAWB: Choi et al., MLSys 2019) with straight-through gradients. The gradient of a layer's output is rounded to
zero or a power of two times its smallest level, 8 sizes and a sign, by chance, and unbiased: between two sizes, and
between zero and the smallest.

Different from the authors' code: their weights have 17 levels, ours the 16 that fit 4 bits; an input with negative
values gets 16 levels, theirs 24. As there, the whole network is quantized in the forward passes of the evaluation, too.
"""

from typing import Any

import torch
from torch import Tensor

from askew_cuda.scales import sawb_clip

from .latent import Latent
from .method import Method

_SIZES = 8  # of a gradient: 3 bits for the exponent, and one for the sign


def clip_of(rows: Tensor) -> Tensor:
    """(rows, 1): the clipping point of 16 levels; 1 where all are zero."""
    clip = sawb_clip(rows, 16, "LUQ").to(rows.dtype).unsqueeze(1)
    return torch.where(clip > 0, clip, 1)


def quantize_activation(x: Tensor) -> Tensor:
    """(S, ..) to 16 integers times a scale per network.

    0 .. 15 where a network's x has no negative value, else -8 .. 7.
    """
    rows = x.reshape(x.shape[0], -1)
    signed = rows.amin(1, keepdim=True) < 0
    step = clip_of(rows) * (2 / 15)
    return (rows / step).round_().clamp_(signed * -8.0, 15.0 - signed * 8).mul_(step).view_as(x)


def quantize_gradient(grad: Tensor, chance: Tensor) -> Tensor:
    """(S, ..) to 0 and +-smallest 2^k, k = 0 .. 7, where smallest = max|grad| / 2^7 per network.

    ``chance``, uniform in [0, 1) and of the same shape, decides; the mean over it is the gradient itself.
    """
    rows = grad.reshape(grad.shape[0], -1)
    smallest = rows.abs().amax(1, keepdim=True) / 2 ** (_SIZES - 1)
    size = (rows.abs() / smallest).nan_to_num_(0.0)  # a network without gradient
    below = torch.exp2(torch.log2(size).floor_()).masked_fill_(size < 1, 0)
    above = (2 * below).clamp_(min=1)
    size = torch.where(chance.view_as(rows) * (above - below) < size - below, above, below)
    return (size * smallest * rows.sign()).view_as(grad)


class _QuantizedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return quantize_activation(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _QuantizedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, generator: torch.Generator) -> Tensor:
        ctx.generator = generator
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return quantize_gradient(grad, torch.rand(grad.shape, generator=ctx.generator)), None


class _Luq(Latent):
    def __init__(self, *arguments: Any):
        self.generator = torch.Generator().manual_seed(0)
        super().__init__(*arguments)

    def first_scale(self, rows: Tensor) -> Tensor:
        return clip_of(rows) / self.grid.highest

    def look(self, latent, rows):
        self.scale[latent] = self.first_scale(rows)
        return self.grid.nearest(rows, self.scale[latent])

    def input(self, x: Tensor) -> Tensor:
        return _QuantizedInput.apply(x)

    def output(self, y: Tensor) -> Tensor:
        return _QuantizedGradient.apply(y, self.generator)


class Luq(Method):
    name, widths = "LUQ (activations and gradients, too)", ("4bit",)

    def begin(self, quantized, rest, base, width, knob, *, total_steps, pretrained, granularity="tensor"):
        return _Luq(quantized, rest, base, width, granularity, total_steps)
