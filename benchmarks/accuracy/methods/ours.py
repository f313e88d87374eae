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


WIDE = 64  # inputs up to which a matrix takes the whole learning rate


def share_of_rate(base: Base, fan_in: int) -> float:
    """What a matrix of a fresh network without normalisation layers takes of the learning rate, by docs/recipes.md. Its
    weight decay is divided by it.

    SGD's step, measured in the distance between two levels, is lr / scale^2, and a scale's square goes as 1 / fan_in.
    """
    return min(1.0, WIDE / fan_in) if base.rule == "sgd" else 1.0


class OursRun(Run):
    """askew_cuda on stacked weights: one parameter per network, a view of the stacked one.

    So the real optimizer steps, with its own scale rules. ``parts[stacked]`` are these parameters; ``keywords`` go to
    the quantized param groups. ``by_width``: every matrix has its own learning rate, by ``share_of_rate``.
    """

    def __init__(
        self,
        quantized: Parameters,
        rest: Parameters,
        base: Base,
        total_steps: int,
        keywords: dict,
        anneal: dict,
        by_width: bool,
    ):
        self.stacked, self.parts = quantized, {}
        for stacked in quantized:
            stacked.grad = torch.zeros_like(stacked)  # backward passes add to it, in place
            self.parts[stacked] = [nn.Parameter(each) for each in stacked.detach()]
            for part, grad in zip(self.parts[stacked], stacked.grad, strict=True):
                part.grad = grad
        normalized = are_normalized(rest)
        by_width &= not (keywords.get("normalized", normalized) or keywords["pretrained"])
        groups = [group for stacked in quantized for group in base.groups([stacked])]
        for group, stacked in zip(groups, quantized, strict=True):
            share = share_of_rate(base, stacked[0, 0].numel()) if by_width else 1.0
            own = {"lr": base.lr * share, "weight_decay": base.weight_decay / share}
            ends = not keywords["pretrained"] and getattr(stacked, "is_free_end", False)
            own = {"normalized": normalized and not ends, **own}
            group.update({**own, **keywords}, params=self.parts[stacked])
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

    ``by_width``: as in :class:`OursRun`. ``keywords``, for experiments, go to param groups.
    """

    def __init__(
        self, name: str = "askew_cuda", anneal: dict[str, Any] | None = None, by_width: bool = True, **keywords: Any
    ):
        self.name, self.anneal, self.by_width, self.keywords = name, anneal or {}, by_width, keywords

    def begin(self, quantized, rest, base, width, knob, *, total_steps, pretrained, granularity="tensor"):
        keywords = {
            "quantizer": width if granularity == "tensor" else f"{width}/{granularity}",
            "pretrained": pretrained,
        }
        return OursRun(quantized, rest, base, total_steps, keywords | self.keywords, self.anneal, self.by_width)
