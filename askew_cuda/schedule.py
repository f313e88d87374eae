"""From steps made to ``epsilon``: the shapes of an annealing, when it begins and ends, and from epsilon to a count.

A param group with ``total_steps`` anneals itself: ``steps_done`` counts, ``hold``, ``end`` and ``shape`` say how.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from .quantizer import codebook_of

NEAR = 1 / 64  # of half the distance between levels: a weight that close to its level has arrived
_SNAP = 2**-16  # from there on capture goes all the way, on any dtype (reference.snap_radius)


def near(levels: Sequence[float], dtype: torch.dtype, low_precision: str) -> float:
    """How near a weight must be to its level to have arrived, in units of half the distance between levels. Rounding by
    chance leaves it within one unit in the last place.
    """
    if low_precision != "stochastic" or dtype.itemsize != 2:
        return NEAR
    gap = min(upper - lower for lower, upper in itertools.pairwise(levels))
    return max(NEAR, 2 * torch.finfo(dtype).eps * max(-levels[0], levels[-1]) / gap)


def epsilon_of(r: float) -> float:
    """The paper's epsilon of a half-width r in [0, 1]: (r (2 - r))^2, algorithm.md section 1."""
    return (r * (2 - r)) ** 2


def half_width_of(epsilon: float) -> float:
    """The half-width of an epsilon in [0, 1]: sqrt(eps) / (1 + sqrt(1 - sqrt(eps)))."""
    root = math.sqrt(epsilon)
    return root / (1 + math.sqrt(1 - root))


def quadratic(z: float) -> float:
    """(1 - z)^2, z from 0 (annealing starts) to 1 (levels only)."""
    return (1 - z) ** 2


def geometric(z: float) -> float:
    """epsilon falls by the same factor in every step, as the authors' does, from 1 to 1e-6; 0 at the end."""
    return half_width_of(1e-6**z) if z < 1 else 0.0


SHAPES = {"quadratic": quadratic, "geometric": geometric}


def default_phase(levels: int, pretrained: bool | str) -> tuple[float, float]:
    """(hold, end) as fractions of the training, as measured (docs/recipes.md): the more levels, the later they need to
    be chosen.
    """
    if levels >= 8:
        return 0.7, 0.9
    if pretrained is True:
        return 0.0, 0.95
    return (0.5 if levels <= 2 or pretrained == "packed" else 0.6), 0.95


@functools.cache
def settling_steps(anneal: str, recovery: float, max_step: float) -> int:
    """Steps that the pull alone takes from half-way between two levels onto one of them (capture), or as near to it as
    counts as arrived (interval, which never quite arrives). 18 with the defaults.

    Args:
        anneal: "capture" or "interval". recovery: in (0, 1]. max_step: > 0, in units of half the distance between
            levels.
    """
    delta, steps, near = 1.0, 1, _SNAP if anneal == "capture" else NEAR / 2
    while delta >= near:  # (E2'), (E2) of reference.py at r = 0
        pull = recovery * delta
        if anneal == "interval":
            pull = recovery / 4 * delta * (2 - delta) / (1 - delta) if delta < 1 else math.inf
        delta, steps = delta - min(pull, max_step, delta), steps + 1
    return steps


def phase(group: dict[str, Any]) -> tuple[float, float]:
    """(hold, end) of a quantized group, fractions of its ``total_steps``: its own, and where it leaves them None the
    default for its levels. The weights need a number of steps, not a share of them, to reach their levels once only
    those are left: in a short training a default ``end`` comes earlier, though not in its first half, and a default
    ``hold`` by the same factor.

    Raises: ValueError: hold is not before end.
    """
    levels = len(codebook_of(group["quantizer"]))
    hold, end = default_phase(levels, group["pretrained"])
    if group["end"] is not None:
        end = group["end"]
    elif group["recovery"] is not None:  # alpha is a rate per unit of lr, which nobody knows in advance
        total = group["total_steps"]
        settling = settling_steps(group["anneal"], float(group["recovery"]), float(group["max_step"]))
        last = max(total - settling, total / 2) / total
        if group["hold"] is not None:
            last = max(last, group["hold"] + 1 / total)
        if last < end:
            hold, end = hold * last / end, last
    hold = hold if group["hold"] is None else group["hold"]
    if not 0 <= hold < end <= 1:
        raise ValueError(f"hold = {hold}, end = {end}; 0 <= hold < end <= 1 is needed")
    return hold, end


def half_width(group: dict[str, Any], progress: float) -> float:
    """r of a quantized group with ``total_steps`` at a progress in [0, 1].

    Raises: ValueError: its ``shape`` is a callable, and gives no half-width in [0, 1].
    """
    shape = group["shape"]
    if callable(shape):
        r = shape(progress)
        with contextlib.suppress(TypeError, ValueError):
            r = float(r)
        if not (isinstance(r, float) and 0 <= r <= 1):
            raise ValueError(f"shape({progress}) = {r!r}; a half-width in [0, 1] is needed")
        return r
    hold, end = group["hold"], group["end"]
    if hold is None or end is None:
        hold, end = phase(group)
    if progress <= hold:
        return 1.0
    return SHAPES[shape]((progress - hold) / (end - hold)) if progress < end else 0.0


def epsilon_at(group: dict[str, Any], count: int) -> float:
    """epsilon of a quantized group with ``total_steps``, for the step that comes after ``count`` steps."""
    return epsilon_of(half_width(group, min(count / group["total_steps"], 1.0)))


def count_at(group: dict[str, Any], epsilon: float) -> int:
    """The least count of steps at which a quantized group with ``total_steps`` is down to ``epsilon``; ``total_steps``
    where it never is. By bisection: ``shape`` must not rise.
    """
    low, high = 0, group["total_steps"]
    wanted = epsilon * (1 + 2**-23)  # which a tensor may have rounded to float32
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if epsilon_at(group, middle) <= wanted else (middle + 1, high)
    return low


def next_state(group: dict[str, Any]) -> tuple[int, Any] | None:
    """``steps_done`` and ``epsilon`` after one more step; None where the group has no ``total_steps``. Changes nothing.

    Raises: as :func:`half_width`.
    """
    total = group["total_steps"]
    if total is None:
        return None
    count = group["steps_done"] + 1
    if group["quantizer"] is None or count > total:
        return count, group["epsilon"]
    r = half_width(group, count / total)
    return count, (r * (2 - r)) ** 2  # epsilon_of, without a call


def advance(group: dict[str, Any]) -> None:
    """Counts a step that was made, and sets epsilon for the next one; in place where it is a tensor."""
    state = next_state(group)
    if state is not None:
        group["steps_done"], epsilon = state
        if type(group["epsilon"]) is float:
            group["epsilon"] = epsilon
        else:
            put_epsilon(group, epsilon)


def put_epsilon(group: dict[str, Any], epsilon: Any) -> None:
    """Sets a group's epsilon, in place where it is a tensor."""
    if not isinstance(group["epsilon"], torch.Tensor):
        group["epsilon"] = epsilon
    elif epsilon is not group["epsilon"]:
        group["epsilon"].fill_(epsilon)
