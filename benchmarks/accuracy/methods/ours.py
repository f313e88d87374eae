"""askew_cuda as a method of the accuracy table: the real optimizer, on views of the stacked weights."""

from typing import Any

import torch
from torch import nn

import askew_cuda as askew

from .method import Base, Method, Parameters, Run


def are_normalized(rest: Parameters) -> bool:
    """Whether the networks have normalisation layers with gains, trained or not.

    It is what ``askew.param_groups`` sees in a plain network.
    """
    return any(getattr(parameter, "is_gain", False) for parameter in rest)


class OursRun(Run):
    """askew_cuda on stacked weights: one parameter per network, a view of the stacked one.

    So the real optimizer steps, with its own scale rules. ``parts[stacked]`` are these parameters; ``keywords`` go to
    the quantized param groups.
    """

    def __init__(
        self, quantized: Parameters, rest: Parameters, base: Base, total_steps: int, keywords: dict, anneal: dict
    ):
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
    """askew_cuda with its defaults: capture annealing, the scale by its own rule.

    ``keywords``, for experiments, go to param groups.
    """

    def __init__(self, name: str = "askew_cuda", anneal: dict[str, Any] | None = None, **keywords: Any):
        self.name, self.anneal, self.keywords = name, anneal or {}, keywords

    def begin(self, quantized, rest, base, width, knob, *, total_steps, pretrained, granularity="tensor"):
        keywords = {
            "quantizer": width if granularity == "tensor" else f"{width}/{granularity}",
            "pretrained": pretrained,
        }
        return OursRun(quantized, rest, base, total_steps, keywords | self.keywords, self.anneal)
