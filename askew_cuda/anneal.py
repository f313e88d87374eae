"""Training progress to half-width r to the ``epsilon`` of every quantized param group."""

import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch

from . import hints
from .quantizer import Quantizer


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


class Anneal:
    """Shrinks the feasible set of an optimizer's quantized weights while training goes on.
    Call :meth:`step` after every ``optimizer.step()``; any learning-rate scheduler may run beside it. r stays 1 until
       ``hold``, then falls to 0 at ``end``, and ``group["epsilon"]`` follows (in place where it is a tensor).

       Args:
           optimizer: an AskewSGD or AskewAdamW with at least one quantized param group.
           total_steps: optimizer steps of the whole training, >= 1.
           hold, end: fractions of ``total_steps``, 0 <= hold < end <= 1; None takes the default of each group, which
               depends on its number of levels and on ``pretrained``.
           shape: "quadratic", "geometric", or a callable that takes progress in [0, 1] (of the whole training: hold and
               end don't act) to r in [0, 1].

       Raises:
           ValueError, TypeError: an argument is out of range, or no group is quantized.
    Warns where a training of 100 steps or more enters a trap that was measured (``hints.py``): fresh weights are annealed
       too early, or the learning rate is too small for them to reach another level.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        hold: float | None = None,
        end: float | None = None,
        shape: str | Callable[[float], float] = "quadratic",
    ):
        if isinstance(total_steps, bool) or not isinstance(total_steps, int):
            raise TypeError(f"Anneal: total_steps = {total_steps!r}; a whole number of optimizer steps is needed")
        if total_steps < 1:
            raise ValueError(f"Anneal: total_steps = {total_steps}; at least 1 is needed")
        if not callable(shape) and shape not in SHAPES:
            raise ValueError(f"Anneal: shape = {shape!r}; {', '.join(map(repr, SHAPES))} or a callable progress -> r")
        self.optimizer, self.total_steps, self.hold, self.end, self.shape = optimizer, total_steps, hold, end, shape
        self.steps_done = 0
        self._warned = False
        self._unannealed = 0
        groups = self._groups()
        if not groups:
            raise ValueError(
                "Anneal: the optimizer has no quantized param group; pass quantizer=, or groups from askew_cuda.param_groups"
            )
        for group in groups:
            first, last = self._phase(group)
            if not 0 <= first < last <= 1:
                raise ValueError(f"Anneal: hold = {first}, end = {last}; 0 <= hold < end <= 1 is needed")
        self._watch()
        self._apply()
        for group in groups:
            hints.warn_of_early_annealing(group, self.half_width(group, hints.EARLY), total_steps)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for group in self.optimizer.param_groups if group.get("quantizer") is not None]

    def _phase(self, group: dict[str, Any]) -> tuple[float, float]:
        hold, end = default_phase(len(Quantizer.parse(group["quantizer"]).codebook), group["pretrained"])
        return (hold if self.hold is None else self.hold), (end if self.end is None else self.end)

    def half_width(self, group: dict[str, Any], progress: float) -> float:
        """r of a param group at a progress in [0, 1]."""
        if callable(self.shape):
            r = float(self.shape(progress))
            if not 0 <= r <= 1:
                raise ValueError(f"Anneal: shape({progress}) = {r}; a half-width in [0, 1] is needed")
            return r
        hold, end = self._phase(group)
        z = min(max((progress - hold) / (end - hold), 0.0), 1.0)
        return SHAPES[self.shape](z)

    def step(self) -> None:
        """One optimizer step further. Past ``total_steps`` it warns once, and r stays where it ended."""
        self.steps_done += 1
        if self.steps_done > self.total_steps and not self._warned:
            self._warned = True
            warnings.warn(
                f"Anneal.step() was called {self.steps_done} times for total_steps = {self.total_steps}; "
                "the annealing has ended: give it the steps of the whole training",
                stacklevel=2,
            )
        self._look_ahead()
        self._apply()

    def _look_ahead(self) -> None:
        """Once, early in the training: are the steps large enough for the weights to reach another level?"""
        if self.steps_done == max(1, round(hints.SOON * self.total_steps)):
            for group in self._groups():
                if hints.warn_of_small_steps(
                    self.optimizer, group, self.total_steps - self.steps_done, self.total_steps
                ):
                    break

    def _apply(self) -> None:
        progress = min(self.steps_done / self.total_steps, 1.0)
        for group in self._groups():
            epsilon = epsilon_of(self.half_width(group, progress))
            if isinstance(group["epsilon"], torch.Tensor):
                group["epsilon"].fill_(epsilon)
            else:
                group["epsilon"] = epsilon

    def _watch(self) -> None:
        """Warns, once, when the optimizer has come to where annealing should begin and step() was never called."""
        due = max(2, min(round(self._phase(group)[0] * self.total_steps) for group in self._groups()))
        this = weakref.ref(self)

        def count(optimizer: object, args: object, kwargs: object) -> None:
            # stays registered: torch forbids a hook to remove itself while hooks run
            anneal = this()
            if anneal is None or anneal.steps_done > 0 or anneal._unannealed > due:
                return
            anneal._unannealed += 1
            if anneal._unannealed > due:
                warnings.warn(
                    f"the optimizer has made {anneal._unannealed} steps and Anneal.step() was never called: the weights will not reach "
                    "their levels; call it after every optimizer.step()",
                    stacklevel=2,
                )

        self.optimizer.register_step_post_hook(count)

    def state_dict(self) -> dict[str, Any]:
        """Plain values; a callable ``shape`` is not among them."""
        shape = None if callable(self.shape) else self.shape
        return {
            "steps_done": self.steps_done,
            "total_steps": self.total_steps,
            "hold": self.hold,
            "end": self.end,
            "shape": shape,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the saved one was, and sets the groups' epsilon accordingly.

        Raises:
            ValueError: keys are missing, or the saved annealing had a callable ``shape`` and this one has none.
        """
        missing = {"steps_done", "total_steps", "hold", "end", "shape"} - set(state)
        if missing:
            raise ValueError(
                f"Anneal.load_state_dict: {', '.join(sorted(missing))} missing; a dictionary from Anneal.state_dict() is needed"
            )
        if state["shape"] is None and not callable(self.shape):
            raise ValueError(
                "Anneal.load_state_dict: the saved annealing had a callable shape; construct this one with the same callable"
            )
        self.steps_done, self.total_steps, self.hold, self.end = (
            state[key] for key in ("steps_done", "total_steps", "hold", "end")
        )
        if state["shape"] is not None:
            self.shape = state["shape"]
        self._apply()
