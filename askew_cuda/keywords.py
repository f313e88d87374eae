"""The keywords of a param group beyond torch.optim's: defaults, ranges, and which of two rates holds."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import OF_BOTH
from .reference import Settings
from .schedule import SHAPES

Group = dict[str, Any]


class Keyword(NamedTuple):
    """A keyword of a param group: its default, which values are good, and what is wanted instead of others."""

    default: Any
    good: Callable[[Any], bool]
    wanted: str
    kind: str = "any"  # "number": a float, or a tensor of one; "whole": an int. Others are a TypeError
    optional: bool = False  # None is good, too


def _among(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_outputs(outputs: Any) -> bool:
    return isinstance(outputs, (list, tuple, set, frozenset)) and set(outputs) <= {"codes", "snapped"}


def _is_seed(seed: Any) -> bool:
    if isinstance(seed, Tensor):
        return seed.dtype == torch.int64 and seed.numel() == 1
    return type(seed) is int and 0 <= seed < 2**63


def _is_channel_dim(dim: Any) -> bool:
    """Whether it has the form of one; the weights' shapes are not looked at."""
    dims = dim if isinstance(dim, (tuple, list)) and dim else [dim]
    return all(type(each) is int for each in dims)


def _is_fan_in(fan_in: Any) -> bool:
    fans = fan_in if isinstance(fan_in, (tuple, list)) else [fan_in]
    return all(each is None or (type(each) is int and each >= 1) for each in fans)


def _is_init_bound(bound: Any) -> bool:
    bounds = bound if isinstance(bound, (tuple, list)) else [bound]
    return all(each is None or (type(each) in (int, float) and 0 < each < math.inf) for each in bounds)


_CHANNEL_DIM = (
    "the weights' output dimension is needed, such as 0, or, for stacked experts, those of expert and output, such as "
    "(0, 2)"
)
_FAN_IN = (
    "how many weights are summed up into one output, or a list with one such number for each weight of the group; None "
    "where it is not known"
)
_INIT_BOUND = (
    "the layer's fresh weights are uniform within plus and minus this number, above 0; or a list with one such number "
    "for each weight of the group; None where it is 1 / sqrt(fan_in)"
)
_SHARE = "a share of total_steps lies in [0, 1]"
_SHAPES = f"{', '.join(map(repr, SHAPES))} or a callable progress -> r"
_ANNEALED = "the annealed number lies in [0, 1]: 1 is unconstrained, 0 leaves the levels (it is not Adam's eps)"

# Keywords of a quantized param group beyond torch.optim's. Quantizers are checked where they are parsed, backends where
# they are chosen.
_OURS = {
    "quantizer": Keyword(None, lambda _: True, ""),
    "pretrained": Keyword(False, _among(False, True, "packed"), "False, True or 'packed'"),
    "normalized": Keyword(False, _among(None, False, True), "True, or False, which None also means"),
    "trained_norms": Keyword(False, _among(False, True), "True or False"),
    "channel_dim": Keyword(0, _is_channel_dim, _CHANNEL_DIM),
    "fan_in": Keyword(None, _is_fan_in, _FAN_IN),
    "init_bound": Keyword(None, _is_init_bound, _INIT_BOUND),
    "quantize_frozen": Keyword(False, _among(False, True), "True or False"),
    "epsilon": Keyword(1.0, lambda x: 0 <= x <= 1, _ANNEALED, "number"),
    "total_steps": Keyword(None, lambda x: x >= 1, "at least 1 is needed", "whole", optional=True),
    "hold": Keyword(None, lambda x: 0 <= x <= 1, _SHARE, "number", optional=True),
    "end": Keyword(None, lambda x: 0 <= x <= 1, _SHARE, "number", optional=True),
    "shape": Keyword("quadratic", lambda x: callable(x) or (isinstance(x, str) and x in SHAPES), _SHAPES),
    "steps_done": Keyword(0, lambda x: x >= 0, "a count of steps is at least 0", "whole"),
    "scale_lr": Keyword(
        None, lambda x: 0 <= x < math.inf, "a finite multiple of lr, at least 0", "number", optional=True
    ),
    "short_scales": Keyword(None, _among(None, False, True), "True, False, or None: as the quantizer's format needs"),
    "recovery": Keyword(
        None,
        lambda x: 0 < x <= 1,
        "the share of the distance that a step removes lies in (0, 1]",
        "number",
        optional=True,
    ),
    "alpha": Keyword(None, lambda x: 0 < x < math.inf, "a finite rate above 0 per unit of lr", "number", optional=True),
    "anneal": Keyword("capture", _among("capture", "interval"), "'capture' or 'interval'"),
    "skew_at": Keyword("velocity", _among("velocity", "gradient"), "'velocity' or 'gradient'"),
    "max_step": Keyword(
        0.5, lambda x: x > 0, "above 0, in units of half the distance between levels; inf for no cap", "number"
    ),
    "clip": Keyword(True, is_flag, "True or False"),
    "outputs": Keyword((), _is_outputs, "a list of 'codes' and 'snapped'"),
    "state_dtype": Keyword(None, _among(None, torch.float32, "float32"), "None (the weight's dtype) or torch.float32"),
    "low_precision": Keyword(
        "nearest", _among("nearest", "remainder", "stochastic"), "'nearest', 'remainder' or 'stochastic'"
    ),
    "seed": Keyword(0, _is_seed, "a whole number in [0, 2^63), or a 0-d int64 tensor"),
    "backend": Keyword("auto", lambda _: True, ""),
}
# Those of torch.optim that both rules have; their defaults are in the constructors.
_TORCHS = {
    "lr": Keyword(..., lambda x: x >= 0, "a learning rate is at least 0", "number"),
    "weight_decay": Keyword(..., lambda x: x >= 0, "weight decay is at least 0", "number"),
    "maximize": Keyword(..., is_flag, "True or False"),
    "differentiable": Keyword(..., lambda x: not x, "the step is not differentiable; leave it False"),
}
# A scalar of the method without a range of its own: any number, with the default that the reference gives it.
_OURS |= {
    name: Keyword(default, lambda x: isinstance(x, (bool, int, float)), "a number is needed")
    for name, default in Settings._field_defaults.items()
    if name in OF_BOTH and name not in {*_TORCHS, *_OURS, "grad_scale"}
}
KEYWORDS = {**_TORCHS, **_OURS}
CONSTRAINT = {name: keyword.default for name, keyword in _OURS.items()}

