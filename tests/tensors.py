"""Hostile tensors: laid out in every way that torch allows, guarded on both sides, with values that reach every
branch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from askew_cuda.reference import spread

GUARD = 64  # numbers on each side of a tensor; a multiple of the largest vector, so that "contiguous" stays aligned


class Guarded(NamedTuple):
    """A tensor inside a larger buffer."""

    view: Tensor
    buffer: Tensor

    def outside(self) -> Tensor:
        """All numbers of the buffer that are not the tensor's."""
        beside = torch.ones(self.buffer.shape, dtype=torch.bool, device=self.buffer.device)
        beside.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(False)
        return self.buffer[beside]


def same_layout(layout: str, dims: int) -> str:
    """The layout for a tensor of so few dimensions: contiguous, where the given one needs two or more to differ."""
    return layout if dims > 1 or layout in ("misaligned", "strided") else "contiguous"


def guarded(values: Tensor, layout: str, device: str = "cpu") -> Guarded:
    """The values in a buffer of their own, in the given layout."""
    dims = range(values.dim())
    order = {"transposed": reversed(dims), "channels_last": (0, 2, 3, 1)}.get(layout, dims)  # outermost first
    strides, stride = [0] * values.dim(), 2 if layout == "strided" else 1
    for dim in reversed(list(order)):
        strides[dim] = stride
        stride *= max(values.shape[dim], 1)
    offset = GUARD + (layout == "misaligned")
    buffer = torch.full((stride + 2 * GUARD + 1,), 99, dtype=values.dtype, device=device)
    view = buffer.as_strided(values.shape, strides, offset)
    view.copy_(values)
    return Guarded(view, buffer)


def _at_random(generator: torch.Generator, shape: Sequence[int], kinds: Tensor) -> Tensor:
    """For each element one of the kinds, (kinds, *shape)."""
    which = torch.randint(0, len(kinds), (1, *shape), generator=generator)
    return kinds.gather(0, which)[0]


def _spoilt(generator: torch.Generator, x: Tensor) -> Tensor:
    """With NaN and infinities in about every eighth place."""
    bad = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=x.dtype)[
        torch.randint(0, 3, x.shape, generator=generator)
    ]
    return torch.where(torch.rand(x.shape, generator=generator) < 0.125, bad, x)


def draw_weight(
    generator: torch.Generator,
    shape: Sequence[int],
    scale: Tensor,
    levels: Sequence[float],
    dtype: torch.dtype,
    hostile: bool,
) -> Tensor:
    """Weights, float64: on levels, on midpoints, close to both, anywhere inside, outside, far outside, zeros of both
    signs, subnormal.
    """

    def uniform() -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    special = [torch.zeros(shape).double(), -torch.zeros(shape).double(), normal * torch.finfo(dtype).tiny * 0.25]
    if not levels:
        w = _at_random(generator, shape, torch.stack([normal, normal * 1e-3, normal * 30, *special]))
        return _spoilt(generator, w) if hostile else w
    level = torch.tensor(levels, dtype=torch.float64)
    # Groups are runs of weights in logical order; broadcasting does the rest.
    scale = spread(scale, torch.empty(shape))
    below = torch.randint(0, len(levels) - 1, shape, generator=generator)
    lower, upper = level[below], level[below + 1]
    lowest, highest = level[0], level[-1]
    close = torch.exp2(-20 * uniform()) * torch.where(uniform() < 0.5, -0.5, 0.5) * (upper - lower)
    end = torch.where(uniform() < 0.5, lowest, highest)
    u = [
        lower,
        upper,
        (lower + upper) * 0.5,
        lower + close,
        upper + close,
        (lower + upper) * 0.5 + close,
        lowest + (highest - lowest) * uniform(),
        lowest + (highest - lowest) * uniform(),
        end + normal * (upper - lower),
        end * 40 * uniform(),
    ]
    scaled = torch.where(scale > 0, torch.stack(u) * scale, normal)
    w = _at_random(generator, shape, torch.cat([scaled, torch.stack(special)]))
    return _spoilt(generator, w) if hostile else w


def draw_gradient(generator: torch.Generator, shape: Sequence[int], hostile: bool) -> Tensor:
    """Gradients, float64: from far below to far above what moves a weight across the codebook, and zeros."""
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    kinds = torch.stack(
        [normal, normal * 1e-3, normal * 0.1, normal * 20, torch.zeros_like(normal), -torch.zeros_like(normal)]
    )
    g = _at_random(generator, shape, kinds)
    return _spoilt(generator, g) if hostile else g
