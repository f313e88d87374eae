"""The step that AskewSGD and AskewAdamW share: what is prepared, what is checked, and the calls."""

import functools
from collections.abc import Callable, Iterator
from itertools import compress
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from . import checkpoints, ops
from .finalize import FinalizingOptimizer
from .groups import Group
from .interrupts import deferred
from .lost_steps import LostSteps

Call = functools.partial[None]


def next_seed(seed: Any) -> Any:
    """The seed of the next step; a tensor is advanced in place, on its device. A congruential generator mod 2^63 (Knuth, MMIX)."""
    if isinstance(seed, Tensor):
        return seed.mul_(6364136223846793005).add_(1442695040888963407).bitwise_and_(2**63 - 1)
    return (seed * 6364136223846793005 + 1442695040888963407) % 2**63


class Staged:
    """What a step adds to the optimizer - scales, zeroed moments, buffers for outputs - held back until nothing can fail any more."""

    def __init__(self) -> None:
        self._added: dict[tuple[int, Any], tuple[dict[Any, Any], Any]] = {}

    @property
    def is_empty(self) -> bool:
        """Whether the step adds nothing."""
        return not self._added

    def get(self, kept: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
        """``kept[key]``, or what ``make`` makes, once, which becomes it at commit()."""
        if key in kept:
            return kept[key]
        where = (id(kept), key)
        if where not in self._added:
            self._added[where] = (kept, make())
        return self._added[where][1]

    def put(self, kept: dict[Any, Any], key: Any, value: Any) -> Any:
        """The value, which becomes ``kept[key]`` at commit()."""
        self._added[(id(kept), key)] = (kept, value)
        return value

    def commit(self) -> None:
        """From now on the optimizer has it."""
        for (_, key), (kept, value) in self._added.items():
            kept[key] = value


class Batch(NamedTuple):
    """Weights of one group that step in one call, their gradients and their states."""

    weights: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Any]]
    staged: Staged

    def pick(self, wanted: list[bool]) -> "Batch":
        """Those that are wanted."""
        weights, grads, states = self[:3]
        return Batch(list(compress(weights, wanted)), list(compress(grads, wanted)), list(compress(states, wanted)), self.staged)

    def tensors(self, key: str, make: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """A state tensor of each weight; made where it is missing."""
        try:
            return [state[key] for state in self.states]
        except KeyError:
            pairs = zip(self.weights, self.states, strict=True)
            return [self.staged.get(state, key, functools.partial(make, weight)) for weight, state in pairs]


class QuantizedOptimizer(FinalizingOptimizer):
    """Base of the optimizers: everything but the rule. Subclasses say what a call takes, in :meth:`_calls`."""

    _step_supports_amp_scaling = True  # torch.amp.GradScaler: sets grad_scale and found_inf here, and leaves p.grad alone

    def _start(self) -> None:
        super()._start()
        self._verified: list[Any] | None = None

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step: base rule, constraint, clip and outputs in one pass over each tensor. ``p.grad`` is never written.

        The step is made as a whole or not at all: state is allocated and arguments are checked before the first weight moves, and Ctrl-C
        waits for the last one. What is left: a call that has to copy on its way - the reference, and gradients in another memory order
        than their weights - stops where there is no memory for it.

        Args:
            closure: reevaluates the model and returns the loss; it sees the trained weights.

        Raises:
            RuntimeError: called inside :meth:`quantized`. ValueError: a gradient is sparse, or a scale can't be set. Nothing has
                moved then.
        """
        try:
            if self._quantized_depth:
                raise RuntimeError("step() inside quantized(): the weights are snapped copies there; leave the block first")
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if not self._overflowed():
                self._make()
            return loss
        except BaseException:
            for key in ("grad_scale", "found_inf"):  # GradScaler takes them back after a step that succeeds, and only then
                self.__dict__.pop(key, None)
            raise

    def _make(self) -> None:
        staged = Staged()
        calls = [call for group in self.param_groups for call in self._group_calls(group, staged)]
        lost = LostSteps(self.param_groups, self._stepped) if not (staged.is_empty or torch.compiler.is_compiling()) else None
        alone = staged.is_empty and len(calls) == 1 and calls[0].func not in ops.operators("reference")
        if alone or torch.compiler.is_compiling():
            self._commit(staged, calls)  # before and after, there is one compiled call between them
        else:
            self._verify(calls, anew=not staged.is_empty)
            with deferred():
                self._commit(staged, calls)
            if lost and not self._overflowed(wait=True):  # nothing moves then
                lost.warn()

    def _verify(self, calls: list[Call], anew: bool) -> None:
        """Has the operators check the arguments of all calls; not again while settings and scales stay the ones that were checked."""
        settings = [{key: value for key, value in call.keywords.items() if not isinstance(value, Tensor)} for call in calls]
        plain = [settings, [list(map(id, call.args[-4])) for call in calls]]
        if anew or plain != self._verified:
            for call in calls:
                call(found_inf=ops.SKIP)
            self._verified = plain

    def _commit(self, staged: Staged, calls: list[Call]) -> None:
        staged.commit()
        for call in calls:
            call()
        for group in self.param_groups:
            if group["low_precision"] == "stochastic":
                group["seed"] = next_seed(group["seed"])
        if len(self._stepped) < sum(len(group["params"]) for group in self.param_groups):
            self._stepped.update((weight, True) for group in self.param_groups for weight in group["params"] if weight.grad is not None)

    def _group_calls(self, group: Group, staged: Staged) -> Iterator[Call]:
        """One call per device and dtype, to be made once all of the step is known to be good."""
        weights, grads = [], []
        for weight in group["params"]:
            grad = weight.grad
            if grad is not None:
                weights.append(weight)
                grads.append(grad)
        if any([grad.is_sparse for grad in grads]):
            name = next(name for name, weight in self._named(group) if weight.grad is not None and weight.grad.is_sparse)
            raise ValueError(f"the gradient of {name} is sparse; dense gradients are needed (sparse=False in an embedding)")
        states: list[Any] = list(map(self.state.get, weights))
        if None in states:
            states = [staged.get(self.state, weight, dict) for weight in weights]
        batch = Batch(weights, grads, states, staged)
        kinds = {(device, dtype) for device in {w.device for w in weights} for dtype in {w.dtype for w in weights}}
        for device, dtype in kinds:
            same = batch if len(kinds) == 1 else batch.pick([w.dtype == dtype and w.device == device for w in weights])
            if same.weights:
                if device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
                    self._check_capture(group, same)
                yield from self._calls(group, ops.operators(self._choose(group, device, dtype)), same)

    @staticmethod
    def _check_capture(group: Group, batch: Batch) -> None:
        """Whether a CUDA graph that is being captured would do, when it is replayed, what a step does then."""
        if not group.get("capturable", True):
            raise RuntimeError("step() in a CUDA graph capture with capturable = False: the step would never be counted; pass True")
        if group["quantizer"] is None:
            return
        if not isinstance(group["epsilon"], Tensor) or group["epsilon"].device.type == "cpu":
            raise RuntimeError(
                f"step() in a CUDA graph capture with epsilon = {group['epsilon']!r}: the graph would never anneal; "
                "pass epsilon=torch.tensor(1.0, device=...), which Anneal fills in place"
            )
        if any("scale" not in state for state in batch.states):
            raise RuntimeError("step() in a CUDA graph capture before the scales are set: call prepare(), or step once, before it")

    def _calls(self, group: Group, backend: ops.Operators, batch: Batch) -> Iterator[Call]:
        """The calls of a batch: operators with all their arguments. Nothing is changed."""
        raise NotImplementedError

    def _moments(self, group: Group, batch: Batch, key: str) -> list[Tensor]:
        """A state tensor of each weight; zeros where it is missing."""
        dtype = None if group["state_dtype"] is None else torch.float32
        return batch.tensors(key, lambda weight: torch.zeros_like(weight, dtype=dtype, requires_grad=False))

    def _rounding(self, group: Group, batch: Batch) -> dict[str, Any]:
        """How the weights of a batch are rounded, as the operators take it."""
        if group["low_precision"] == "nearest" or batch.weights[0].dtype.itemsize != 2:
            return {}
        if group["low_precision"] == "remainder":
            zeros = functools.partial(torch.zeros_like, dtype=torch.int16, requires_grad=False)
            return {"remainders": batch.tensors("remainder", zeros)}
        number = {weight: i for i, weight in enumerate(weight for each in self.param_groups for weight in each["params"])}
        first = [self.first_elements.get(weight, 0) for weight in batch.weights]
        seed = group["seed"] if isinstance(group["seed"], Tensor) else torch.tensor(group["seed"])
        return {"seed": seed, "streams": [number[weight] for weight in batch.weights], "first_elements": first}

    def _scales(self, group: Group, batch: Batch) -> list[Tensor]:
        """The scale of each weight; estimated now where it is missing."""
        quantizer = self._quantizer(group)
        if quantizer is None:
            return []
        names: dict[Tensor, str] = {}

        def estimate(weight: Tensor) -> Tensor:
            if not names:
                names.update((each, name) for name, each in self._named(group))
            return self._new_scale(group, quantizer, names[weight], weight)

        return batch.tensors("scale", estimate)

    def _outputs(self, group: Group, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Buffers for codes and snapped weights; empty lists where they are not wanted."""
        lists: dict[str, list[Tensor]] = {"codes": [], "snapped": []}
        for key in group["outputs"]:
            dtype = torch.uint8 if key == "codes" else None
            for weight in batch.weights:
                kept = batch.staged.get(self.outputs, weight, dict)
                make = functools.partial(torch.empty_like, weight, dtype=dtype, requires_grad=False)
                lists[key].append(batch.staged.get(kept, key, make))
        return lists["codes"], lists["snapped"]

    def _constraint(self, group: Group, batch: Batch) -> tuple[tuple[float, ...], dict[str, Any]]:
        """Levels and keyword arguments of a call that both rules share."""
        quantizer = self._quantizer(group)
        keys = ("weight_decay", "maximize", "anneal", "skew_at", "recovery", "alpha", "max_step", "clip")
        settings = {key: group[key] for key in keys}
        settings |= {key: ops.scalar(group[key]) for key in ("lr", "epsilon")}
        for key in ("grad_scale", "found_inf"):  # set by torch.amp.GradScaler, on its own device
            value = getattr(self, key, None)
            settings[key] = value.to(batch.weights[0].device) if isinstance(value, Tensor) else ops.scalar(value)
        return (() if quantizer is None else quantizer.codebook.levels), settings

    def _overflowed(self, wait: bool = False) -> bool:
        """Whether AMP found an infinity: the step then does nothing. Unless told to, it does not wait for a device to know: False."""
        found: Tensor | float | None = getattr(self, "found_inf", None)
        known = wait or not isinstance(found, Tensor) or found.device.type == "cpu"
        return known and found is not None and bool(found != 0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this optimizer, or of torch's of the same rule: then the groups keep their quantizers and their keywords.

        Weights are matched by name where both have names (the groups may then differ), else by position. Scales are taken over as
        they are; a checkpoint without them drops the stored ones (set again at the next step). What says how to compute (backend,
        outputs, fused, ..) stays as it is here. ``state_dict`` is not mutated, and no tensor is shared with it.

        Raises:
            ValueError, TypeError: the weights don't match, or a value is out of range. Nothing has been loaded then.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        state, groups = checkpoints.adopt(state_dict, self.param_groups)
        for group in groups:
            self._check(group)
        with deferred():
            self.__setstate__({"state": state, "param_groups": groups})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)
