"""What the accuracy table compares: every method trains S networks at once, on stacked weights, in the same loop.

A weight of the S networks is one parameter of shape (S, ..): Linear (S, out, in), convolution (S, out, in, kh, kw),
bias (S, out). The loop is the same for all (loop.py); the loss is the sum over the networks, so that none
influences another:

    for batch in data:
        run.optimizer.zero_grad()
        loss(network(run, batch)).sum().backward()
        run.optimizer.step()
        scheduler.step()
        run.stepped()
    run.finish()

Here: the interface, and full precision. Methods with latent weights: latent.py. askew_cuda: ours.py. The list of all:
registry.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
    """One row of the table: ``begin`` begins a training of parameters that hold their initial values, and mutates them.

    name: of the row. widths: those of WIDTHS that it can do. knob: what its one knob is, "" if none. knobs: the
    settings that are tried.
    """

    name: str
    widths: tuple[str, ...] = WIDTHS
    knob: str = ""
    knobs: tuple = (None,)

    def begin(
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
            granularity: of the scale: "tensor", one per network and weight, or "channel", one per network, weight and
                entry of dim 1.
        """
        raise NotImplementedError


class FullPrecision(Method):
    """Nothing is quantized; the width does not matter, and there is none in its list."""

    name, widths = "full precision", ()

    def begin(self, quantized, rest, base, width, knob, *, total_steps, pretrained, granularity="tensor"):
        return Run(base.optimizer(quantized + rest))
