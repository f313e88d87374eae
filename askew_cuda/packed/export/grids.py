"""What formats of others share: codes and scales by groups along the last dimension, scales that must survive another
type, and the integers that levels are.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import reference
from ...checks import DTYPES
from ..file import Trained


class Groups(NamedTuple):
    """A quantized tensor as rows of groups."""

    codes: Tensor  # (rows, groups, size) uint8
    scale: Tensor  # (rows, groups), float32 or float64


def last_run(trained: Trained) -> int:
    """How many weights along the last dimension share a scale, wherever one looks; the whole dimension where it does
    not change along it.
    """
    shape, scale = trained.codes.shape, trained.scale
    length = shape[-1] if shape else 1
    if scale.numel() == 1:
        return length
    if scale.dim() == len(shape):
        return length // scale.shape[-1]
    return math.gcd(trained.codes[0].numel() // scale.shape[1], length)  # (rows, groups) of flattened rows


def by_groups(trained: Trained, size: int) -> Groups | None:
    """Groups of ``size`` weights along the last dimension; None where a group would have more than one scale, or the
    last would be smaller.
    """
    shape, run = trained.codes.shape, last_run(trained)
    if not trained.codes.numel() or run % size:
        return None
    codes = trained.codes.reshape(-1, shape[-1] // size if shape else 1, size)
    spread = reference.spread(trained.scale, trained.codes)  # (.., 1 or the last dimension)
    each = spread.expand(shape)[..., ::size] if shape else spread
    return Groups(codes, each.reshape(codes.shape[:2]))


def survives(scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether numbers keep their value in another type."""
    there = scale.to(dtype)
    return bool(((there.to(scale.dtype) == scale) & there.isfinite()).all())


def integers_for(levels: Sequence[float], low: int, high: int) -> tuple[list[int], float] | None:
    """Levels as integers from low to high, times a factor; None where they are none. The factor is the
    largest one.

    >>> integers_for((-1.5, -0.5, 0.5, 1.5), -8, 7)
    ([-3, -1, 1, 3], 0.5)
    >>> integers_for((-0.5, 0.1, 1), -8, 7)
    """
    powers = {2.0**power for power in range(-8, 8)}
    for factor in sorted(powers | {abs(level) for level in levels if level}, reverse=True):
        found = [level / factor for level in levels]
        if all(each == math.floor(each) and low <= each <= high for each in found):
            return [int(each) for each in found], factor
    return None


@torch.no_grad()
def taken_over(model: nn.Module, own: dict[str, Tensor], found: dict[str, Trained | Tensor]) -> list[dict[str, Any]]:
    """Overwrites tensors of a model by what was found for them, and returns param groups for a fresh optimizer:
    quantized weights by quantizer, with their scales, then all others.

    Args:
        model: Mutated.
        own: the tensors of its state_dict, each under one of its names.
        found: values of as many elements, by the same names.
    """
    for name, value in found.items():
        own[name].copy_((value.weight() if isinstance(value, Trained) else value).reshape(own[name].shape))
    groups: dict[object, dict[str, Any]] = {}
    rest: list[tuple[str, Tensor]] = []
    for name, weight in model.named_parameters():
        loaded = found.get(name)
        if isinstance(loaded, Trained):
            kinds = {"channel_dim": 0, "pretrained": "packed", "quantize_frozen": True}
            settings = {"params": [], "quantizer": loaded.quantizer.plain(), "scales": [], **kinds}
            group = groups.setdefault(loaded.quantizer, settings)
            group["params"].append((name, weight))
            group["scales"].append(loaded.scale)
        elif weight.requires_grad or weight.dtype in DTYPES:
            rest.append((name, weight))
    return [*groups.values(), *([{"params": rest, "quantizer": None}] if rest else [])]
