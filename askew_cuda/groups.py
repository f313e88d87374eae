"""Param groups whose weights have levels: keywords, quantizers, scales."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import ops, scales
from .interrupts import deferred
from .keywords import CONSTRAINT, check_group, resolve_rate
from .quantizer import Quantizer

Group = dict[str, Any]


def counter_dtype() -> torch.dtype:
    """What torch counts steps in: float64 where that is the default dtype, else float32."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


class GroupedOptimizer(torch.optim.Optimizer):
    """An optimizer whose param groups may bring a quantizer and the keywords around it, all of them checked before they are taken."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any], constraint: dict[str, Any]):
        unknown = set(constraint) - set(CONSTRAINT)
        if unknown:
            raise TypeError(
                f"{type(self).__name__}: unknown keywords {', '.join(sorted(unknown))}; beyond torch's there are {', '.join(CONSTRAINT)}"
            )
        self._start()
        super().__init__(params, {**defaults, **CONSTRAINT, **constraint})

    def _start(self) -> None:
        """What is neither saved nor copied."""
        self.outputs: dict[Tensor, dict[str, Tensor]] = {}
        self.first_elements: dict[Tensor, int] = {}  # of weights that are parts of larger ones, for stochastic rounding
        self._stepped: dict[Tensor, bool] = {}  # weights that received a gradient
        self._parsed: list[tuple[object, Quantizer]] = []
        self._fresh_norms: bool | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_parsed" not in self.__dict__:  # unpickled or copied; load_state_dict also comes through here
            self._start()
        self._stepped.update((weight, True) for weight, kept in self.state.items() if kept and isinstance(weight, Tensor))
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            self._quantizer(group)

    @staticmethod
    def _check_rule(group: Group) -> None:
        """Ranges of what the rule alone has."""
        raise NotImplementedError

    def add_param_group(self, param_group: Group) -> None:
        """As torch's; the group may bring any of the keywords of the constructor. Nothing is added when one is wrong."""
        group = dict(param_group)
        if not isinstance(group["params"], (Tensor, set)):  # torch wraps the one and refuses the other
            group["params"] = list(group["params"])
        group["recovery"], group["alpha"] = resolve_rate(group, self.defaults, group.get("skew_at", self.defaults["skew_at"]))
        quantizer = self._check(group)
        group["quantizer"] = None if quantizer is None else quantizer.plain()
        group["outputs"] = list(group.get("outputs", self.defaults["outputs"]))
        group["state_dtype"] = None if group.get("state_dtype", self.defaults["state_dtype"]) is None else "float32"
        super().add_param_group(group)
        self._fresh_norms = None
        unique = {weight: i for i, weight in reversed(list(enumerate(group["params"])))}  # torch has warned of others
        for key in {"params", "param_names"} & set(group):
            group[key] = [group[key][i] for i in reversed(unique.values())]
        self._quantizer(group)

    def _check(self, group: Group) -> Quantizer | None:
        """Whether the group, and the defaults where it is silent, can be stepped; its quantizer."""
        settings = {**self.defaults, **group}
        check_group(settings)
        self._check_rule(settings)
        quantizer = None if settings["quantizer"] is None else Quantizer.parse(settings["quantizer"])
        self._check_weights(settings["params"], settings, quantizer)
        return quantizer

    @staticmethod
    def _check_weights(params: Any, settings: Group, quantizer: Quantizer | None) -> None:
        """Whether the weights of a group can be stepped as the group says."""
        for index, item in enumerate([params] if isinstance(params, Tensor) else params):
            name, weight = item if isinstance(item, tuple) else (f"params[{index}]", item)
            if not isinstance(weight, Tensor):
                continue  # torch's own error says it best
            if weight.layout != torch.strided or weight.is_complex() or weight.dtype not in ops.DTYPES:
                raise TypeError(
                    f"{name} is {weight.dtype} ({weight.layout}); dense float32, float64, bfloat16 and float16 weights can be stepped"
                )
            if settings["state_dtype"] is not None and weight.dtype == torch.float64:
                raise ValueError(f"state_dtype = float32, but {name} is float64; it is for 16-bit weights")
            if settings.get("capturable") and weight.device.type == "cpu":
                raise ValueError(f"capturable = True, but {name} is on the CPU; it is for weights on a GPU, in CUDA graphs. Leave it False")
            if quantizer is not None:
                quantizer.check(weight, name)
            chosen = GroupedOptimizer._choose(settings, weight.device, weight.dtype)
            if settings["fused"] and chosen == "reference":
                raise RuntimeError(f"fused = True, but the pure PyTorch reference would step {name} on {weight.device}; leave it None")

    @staticmethod
    def _choose(group: Group, device: torch.device, dtype: torch.dtype) -> str:
        """The backend of weights of a group."""
        rounds = dtype.itemsize == 2 and group["low_precision"] != "nearest"
        return ops.choose(group["backend"], device, dtype, rounds)

    def _quantizer(self, group: Group) -> Quantizer | None:
        plain = group["quantizer"]
        if plain is None:
            return None
        for known, quantizer in self._parsed:
            if known == plain:
                return quantizer
        self._parsed.append((plain, Quantizer.parse(plain)))
        return self._parsed[-1][1]

    def _named(self, group: Group) -> Iterator[tuple[str, Tensor]]:
        names = group.get("param_names")
        where = next(i for i, each in enumerate(self.param_groups) if each is group)
        for i, weight in enumerate(group["params"]):
            yield (names[i] if names else f"param_groups[{where}]['params'][{i}]"), weight

    def _scale(self, weight: Tensor) -> Tensor | None:
        """The weight's scale, if it is set."""
        return self.state[weight].get("scale") if weight in self.state else None

    def _has_fresh_norms(self) -> bool:
        """Whether the optimizer has weights of normalisation layers, as they are before a training; looked at once, not for each weight."""
        if self._fresh_norms is None:
            self._fresh_norms = any(scales.is_fresh_gain(weight.detach()) for group in self.param_groups for weight in group["params"])
        return self._fresh_norms

    def _estimate(self, group: Group, quantizer: Quantizer, name: str, weight: Tensor) -> Tensor:
        normalized = group["normalized"]
        if normalized is None and not group["pretrained"]:
            normalized = self._has_fresh_norms()
        return scales.estimate(weight.detach(), quantizer, pretrained=group["pretrained"], normalized=bool(normalized), name=name)

    def _new_scale(self, group: Group, quantizer: Quantizer, name: str, weight: Tensor) -> Tensor:
        """A weight's scale, to be set for ever; warns when the first clip would tear a trained network apart."""
        scale = self._estimate(group, quantizer, name, weight)
        if group["clip"] and not (group["pretrained"] or scales.is_torch_default(weight) or self._has_fresh_norms()):
            outside = scales.share_outside(weight.detach(), scale, quantizer.codebook.levels)
            if outside > 0.25:
                warnings.warn(
                    f"{name}: clipping to the outermost levels will move {outside:.0%} of its weights in the first step; "
                    "if the network is trained already, pass pretrained=True; clip=False leaves them outside",
                    stacklevel=4,
                )
        return scale

    @torch.no_grad()
    def prepare(self) -> None:
        """Sets every quantized weight's scale now, from the weights as they are, instead of at its first step.

        It is the one moment that may synchronise with a device: call it before capturing a graph or compiling.

        Raises:
            ValueError: a weight holds NaN, infinity or nothing but zeros; the message names it. No scale has been set then.
        """
        found = {}
        for group in self.param_groups:
            quantizer = self._quantizer(group)
            if quantizer is not None:
                for name, weight in self._named(group):
                    if self._scale(weight) is None:
                        found[weight] = self._new_scale(group, quantizer, name, weight)
        with deferred():
            for weight, scale in found.items():
                self.state[weight]["scale"] = scale

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.param_groups):
            quantizer = self._quantizer(group)
            kinds = dict.fromkeys((weight.device, weight.dtype) for weight in group["params"])
            rounds = group["low_precision"] != "nearest"
            chosen = [ops.explain(group["backend"], device, dtype, rounds and dtype.itemsize == 2) for device, dtype in kinds]
            shown = {key: value for key, value in sorted(group.items()) if key not in ("params", "param_names")}
            shown["quantizer"] = None if quantizer is None else quantizer.summary()
            lines += [f"Parameter Group {i}", *(f"    {key}: {value}" for key, value in shown.items())]
            lines.append(f"    runs on: {', '.join(chosen) or 'nothing'}")
        return "\n".join([*lines, ")"])
