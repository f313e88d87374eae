"""What methods with latent weights share, and the plainest of them: the straight-through estimator."""

from typing import Any

import torch
from torch import Tensor, nn

from askew_cuda import scales
from askew_cuda.quantizer import Codebook

from .method import WIDTHS, Base, Method, Parameters, Run


class Grid:
    """The levels of a width. They are evenly spaced, so that the nearest one is found by rounding."""

    def __init__(self, width: str):
        if width not in WIDTHS:
            raise ValueError(f"width = {width!r}; one of {', '.join(WIDTHS)}")
        self.codebook = Codebook.named(width)
        levels = self.codebook.levels
        self.gap, self.lowest, self.highest = levels[1] - levels[0], levels[0], levels[-1]

    def __len__(self) -> int:
        return len(self.codebook)

    def nearest(self, rows: Tensor, scale: Tensor) -> Tensor:
        """(rows, n) weights, (rows, 1) scales: the nearest ``scale * level``, a new tensor; ties go down."""
        level = (rows / (scale * self.gap)).sub_(self.lowest / self.gap + 0.5).ceil_()
        return level.clamp_(0, len(self) - 1).mul_(self.gap).add_(self.lowest).mul_(scale)

    def absmean(self, rows: Tensor) -> Tensor:
        """(rows, 1): mean|w|, for up to three levels -1, (0,) 1."""
        return rows.abs().mean(1, keepdim=True)

    def min_mse(self, rows: Tensor) -> Tensor:
        """(rows, 1): the scale of the least squared error. Sorts: for the start of a training, not for each step."""
        return scales.min_mse(rows, self.codebook).to(rows.dtype).unsqueeze(1)

    def refit(self, rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(levels (rows, n) nearest under ``scale``, the scale (rows, 1) that fits them best by least squares).

        One step of the alternating minimisation of the squared error; for two levels the scale is mean|w|. If all are
        zero it stays.
        """
        level = self.nearest(rows, scale).div_(scale)
        square = (level * level).sum(1, keepdim=True)
        fitted = (rows * level).sum(1, keepdim=True) / square
        return level, torch.where(square > 0, fitted, scale).clamp_(min=torch.finfo(rows.dtype).tiny)


def as_rows(stacked: Tensor, granularity: str) -> Tensor:
    """A stacked weight (S, out, ..) as a view (rows, n), detached: one row per scale."""
    if granularity not in ("tensor", "channel"):
        raise ValueError(f"granularity = {granularity!r}; 'tensor' or 'channel'")
    if not stacked.is_contiguous():
        raise ValueError(
            f"a stacked weight of shape {tuple(stacked.shape)} is not contiguous; call .contiguous() before the "
            "training"
        )
    per_channel = granularity == "channel" and stacked.dim() > 2
    return stacked.detach().view(stacked.shape[0] * stacked.shape[1] if per_channel else stacked.shape[0], -1)


class _Through(torch.autograd.Function):
    """Forward: what is seen. Backward: the gradient goes to the latent weight as if they were the same."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, seen: Tensor) -> Tensor:
        return seen.view_as(seen)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Latent(Run):
    """The parameters are latent weights: they take the gradient of what the forward pass sees in their place.

    What is seen is made by ``look`` at the start and after every step, from the latent weights as rows; ``finish``
    leaves it on levels.
    """

    def __init__(
        self, quantized: Parameters, rest: Parameters, base: Base, width: str, granularity: str, total_steps: int
    ):
        super().__init__(base.optimizer(quantized + rest))
        self.grid, self.total_steps, self.steps_done = Grid(width), total_steps, 0
        self.rows = {latent: as_rows(latent, granularity) for latent in quantized}
        self.scale = {latent: self.first_scale(rows) for latent, rows in self.rows.items()}
        self.seen = {latent: torch.empty_like(rows) for latent, rows in self.rows.items()}
        self._look()

    def first_scale(self, rows: Tensor) -> Tensor:
        """(rows, 1): at the start."""
        return self.grid.min_mse(rows)

    def look(self, latent: nn.Parameter, rows: Tensor) -> Tensor:
        """(rows, n): what the forward pass sees after ``steps_done`` steps.

        May set ``self.scale[latent]``, and change rows in place.
        """
        raise NotImplementedError

    def settle(self, latent: nn.Parameter, rows: Tensor) -> Tensor:
        """(rows, n): what is seen after the training; on levels."""
        return self.grid.nearest(rows, self.scale[latent])

    @property
    def progress(self) -> float:
        return self.steps_done / self.total_steps

    @torch.no_grad()
    def _look(self) -> None:
        for latent, rows in self.rows.items():
            self.seen[latent].copy_(self.look(latent, rows))

    def weight(self, latent: nn.Parameter) -> Tensor:
        return _Through.apply(latent, self.seen[latent].view_as(latent))

    def stepped(self) -> None:
        self.steps_done += 1
        self._look()

    @torch.no_grad()
    def finish(self) -> None:
        for latent, rows in self.rows.items():
            self.seen[latent].copy_(self.settle(latent, rows))


class StraightThroughRun(Latent):
    """What is seen is the latent weight rounded under a scale that is estimated anew."""

    def first_scale(self, rows):
        return self.grid.absmean(rows) if len(self.grid) <= 3 else self.grid.min_mse(rows)

    def look(self, latent, rows):
        if len(self.grid) <= 3:
            self.scale[latent] = self.grid.absmean(rows)
            return self.grid.nearest(rows, self.scale[latent])
        level, self.scale[latent] = self.grid.refit(rows, self.scale[latent])
        return level.mul_(self.scale[latent])


class StraightThrough(Method):
    """The straight-through estimator (Bengio, Leonard, Courville, arXiv 1308.3432, 2013), as quantization-aware
    training has it: the forward pass sees the rounded weight, the latent one takes the gradient.

    The scale is estimated anew in every step, by the rule of ``examples/digits.py``: mean|w| for up to 3 levels (for
    three: BitNet b1.58, Ma et al., arXiv 2402.17764, 2024), one least-squares refit of the min-MSE scale for more.
    """

    name = "STE"

    def begin(self, quantized, rest, base, width, knob, *, total_steps, pretrained, granularity="tensor"):
        return StraightThroughRun(quantized, rest, base, width, granularity, total_steps)
