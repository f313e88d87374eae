"""What the accuracy table compares: every method trains S networks at once, on stacked weights, in one and the same loop.

A weight of the S networks is one parameter of shape (S, ..): Linear (S, out, in), convolution (S, out, in, kh, kw), bias (S, out).
The loop is the referee's, the same for all; the loss is the sum over the networks, so that none influences another:

    run.optimizer.zero_grad(); loss(network(run, batch)).sum().backward(); run.optimizer.step(); scheduler.step(); run.stepped()
    ..
    run.finish()

Here: the interface, full precision, what methods with latent weights share, the straight-through estimator, and askew_cuda.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import askew_cuda as askew
from askew_cuda import scales
from askew_cuda.quantizer import Codebook

WIDTHS = ("binary", "ternary", "2bit", "4bit")
Parameters = list[nn.Parameter]


@dataclass(frozen=True)
class Base:
    """The base rule, the same for every method: torch's SGD with momentum, or AdamW ("sgd" | "adamw").

    Weight decay acts on what is a matrix or more in one network, biases and norms are left out.
    """

    rule: str
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9

    @property
    def keywords(self) -> dict[str, Any]:
        """What torch's optimizer of this rule takes, and ours."""
        if self.rule not in ("sgd", "adamw"):
            raise ValueError(f"Base: rule = {self.rule!r}; 'sgd' or 'adamw'")
        return {"lr": self.lr} | ({"momentum": self.momentum} if self.rule == "sgd" else {"betas": self.betas})

    def groups(self, stacked: Parameters) -> list[dict[str, Any]]:
        """Param groups of stacked parameters, with their weight decay."""
        matrices, others = [p for p in stacked if p.dim() > 2], [p for p in stacked if p.dim() <= 2]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def optimizer(self, stacked: Parameters) -> torch.optim.Optimizer:
        """torch's own, fused."""
        rule = torch.optim.SGD if self.rule == "sgd" else torch.optim.AdamW
        return rule(self.groups(stacked), fused=True, **self.keywords)


class Run:
    """One training of S networks. As it stands: full precision."""

    optimizer: torch.optim.Optimizer  # schedulers act on it

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    def weight(self, latent: nn.Parameter) -> Tensor:
        """What the forward pass sees for a quantized parameter; the same shape, differentiable."""
        return latent

    def input(self, x: Tensor) -> Tensor:
        """Applied to the input (S, ..) of every quantized layer."""
        return x

    def output(self, y: Tensor) -> Tensor:
        """Applied to the output (S, ..) of every quantized layer."""
        return y

    def stepped(self) -> None:
        """Called after ``optimizer.step()`` and ``scheduler.step()``."""

    def finish(self) -> None:
        """Called after the last step. From now on ``weight()`` of every quantized parameter lies on its levels."""


class Method:
    """One row of the table: ``start`` begins a training of parameters that hold their initial values, and mutates them.

    name: of the row. widths: those of WIDTHS that it can do. knob: what its one knob is, "" if none. knobs: the settings that are tried.
    """

    name: str
    widths: tuple[str, ...] = WIDTHS
    knob: str = ""
    knobs: tuple = (None,)

    def start(
        self,
        quantized: Parameters,
        rest: Parameters,
        base: Base,
        width: str,
        knob: Any,
        *,
        total_steps: int,
        pretrained: bool,
        granularity: str = "tensor",
    ) -> Run:
        """Begins a training.

        Args:
            quantized: N x (S, ..), float32, those that are to end on levels. rest: M x (S, ..), all others.
            width: one of ``widths``. knob: one of ``knobs``.
            total_steps: optimizer steps of the whole training. pretrained: whether the weights are trained already.
            granularity: of the scale: "tensor", one per network and weight, or "channel", one per network, weight and entry of dim 1.
        """
        raise NotImplementedError