# What depends on two keywords, once each of them is good: (both, good, wanted of the first).
_PAIRS: tuple[tuple[tuple[str, str], Callable[[Any, Any], bool], str], ...] = (
    (
        ("recovery", "skew_at"),
        lambda recovery, skew_at: recovery is None or skew_at == "velocity",
        "with skew_at = 'gradient' give alpha: momentum would amplify a recovery",
    ),
    (
        ("skew_at", "anneal"),
        lambda skew_at, anneal: skew_at == "velocity" or anneal == "interval",
        "skew_at = 'gradient' needs anneal = 'interval'",
    ),
    (
        ("outputs", "quantizer"),
        lambda outputs, quantizer: not outputs or quantizer is not None,
        "outputs need a quantizer",
    ),
    (("foreach", "fused"), lambda foreach, fused: not (foreach and fused), "foreach and fused exclude each other"),
)

_PAIRED = frozenset(name for pair, _, _ in _PAIRS for name in pair)

# These say how a machine computes, not what: a checkpoint does not bring them along.
EXECUTION = ("backend", "outputs", "foreach", "fused", "capturable", "differentiable")
# These say what the layers of this model are, and belong to its weights as their names do.
LAYERS = ("channel_dim", "fan_in", "init_bound")
# These say how this training is to be annealed: a checkpoint does not bring them along, but for how far it has come.
SCHEDULE = ("total_steps", "hold", "end", "shape")


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


def check_keywords(group: dict[str, Any], names: Iterable[str] | None = None) -> None:
    """Whether keywords of a group are good, by themselves and together; all of them, or those of these names.

    Raises: ValueError, TypeError: with the keyword, its value and what is wanted. A tensor that is not on the CPU is
        not read, which would wait for its device.
    """
    check_each(group, KEYWORDS if names is None else {name: KEYWORDS[name] for name in names if name in KEYWORDS})
    wanted = _PAIRED if names is None else _PAIRED.intersection(names)
    for pair, good, remedy in _PAIRS if wanted else ():
        if not wanted.isdisjoint(pair) and not good(*(group[name] for name in pair)):
            raise ValueError(f"{pair[0]} = {group[pair[0]]!r}; {remedy}")


def check_state_dtype(group: dict[str, Any], weight: Tensor, name: str) -> None:
    """Raises ValueError where a group asks for wide states of a weight that is wider."""
    if group["state_dtype"] is not None and weight.dtype == torch.float64:
        raise ValueError(
            f"state_dtype = float32, but {name} is float64; it is for 16-bit weights. Set it to None; where a model "
            "changed its dtype after it was stepped, optimizer.load_state_dict(optimizer.state_dict()) then casts the "
            "state"
        )


def check_each(group: dict[str, Any], keywords: Mapping[str, Keyword]) -> None:
    """Whether each of these keywords of a group is good by itself."""
    for name, keyword in keywords.items():
        if not (keyword.optional and group[name] is None):
            _check_one(name, group[name], keyword)


def _check_one(name: str, value: Any, keyword: Keyword) -> None:
    if keyword.kind == "number" and isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} = {value!r}; a tensor must hold one number")
        if value.device.type != "cpu":
            return
    elif keyword.kind != "any":
        wanted = (int,) if keyword.kind == "whole" else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted):
            needed = "a whole number" if keyword.kind == "whole" else "a number"
            raise TypeError(f"{name} = {value!r}; {needed} is needed")
    if not keyword.good(float(value) if keyword.kind == "number" else value):
        raise ValueError(f"{name} = {value!r}; {keyword.wanted}")
