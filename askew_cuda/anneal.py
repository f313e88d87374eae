"""Anneal: schedules of one's own, and captured graphs. Else an optimizer with ``total_steps`` anneals itself."""

import weakref
from collections.abc import Callable
from typing import Any

import torch

from . import hints
from .keywords import check_keywords
from .schedule import (
    SHAPES,
    count_at,
    default_phase,
    epsilon_at,
    epsilon_of,
    half_width,
    half_width_of,
    phase,
    put_epsilon,
)
from .wrappers import layers

__all__ = ["SHAPES", "Anneal", "default_phase", "epsilon_of", "half_width_of"]


class Anneal:
    """Shrinks the feasible set of an optimizer's quantized weights while training goes on, for a schedule that changes
    on the way, or a captured CUDA graph, which it tells by an ``epsilon`` that is a tensor. Else give the optimizer
    itself ``total_steps``, which needs no second object.

    Call :meth:`step` after every ``optimizer.step()``; any learning-rate scheduler may run beside it. r stays 1 until
    ``hold``, then falls to 0 at ``end``, and ``group["epsilon"]`` follows (in place where it is a tensor). Where an
    epsilon is below 1 already, it goes on from there: ``steps_done`` begins at the count that has this epsilon.

    Args:
        optimizer: an AskewSGD or AskewAdamW with at least one quantized param group and no ``total_steps``, or a
            wrapper of one (accelerate, Lightning, ZeRO).
        total_steps: optimizer steps of the whole training, >= 1.
        hold, end: fractions of ``total_steps``, 0 <= hold < end <= 1; None takes the default of each group, which
            depends on its number of levels and on ``pretrained``, and leaves a short training steps enough to end on
            the levels.
        shape: "quadratic", "geometric", or a callable that takes progress in [0, 1] (of the whole training: hold and
            end don't act) to r in [0, 1]; it must not rise.

    Raises:
        ValueError, TypeError: an argument is out of range, no group is quantized, or the optimizer anneals itself.

    Warns where a training of 100 steps or more enters a trap that was measured (``hints.py``): fresh weights are
    annealed too early, or the learning rate is too small for them to reach another level. Warns where the weights are
    annealed to the end already.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        hold: float | None = None,
        end: float | None = None,
        shape: str | Callable[[float], float] = "quadratic",
    ):
        self._layers = layers(optimizer)
        self.optimizer, self.total_steps, self.hold, self.end, self.shape = optimizer, total_steps, hold, end, shape
        self.steps_done = 0
        self._called = self._warned = False
        self._unannealed = 0
        groups = self._groups()
        if not groups:
            raise ValueError(
                "Anneal: the optimizer has no quantized param group; pass quantizer=, or groups from "
                "askew_cuda.param_groups"
            )
        if any(group.get("total_steps") is not None for group in groups):
            raise ValueError(
                f"Anneal: the optimizer anneals itself, total_steps = {groups[0]['total_steps']}; leave out Anneal, or "
                "the optimizer's total_steps"
            )
        self._check(groups)
        self._go_on()
        if self.steps_done and all(epsilon_at(self._plan(group), self.steps_done) == 0 for group in groups):
            hints.warn(
                "Anneal: epsilon is 0 already: the weights are annealed to the end and stay on their levels; to anneal "
                "them once more set group['epsilon'] = 1.0 in every param group before"
            )
        self._watch()
        self._apply()
        for group in groups:
            hints.warn_of_early_annealing(group, self.half_width(group, hints.EARLY), total_steps)

    def _check(self, groups: list[dict[str, Any]]) -> None:
        try:
            if self.total_steps is None:
                raise TypeError("total_steps = None; a whole number is needed")
            for group in groups:
                check_keywords(self._plan(group), ("total_steps", "hold", "end", "shape"))
                phase(self._plan(group))
                self.half_width(group, 0.0)
        except (TypeError, ValueError) as error:
            raise type(error)(f"Anneal: {error}") from None

    def _groups(self) -> list[dict[str, Any]]:
        return [group for group in self._layers[-1].param_groups if group.get("quantizer") is not None]

    def _plan(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group as if it annealed itself in this way."""
        own = {"total_steps": self.total_steps, "hold": self.hold, "end": self.end, "shape": self.shape}
        return {**group, **own}

    def half_width(self, group: dict[str, Any], progress: float) -> float:
        """r of a param group at a progress in [0, 1]."""
        return half_width(self._plan(group), progress)

    def step(self) -> None:
        """One optimizer step further. Past ``total_steps`` it warns once, and r stays where it ended."""
        self._called = True
        self.steps_done += 1
        self._apply()
        if self.steps_done > self.total_steps and not self._warned:
            self._warned = True
            hints.warn(
                f"Anneal.step() was called {self.steps_done} times for total_steps = {self.total_steps}; "
                "the annealing has ended: give it the steps of the whole training"
            )
        hints.warn_of_small_steps(self._layers[-1], self._groups(), self.steps_done, self.total_steps)

    def _apply(self) -> None:
        for optimizer in self._layers:  # ZeRO copies its own groups to those inside before each step
            for group in optimizer.param_groups:
                if group.get("quantizer") is not None:
                    put_epsilon(group, epsilon_at(self._plan(group), self.steps_done))

    def _go_on(self) -> None:
        """Takes the count from the groups' epsilon, where that is not the one of this count."""
        plans = [self._plan(group) for group in self._groups()]
        epsilons = [float(group["epsilon"]) for group in plans]
        now = [epsilon_at(plan, self.steps_done) for plan in plans]
        if any(abs(a - b) > 1e-6 * a for a, b in zip(epsilons, now, strict=True)):
            self.steps_done = max(count_at(plan, epsilon) for plan, epsilon in zip(plans, epsilons, strict=True))

    def _watch(self) -> None:
        """Warns, once, when the optimizer has come to where annealing should begin and step() was never called. Follows
        a checkpoint that the optimizer loads.
        """
        due = max(2, min(round(phase(self._plan(group))[0] * self.total_steps) for group in self._groups()))
        this = weakref.ref(self)

        def count(optimizer: object, args: object, kwargs: object) -> None:
            # stays registered: torch forbids a hook to remove itself while hooks run
            anneal = this()
            if anneal is None or anneal._called or anneal._unannealed > due:
                return
            anneal._unannealed += 1
            if anneal._unannealed > due:
                hints.warn(
                    f"the optimizer has made {anneal._unannealed} steps and Anneal.step() was never called: the "
                    "weights will not reach their levels; call it after every optimizer.step()"
                )

        def loaded(optimizer: object) -> None:
            anneal = this()
            if anneal is not None:
                anneal._unannealed = 0
                anneal._go_on()

        self._layers[-1].register_step_post_hook(count)
        self._layers[-1].register_load_state_dict_post_hook(loaded)

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
                f"Anneal.load_state_dict: {', '.join(sorted(missing))} missing; a dictionary from Anneal.state_dict() "
                "is needed"
            )
        if state["shape"] is None and not callable(self.shape):
            raise ValueError(
                "Anneal.load_state_dict: the saved annealing had a callable shape; construct this one with the same "
                "callable"
            )
        self.steps_done, self.total_steps, self.hold, self.end = (
            state[key] for key in ("steps_done", "total_steps", "hold", "end")
        )
        if state["shape"] is not None:
            self.shape = state["shape"]
        self._called = self._called or self.steps_done > 0
        self._apply()