class FullPrecision(Method):
    """Nothing is quantized; the width does not matter, and there is none in its list."""

    name, widths = "full precision", ()

    def start(self, quantized, rest, base, width, knob, *, total_steps, pretrained, granularity="tensor"):
        return Run(base.optimizer(quantized + rest))


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
        """(rows, n) weights and (rows, 1) scales to the nearest ``scale * level``, a new tensor; ties go to the lower level."""
        level = (rows / (scale * self.gap)).sub_(self.lowest / self.gap + 0.5).ceil_()
        return level.clamp_(0, len(self) - 1).mul_(self.gap).add_(self.lowest).mul_(scale)

    def absmean(self, rows: Tensor) -> Tensor:
        """(rows, 1): mean|w|, for up to three levels -1, (0,) 1."""
        return rows.abs().mean(1, keepdim=True)

    def min_mse(self, rows: Tensor) -> Tensor:
        """(rows, 1): the scale of the least squared error. Sorts: for the start of a training, not for each step."""
        return scales.min_mse(rows, self.codebook).to(rows.dtype).unsqueeze(1)

    def refit(self, rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(levels (rows, n) that are nearest under ``scale``, the scale (rows, 1) that fits them best by least squares).

        One step of the alternating minimisation of the squared error; for two levels the scale is mean|w|. If all are zero it stays.
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
        raise ValueError(f"a stacked weight of shape {tuple(stacked.shape)} is not contiguous; call .contiguous() before the training")
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

    What is seen is made by ``look`` at the start and after every step, from the latent weights as rows; ``finish`` leaves it on levels.
    """

    def __init__(self, quantized: Parameters, rest: Parameters, base: Base, width: str, granularity: str, total_steps: int):
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
        """(rows, n): what the forward pass sees after ``steps_done`` steps. May set ``self.scale[latent]``, and change rows in place."""
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
    """The straight-through estimator (Bengio, Leonard, Courville, arXiv 1308.3432, 2013), as quantization-aware training has it: the
    forward pass sees the rounded weight, the latent one takes the gradient.

    The scale is estimated anew in every step, by the rule of ``examples/digits.py``: mean|w| for up to 3 levels (for three: BitNet
    b1.58, Ma et al., arXiv 2402.17764, 2024), one least-squares refit of the min-MSE scale for more.
    """

    name = "STE"

    def start(self, quantized, rest, base, width, knob, *, total_steps, pretrained, granularity="tensor"):
        return StraightThroughRun(quantized, rest, base, width, granularity, total_steps)


def are_normalized(rest: Parameters) -> bool:
    """Whether the networks have normalisation layers with gains, trained or not: what ``askew.param_groups`` sees in a plain network."""
    return any(getattr(parameter, "is_gain", False) for parameter in rest)


class OursRun(Run):
    """askew_cuda on stacked weights: one parameter per network, a view of the stacked one, so that the real optimizer with its own scale
    rules steps. ``parts[stacked]`` are these parameters; ``keywords`` go to the quantized param groups."""

    def __init__(self, quantized: Parameters, rest: Parameters, base: Base, total_steps: int, keywords: dict, anneal: dict):
        self.stacked, self.parts = quantized, {}
        for stacked in quantized:
            stacked.grad = torch.zeros_like(stacked)  # backward passes add to it, in place
            self.parts[stacked] = [nn.Parameter(each) for each in stacked.detach()]
            for part, grad in zip(self.parts[stacked], stacked.grad, strict=True):
                part.grad = grad
        groups = base.groups(quantized)
        keywords = {"normalized": are_normalized(rest), **keywords}
        for group in groups:
            group["params"] = [part for stacked in group["params"] for part in self.parts[stacked]]
            group.update(keywords)
        rule = askew.AskewSGD if base.rule == "sgd" else askew.AskewAdamW
        super().__init__(rule(groups + base.groups(rest), **base.keywords))
        self.optimizer.zero_grad = self._zero_grad  # torch's would cut the views off
        self.rest = rest
        self.anneal = askew.Anneal(self.optimizer, total_steps=total_steps, **anneal)
        self.report: askew.FinalizeReport | None = None  # of finalize(): how far the annealing itself had come

    def _zero_grad(self, set_to_none: bool = True) -> None:
        for stacked in self.stacked:
            stacked.grad.zero_()
        for each in self.rest:
            each.grad = None

    def stepped(self) -> None:
        self.anneal.step()

    def finish(self) -> None:
        self.report = self.optimizer.finalize()


class Ours(Method):
    """askew_cuda with its defaults: capture annealing, the scale by its own rule. ``keywords`` for experiments: of param groups."""

    def __init__(self, name: str = "askew_cuda", anneal: dict[str, Any] | None = None, **keywords: Any):
        self.name, self.anneal, self.keywords = name, anneal or {}, keywords

    def start(self, quantized, rest, base, width, knob, *, total_steps, pretrained, granularity="tensor"):
        keywords = {"quantizer": width if granularity == "tensor" else f"{width}/{granularity}", "pretrained": pretrained}
        return OursRun(quantized, rest, base, total_steps, keywords | self.keywords, self.anneal)
