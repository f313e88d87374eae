"""Latent weights in a fixed box: BinaryConnect, and the straight-through estimator in askew_cuda's box.

Courbariaux, Bengio, David, "BinaryConnect: training deep neural networks with binary weights during propagations",
NeurIPS 2015 (arXiv 1511.00363). The forward pass sees -scale or +scale, the latent weight takes the gradient and is
clipped to [-scale, scale]. Deterministic: the sign. Stochastic: +scale with the chance (w / scale + 1) / 2, which is
right in the mean; the sign in the end.
"""

from typing import Any

import torch
from torch import Tensor, nn

from askew_cuda.quantizer import Quantizer
from askew_cuda.scales import estimate

from .latent import Latent
from .method import Base, Method, Parameters
from .ours import are_normalized


class _Boxed(Latent):
    """The scale stays what it was at the start, and latent weights stay within the outermost levels."""

    def look(self, latent: nn.Parameter, rows: Tensor) -> Tensor:
        scale = self.scale[latent]
        torch.clamp(rows, self.grid.lowest * scale, self.grid.highest * scale, out=rows)
        return self.draw(rows, scale)

    def draw(self, rows: Tensor, scale: Tensor) -> Tensor:
        """(rows, n): the levels that the forward pass sees."""
        return self.grid.nearest(rows, scale)


class _Deterministic(_Boxed):
    def __init__(self, *arguments: Any, factor: float):
        self.factor = factor
        super().__init__(*arguments)

    def first_scale(self, rows: Tensor) -> Tensor:
        return self.factor * self.grid.absmean(rows)


class _Stochastic(_Deterministic):
    def __init__(self, *arguments: Any, factor: float):
        self.generator = torch.Generator().manual_seed(0)
        super().__init__(*arguments, factor=factor)

    def draw(self, rows: Tensor, scale: Tensor) -> Tensor:
        chance = torch.rand(rows.shape, generator=self.generator)
        return torch.where(2 * chance - 1 < rows / scale, scale, -scale)


class BinaryConnect(Method):
    """In the paper the scale is 1 and batch normalisation follows; here it is a multiple of mean|w| at the start."""

    widths = ("binary",)
    knob, knobs = "scale, as a multiple of the initial mean|w|", (1.0, 2.0, 4.0)

    def __init__(self, stochastic: bool):
        self.name = f"BinaryConnect, {'stochastic' if stochastic else 'deterministic'}"
        self.run = _Stochastic if stochastic else _Deterministic

    def begin(self, quantized, rest, base, width, knob, *, total_steps, pretrained, granularity="tensor"):
        return self.run(quantized, rest, base, width, granularity, total_steps, factor=knob)


class _OurBox(_Boxed):
    def __init__(
        self,
        quantized: Parameters,
        rest: Parameters,
        base: Base,
        width: str,
        granularity: str,
        total_steps: int,
        pretrained: bool,
    ):
        quantizer = Quantizer(width, granularity=granularity)
        settings = {"pretrained": pretrained, "normalized": are_normalized(rest), "name": "a weight"}
        scales = [torch.stack([estimate(each, quantizer, **settings) for each in p.detach()]) for p in quantized]
        self.rest_of_scales = iter(scale.view(-1, 1) for scale in scales)
        super().__init__(quantized, rest, base, width, granularity, total_steps)

    def first_scale(self, rows: Tensor) -> Tensor:
        return next(self.rest_of_scales)


class StraightThroughInOurBox(Method):
    """The straight-through estimator under askew_cuda's own scale, fixed, and in its box.

    What is left between the two is the annealing.
    """

    name = "STE in our box"

    def begin(self, quantized, rest, base, width, knob, *, total_steps, pretrained, granularity="tensor"):
        return _OurBox(quantized, rest, base, width, granularity, total_steps, pretrained)
