"""Warnings that come from measurements (docs/recipes.md): annealing too early or never, steps too small, steps lost to
rounding, weights that finalize() has to move.
"""

import statistics
import sys
import warnings
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor

from .distributed import gradient_of, local
from .keywords import Group
from .quantizer import codebook_of

EARLY = 0.25  # of the training; free until 20 % instead of half costs a fresh network 1 point of 95 (digits, 1 bit)
# of the training, when the steps are looked at: later the gradients of a network that has learned it all are small
SOON = 0.1
REACH = (
    2.0  # half distances between two levels; every network below it lost 5 points and more, up to 8 small ones lost 6
)
SHORTEST = 100  # steps: a shorter run is a trial
SAMPLE = 65_536  # weights of a tensor that are looked at, its first rows: no copy of a large one is made


def warn(message: str) -> None:
    """Warns, at the line of the caller outside of this package and of torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("askew_cuda", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def was_measured(group: dict[str, Any], total_steps: int) -> bool:
    """Whether this is the kind of training that the traps were measured in: fresh weights, capture, and no mere
    trial.
    """
    return group["pretrained"] is False and group["anneal"] == "capture" and total_steps >= SHORTEST


def warn_of_early_annealing(group: dict[str, Any], r: float, total_steps: int) -> None:
    """``r``: the group's half-width when ``EARLY`` of the training is over."""
    if r < 0.9 and was_measured(group, total_steps):
        warn(
            f"annealing: after {EARLY:.0%} of the training r = {r:.2f} already, on weights that are not pretrained: "
            "they choose their levels while they are free. Leave hold= out for the measured default, or say "
            "pretrained=True to param_groups if they are trained"
        )


def warn_of_small_steps(
    optimizer: torch.optim.Optimizer, groups: Sequence[dict[str, Any]], steps_done: int, total_steps: int
) -> None:
    """Looks once, when ``SOON`` of the training is over, and warns of the first group whose steps are too small for its
    weights to reach another level.
    """
    if steps_done != max(1, round(SOON * total_steps)):
        return
    for group in groups:
        reached = None
        if was_measured(group, total_steps):
            reached = reach(optimizer, group, total_steps - steps_done)
        if reached is not None and reached < REACH:
            warn(
                f"annealing: at lr = {float(group['lr']):g} a weight would go about {reached:.2g} times half the "
                f"distance between two levels until the training ends, if it never turned; below {REACH:g} too few "
                "weights can choose their level. Raise the learning rate (docs/recipes.md has those that work), or "
                "train longer"
            )
            return


def after_step(optimizer: torch.optim.Optimizer, count: int, total: int) -> None:
    """After a step of an optimizer that anneals itself: what there is to say at this count."""
    if count == total + 1:
        warn(
            f"the optimizer has made {count} steps for total_steps = {total}; the annealing has ended: give it the "
            "steps of the whole training"
        )
    groups = [group for group in optimizer.param_groups if group["quantizer"] is not None]
    warn_of_small_steps(optimizer, groups, count, total)


def warn_of_moves(moves: Sequence[tuple[str, int, int, float]], epsilon: float) -> None:
    """Of what finalize() is about to move.

    Args:
        moves: name of each tensor, its number of weights, how many of them are not near their level, and the largest
            distance from one, in units of half the distance between levels.
        epsilon: the largest one of a group.
    """
    moving, total = sum(each[2] for each in moves), sum(each[1] for each in moves)
    if not moving:
        return
    worst = sorted((each for each in moves if each[2]), key=lambda each: each[2] / each[1], reverse=True)
    named = ", ".join(f"{name} ({count / numel:.1%}, by up to {away:.2g})" for name, numel, count, away in worst[:3])
    warn(
        f"finalize: {f'epsilon is still {epsilon:.3g}: ' if epsilon > 0 else ''}{moving / total:.1%} of the weights "
        f"are off their levels and will move, by up to {max(each[3] for each in worst):.3g} of half the distance "
        f"between levels; most in {named}. Nothing has to move when all weights are annealed to the end: total_steps "
        "are those of the whole training, no layer is frozen on the way, and the weights are the last ones, not an "
        "earlier checkpoint"
    )


@torch.no_grad()
def reach(optimizer: torch.optim.Optimizer, group: dict[str, Any], steps_left: int) -> float | None:
    """How far the weights of a group would come if they went on as they go now: the displacement of the base rule, root
    mean square, times ``steps_left``, in half distances between two levels; the median over the group's weights, of
    each its first rows.

    None where no weight has been stepped. Waits for the device.
    """
    levels = codebook_of(group["quantizer"]).levels
    half = (levels[-1] - levels[0]) / (len(levels) - 1) / 2
    each = []
    for weight in group["params"]:
        state = optimizer.state.get(weight, {})
        displacement = _displacement(weight, group, state)
        if displacement is not None and displacement.numel() > 0 and "scale" in state:
            each.append(float(displacement.square().mean().sqrt() / local(state["scale"]).mean()))
    return statistics.median(each) * float(group["lr"]) * steps_left / half if each else None


def _displacement(weight: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor | None:
    """Of the base rule at a learning rate of 1, without its sign; None where there is none yet."""
    if "exp_avg" in state:
        steps, (beta1, beta2) = float(state["step"]), (float(beta) for beta in group["betas"])
        mean, square = (_first_rows(state[key]).float() for key in ("exp_avg", "exp_avg_sq"))
        return mean / (1 - beta1**steps) / ((square / (1 - beta2**steps)).sqrt() + float(group["eps"]))
    moved = state.get("momentum_buffer", gradient_of(weight))
    return None if moved is None else _first_rows(moved).float()


def _first_rows(tensor: Tensor) -> Tensor:
    """The first rows of what lies here, a view."""
    tensor = local(tensor)
    return (
        tensor[: max(1, SAMPLE * len(tensor) // tensor.numel())]
        if tensor.dim() > 0 and tensor.numel() > SAMPLE
        else tensor
    )


LOOKED_AT = 4096  # weights of a tensor that are looked at


def _first(tensor: Tensor) -> Tensor:
    return local(tensor).detach().reshape(-1)[:LOOKED_AT].clone()


class LostSteps:
    """The 16-bit weights that are rounded to nearest, before a step; afterwards :meth:`warn` says how many have stood
    still.

    Reads from the weights' device, which a first step may.
    """

    def __init__(self, groups: list[Group], stepped: Container[Tensor]):
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        for group in groups:
            if group["low_precision"] == "nearest" and float(group["lr"]) != 0:
                for weight in group["params"]:
                    grad = gradient_of(weight)
                    if weight.dtype.itemsize == 2 and grad is not None and weight.numel() and weight not in stepped:
                        self._seen.append((weight, _first(weight), _first(grad)))

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._seen)

    def warn(self) -> None:
        """Warns where more than half of the weights that have a gradient did not move."""
        moving = standing = 0
        for weight, before, grad in self._seen:
            pushed = (grad != 0) & grad.isfinite()
            moving += int(pushed.sum())
            standing += int((pushed & (_first(weight) == before)).sum())
        if moving and standing > moving / 2:
            kinds = ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight, *_ in self._seen}))
            warn(
                f"{standing / moving:.0%} of the {kinds} weights that have a gradient did not move in the first step: "
                "their steps are below half of their last place and are rounded off; low_precision='remainder' (2 more "
                "bytes per weight) or 'stochastic' keeps them"
            )
