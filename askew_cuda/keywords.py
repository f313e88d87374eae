"""The keywords of a param group beyond torch.optim's: defaults, ranges, and which of two rates holds."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]

# Keywords of a quantized param group beyond torch.optim's, and their defaults.
CONSTRAINT = {
    "quantizer": None,
    "pretrained": False,
    "normalized": False,
    "trained_norms": False,
    "channel_dim": 0,
    "fan_in": None,
    "quantize_frozen": False,
    "epsilon": 1.0,
    "recovery": None,
    "alpha": None,
    "anneal": "capture",
    "skew_at": "velocity",
    "max_step": 0.5,
    "clip": True,
    "outputs": (),
    "state_dtype": None,
    "low_precision": "nearest",
    "seed": 0,
    "backend": "auto",
}
# These say how a machine computes, not what: a checkpoint does not bring them along.
EXECUTION = ("backend", "outputs", "foreach", "fused", "capturable", "differentiable")
# These say what the layers of this model are, and belong to its weights as their names do.
LAYERS = ("channel_dim", "fan_in")


def counter_dtype() -> torch.dtype:
    """What torch counts steps in: float64 where that is the default dtype, else float32."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def resolve_rate(group: dict[str, Any], defaults: dict[str, Any], skew_at: str) -> tuple[float | None, float | None]:
    """(recovery, alpha), one of them None: the group's own, else the optimizer's, else recovery 0.5 or, on the
    gradient, alpha 1.
    """
    for source in (group, defaults):
        recovery, alpha = source.get("recovery"), source.get("alpha")
        if recovery is not None and alpha is not None:
            raise ValueError(f"recovery = {recovery}, alpha = {alpha}: give one of them")
        if recovery is not None or alpha is not None:
            return recovery, alpha
    return (None, 1.0) if skew_at == "gradient" else (0.5, None)


def _check(group: Group, name: str, good: bool, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name} = {group[name]!r}; {wanted}")


def _check_number(group: Group, name: str, good: Callable[[float], bool], wanted: str) -> None:
    value = group[name]
    if isinstance(value, Tensor):
        _check(group, name, value.numel() == 1, "a tensor must hold one number")
        if value.device.type != "cpu":
            return  # reading it would wait for the device
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} = {value!r}; a number is needed")
    _check(group, name, good(float(value)), wanted)


def _check_layers(group: Group) -> None:
    """Whether what a group says of its layers has the form that it should; the weights' shapes are not looked at."""

    dim, fan_in = group["channel_dim"], group["fan_in"]
    dims = dim if isinstance(dim, (tuple, list)) and dim else [dim]
    _check(
        group,
        "channel_dim",
        all(type(each) is int for each in dims),
        "the weights' output dimension is needed, such as 0, or, for stacked experts, those of expert and output, such "
        "as (0, 2)",
    )
    fans = fan_in if isinstance(fan_in, (tuple, list)) else [fan_in]
    _check(
        group,
        "fan_in",
        all(each is None or (type(each) is int and each >= 1) for each in fans),
        "how many weights are summed up into one output, or a list with one such number for each weight of the group; "
        "None where it is not known",
    )
    _check(group, "normalized", group["normalized"] in (None, False, True), "True, or False, which None also means")
    for name in ("trained_norms", "quantize_frozen"):
        _check(group, name, isinstance(group[name], bool), "True or False")


def check_group(group: Group) -> None:
    """Ranges of what every group has; raises before anything is changed."""
    check, number = functools.partial(_check, group), functools.partial(_check_number, group)
    number("lr", lambda x: x >= 0, "a learning rate is at least 0")
    number("weight_decay", lambda x: x >= 0, "weight decay is at least 0")
    number(
        "epsilon",
        lambda x: 0 <= x <= 1,
        "the annealed number lies in [0, 1]: 1 is unconstrained, 0 leaves the levels (it is not Adam's eps)",
    )
    number("max_step", lambda x: x > 0, "above 0, in units of half the distance between levels; inf for no cap")
    check("anneal", group["anneal"] in ("capture", "interval"), "'capture' or 'interval'")
    check("skew_at", group["skew_at"] in ("velocity", "gradient"), "'velocity' or 'gradient'")
    if group["recovery"] is not None:
        number("recovery", lambda x: 0 < x <= 1, "the share of the distance that a step removes lies in (0, 1]")
        check(
            "recovery",
            group["skew_at"] == "velocity",
            "with skew_at = 'gradient' give alpha: momentum would amplify a recovery",
        )
    if group["alpha"] is not None:
        number("alpha", lambda x: 0 < x < math.inf, "a finite rate above 0 per unit of lr")
    check(
        "skew_at",
        group["skew_at"] == "velocity" or group["anneal"] == "interval",
        "skew_at = 'gradient' needs anneal = 'interval'",
    )
    check("pretrained", group["pretrained"] in (False, True, "packed"), "False, True or 'packed'")
    _check_layers(group)
    check("clip", isinstance(group["clip"], bool), "True or False")
    check("maximize", isinstance(group["maximize"], bool), "True or False")
    outputs = group["outputs"]
    check(
        "outputs",
        not isinstance(outputs, str) and set(outputs) <= {"codes", "snapped"},
        "a list of 'codes' and 'snapped'",
    )
    check("outputs", not outputs or group["quantizer"] is not None, "outputs need a quantizer")
    check(
        "state_dtype",
        group["state_dtype"] in (None, torch.float32, "float32"),
        "None (the weight's dtype) or torch.float32",
    )
    check(
        "low_precision",
        group["low_precision"] in ("nearest", "remainder", "stochastic"),
        "'nearest', 'remainder' or 'stochastic'",
    )
    seed = group["seed"]
    whole = (
        seed.dtype == torch.int64 and seed.numel() == 1
        if isinstance(seed, Tensor)
        else type(seed) is int and 0 <= seed < 2**63
    )
    check("seed", whole, "a whole number in [0, 2^63), or a 0-d int64 tensor")
    check("differentiable", not group["differentiable"], "the step is not differentiable; leave it False")
    check("foreach", not (group["foreach"] and group["fused"]), "foreach and fused exclude each other")
