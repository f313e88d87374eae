"""The base of AskewSGD and AskewAdamW: param groups, state, the step, weights on their levels for a while or for
good.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import backends, checkpoints, checks, distributed, hints, memory, scales, schedule
from .hints import LostSteps
from .interrupts import deferred
from .keywords import CONSTRAINT, Group, check_keywords, check_state_dtype, resolve_rate
from .look import Measured, codes, counting, snap_, snapping
from .plan import Batch, Plan, Traced, calls_of, parts
from .quantizer import Quantizer

_CPU = torch.device("cpu")
LEARNING = ("scale_velocity", "scale_growth")  # in the state of weights whose scale learns


def next_seed(seed: int) -> int:
    """The seed of the next step. A congruential generator mod 2^63 (Knuth, MMIX)."""
    return (seed * 6364136223846793005 + 1442695040888963407) % 2**63


def advance_seed(seed: Tensor) -> None:
    """The same in place, where the seed lies."""
    seed.mul_(6364136223846793005).add_(1442695040888963407).bitwise_and_(2**63 - 1)


@dataclass(frozen=True)
class TensorReport:
    """One tensor, before finalize() snapped it. Distances are in units of half the distance between levels: 0 on a
    level, 1 half-way.
    """

    name: str
    numel: int
    max_distance: float
    share_on_level: float


@dataclass(frozen=True)
class FinalizeReport:
    """What finalize() did: in all, and per tensor. ``never_stepped`` names quantized weights that never received a
    gradient; ``left_alone`` those of quantized groups that were not snapped, because they are frozen besides.
    """

    max_distance: float
    share_on_level: float
    never_stepped: tuple[str, ...]
    tensors: tuple[TensorReport, ...]
    left_alone: tuple[str, ...] = ()


class QuantizedOptimizer(torch.optim.Optimizer):
    """An optimizer whose param groups may bring a quantizer and the keywords around it. Subclasses bring the rule."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any], constraint: dict[str, Any]):
        unknown = set(constraint) - set(CONSTRAINT)
        if unknown:
            raise TypeError(
                f"{type(self).__name__}: unknown keywords {', '.join(sorted(unknown))}; beyond torch's there are "
                f"{', '.join(CONSTRAINT)}"
            )
        self._start()
        super().__init__(params, {**defaults, **CONSTRAINT, **constraint})
        # as torch: torch.amp.GradScaler then sets grad_scale and found_inf here, and leaves p.grad alone
        self._step_supports_amp_scaling = bool(self.defaults["fused"])

    def _start(self) -> None:
        """What is neither saved nor copied."""
        self.outputs: dict[Tensor, dict[str, Tensor]] = {}
        self.first_elements: dict[Tensor, int] = {}  # of weights that are parts of larger ones, for stochastic rounding
        self._stepped: dict[Tensor, bool] = {}  # weights that received a gradient
        self._parsed: list[tuple[object, Quantizer]] = []
        self._quantized_depth = 0
        self._lent: dict[Tensor, Tensor] = {}  # scales that are not set yet, while quantized() holds them
        self._plan: Plan | None = None
        self._chosen: dict[tuple[str, torch.device, torch.dtype], str] = {}  # backends
        self._scaled: dict[Tensor, Quantizer] = {}  # the quantizer that a weight's scale was set for
        self._settled: dict[Tensor, Tensor] = {}  # the scale of a weight that is known to learn no more
        self._agreed = False  # whether all ranks were found to say the same
        self._company: distributed.Company = ()  # the ranks that step the same plain weights

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_parsed" not in self.__dict__:  # unpickled or copied; load_state_dict also comes through here
            self._start()
            self.defaults = {**CONSTRAINT, **self.defaults}  # older versions have fewer
            self._step_supports_amp_scaling = bool(self.defaults["fused"])
        self._stepped.update(
            (weight, True) for weight, kept in self.state.items() if kept and isinstance(weight, Tensor)
        )
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self._plan, self._agreed = None, False
        self._scaled = {
            weight: quantizer
            for group in self.param_groups
            if (quantizer := self._quantizer(group)) is not None
            for weight in group["params"]
            if self._scale(weight) is not None
        }

    @staticmethod
    def _check_rule(group: Group) -> None:
        """Ranges of what the rule alone has."""
        raise NotImplementedError

    def add_param_group(self, param_group: Group) -> None:
        """As torch's; the group may bring any of the keywords of the constructor, and ``scales``, a list with a tensor
        for each weight, which are copied to its state. Nothing is added when one is wrong.
        """
        group = dict(param_group)
        given = group.pop("scales", None)
        if not isinstance(group["params"], (Tensor, set)):  # torch wraps the one and refuses the other
            group["params"] = list(group["params"])
        group["recovery"], group["alpha"] = resolve_rate(
            group, self.defaults, group.get("skew_at", self.defaults["skew_at"])
        )
        quantizer = self._check(group)
        dims = group.get("channel_dim", self.defaults["channel_dim"])
        found = [] if given is None else scales.given(given, group["params"], quantizer, dims)
        group["quantizer"] = None if quantizer is None else quantizer.plain()
        annealed = self._annealed(group)
        epsilon = group.setdefault("epsilon", self.defaults["epsilon"])
        if any(epsilon is each["epsilon"] for each in self.param_groups if isinstance(epsilon, Tensor)):
            group["epsilon"] = epsilon.clone()  # the phases of groups differ
        if annealed and isinstance(group["epsilon"], Tensor):
            checks.check_filled("epsilon", group["epsilon"])
        group["outputs"] = list(group.get("outputs", self.defaults["outputs"]))
        group["state_dtype"] = None if group.get("state_dtype", self.defaults["state_dtype"]) is None else "float32"
        super().add_param_group(group)
        if "epsilon" in annealed:
            schedule.put_epsilon(group, annealed.pop("epsilon"))
        group.update(annealed)
        unique = {weight: i for i, weight in reversed(list(enumerate(group["params"])))}  # torch has warned of others
        for key in ("params", "param_names", "fan_in", "init_bound"):
            if isinstance(group.get(key), (list, tuple)):
                group[key] = [group[key][i] for i in reversed(unique.values())]
        self._quantizer(group)
        for weight, scale in found:
            self._set_scale(group, weight, distributed.place_beside(scale, weight))

    def _check(self, group: Group) -> Quantizer | None:
        """Whether the group, and the defaults where it is silent, can be stepped; its quantizer."""
        settings = {**self.defaults, **group}
        check_keywords(settings)
        self._check_rule(settings)
        quantizer = None if settings["quantizer"] is None else Quantizer.parse(settings["quantizer"])
        self._check_weights(settings["params"], settings, quantizer)
        self._agreed = False
        return quantizer

    def _annealed(self, group: Group) -> Group:
        """The keywords of a new group that anneals itself: when it begins and ends, its count of steps, its epsilon."""
        settings = {**self.defaults, **group}
        total = settings["total_steps"]
        if total is None:
            return {}
        done = group.get(
            "steps_done", max([settings["steps_done"], *(each["steps_done"] for each in self.param_groups)])
        )
        if settings["quantizer"] is None:
            return {"steps_done": done}
        hold, end = schedule.phase(settings)
        settings |= {"hold": hold, "end": end}
        epsilon = schedule.epsilon_at(settings, done)
        if not isinstance(settings["epsilon"], Tensor) and settings["epsilon"] not in (1, epsilon):
            raise ValueError(
                f"epsilon = {settings['epsilon']} with total_steps = {total}: after {done} steps it is {epsilon:.3g}. "
                "Leave epsilon out, and give steps_done to go on from a step; or leave out total_steps"
            )
        hints.warn_of_early_annealing(settings, schedule.half_width(settings, hints.EARLY), total)
        return {"hold": hold, "end": end, "steps_done": done, "epsilon": epsilon}

    def _check_weights(self, params: Any, settings: Group, quantizer: Quantizer | None) -> None:
        """Whether the weights of a group can be stepped as the group says."""
        params = [params] if isinstance(params, Tensor) else params
        for key in ("fan_in", "init_bound"):
            given = settings[key]
            if isinstance(given, (list, tuple)) and len(given) != len(params):
                raise ValueError(
                    f"{key} has {len(given)} numbers for a group of {len(params)} weights; one for each is needed, or "
                    "one for all of them"
                )
        for index, item in enumerate(params):
            name, weight = item if isinstance(item, tuple) else (f"params[{index}]", item)
            if not isinstance(weight, Tensor):
                continue  # torch's own error says it best
            if weight.layout != torch.strided or weight.is_complex() or weight.dtype not in checks.DTYPES:
                raise TypeError(
                    f"{name} is {weight.dtype} ({weight.layout}); dense float32, float64, bfloat16 and float16 weights "
                    "can be stepped"
                )
            check_state_dtype(settings, weight, name)
            if settings.get("capturable") and weight.device.type == "cpu":
                raise ValueError(
                    f"capturable = True, but {name} is on the CPU; it is for weights on a GPU, in CUDA graphs. Leave "
                    "it False"
                )
            if quantizer is not None:
                quantizer.check(weight, name, settings["channel_dim"])
            distributed.check_placed(weight, name, settings, quantizer)
            chosen = self._choose(settings, weight.device, weight.dtype)
            if settings["fused"] and chosen == "reference":
                raise RuntimeError(
                    f"fused = True, but the pure PyTorch reference would step {name} on {weight.device}; leave it None"
                )

    def _choose(self, group: Group, device: torch.device, dtype: torch.dtype) -> str:
        """The backend of weights of a group. Asked for once: torch.compile watches the answers, which are this
        optimizer's own.
        """
        key = (group["backend"], device, dtype)
        if key not in self._chosen:
            self._chosen[key] = backends.choose(*key)
        return self._chosen[key]

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
            yield (names[i] if names and i < len(names) else f"param_groups[{where}]['params'][{i}]"), weight

    def _name_of(self, weight: Tensor) -> str:
        return next(name for group in self.param_groups for name, each in self._named(group) if each is weight)

    def _scale(self, weight: Tensor) -> Tensor | None:
        """The weight's scale, if it is set."""
        return self.state[weight].get("scale") if weight in self.state else None

    def _left_alone(self, group: Group, weight: Tensor) -> bool:
        """Whether a weight of a quantized group keeps its values, because it is frozen and has never been stepped."""
        return not (weight.requires_grad or group["quantize_frozen"] or weight in self._stepped)

    @staticmethod
    def _of_layer(group: Group, weight: Tensor) -> dict[str, Any]:
        """fan_in and init_bound of the weight's layer, where the group says them."""
        at = next(index for index, other in enumerate(group["params"]) if other is weight)
        given = {key: group[key] for key in ("fan_in", "init_bound")}
        return {key: each[at] if isinstance(each, (list, tuple)) else each for key, each in given.items()}

    def _estimate(self, group: Group, quantizer: Quantizer, name: str, weight: Tensor, whole: Tensor) -> Tensor:
        scale = scales.estimate(
            whole.detach(),
            quantizer,
            pretrained=group["pretrained"],
            normalized=bool(group["normalized"]),
            name=name,
            channel_dim=group["channel_dim"],
            **self._of_layer(group, weight),
        )
        rounds = scales.are_short(group, quantizer) and group["pretrained"] != "packed"
        return scales.short(scale) if rounds else scale

    def _new_scale(self, group: Group, quantizer: Quantizer, name: str, weight: Tensor, whole: Tensor) -> Tensor:
        """A weight's first scale; warns when snapping or the first clip would tear a network apart.
        ``whole`` is the weight itself, or what was gathered of it.
        """
        scale = self._estimate(group, quantizer, name, weight, whole)
        levels = quantizer.codebook.levels
        zeros = 0.0 if 0 in levels else scales.share_of_zeros(whole)
        if 0.05 < zeros < 1:
            hints.warn(
                f"{name}: {zeros:.0%} of its weights are exactly 0, and no level of its codebook is: if they were "
                "pruned, they come back to life; take levels with a 0 among them, such as 'ternary'"
            )
        fresh = group["normalized"] and not group["trained_norms"]
        if group["clip"] and not (
            group["pretrained"] or fresh or scales.is_torch_default(whole, **self._of_layer(group, weight))
        ):
            outside = scales.share_outside(whole.detach(), scale, levels)
            if outside > 0.25:
                hints.warn(
                    f"{name}: clipping to the outermost levels will move {outside:.0%} of its weights in the first "
                    "step; if the network is trained already, pass pretrained=True; clip=False leaves them outside"
                )
        return scale

    @staticmethod
    def _new_scales(
        make: Callable[..., Tensor],
        wanted: list[tuple[Group, Quantizer, str, Tensor]],
        replicas: distributed.Company = (),
    ) -> list[Tensor]:
        """The scales of some weights, each as it lies beside its weight. ``replicas``: ranks that have the same
        weights, and ask for their scales, too.
        """
        for *_, name, weight in wanted:
            checks.check_memory_of(weight, name)
        weights = [weight for *_, weight in wanted]
        jobs = [[weight] for weight in weights]
        found = distributed.each_whole(jobs, lambda i, whole: make(*wanted[i], whole), replicas)
        return [distributed.place_beside(scale, weight) for scale, weight in zip(found, weights, strict=True)]

    @torch.no_grad()
    def prepare(self) -> None:
        """Sets every quantized weight's scale now, from the weights as they are, instead of at its first step.

        It is the one moment that may synchronise with a device: call it before capturing a graph or compiling. Weights
        that are frozen get theirs when they are stepped, unless their group says quantize_frozen. Where several
        processes train, all of them must call this, after the model was sharded or wrapped.

        Raises: ValueError: a weight holds NaN, infinity or nothing but zeros; the message names it. No scale has been
            set then.
        """
        distributed.agree(self, stepping=False)
        wanted = []
        for group in self.param_groups:
            quantizer = self._quantizer(group)
            if quantizer is not None:
                for name, weight in self._named(group):
                    has_scale = self._scale(weight) is not None
                    self._check_scale(group, weight, has_scale)
                    if not (has_scale or self._left_alone(group, weight)):
                        wanted.append((group, quantizer, name, weight))
        found = self._new_scales(self._new_scale, wanted, self._company)
        with deferred():
            for (group, quantizer, _, weight), scale in zip(wanted, found, strict=True):
                self._set_scale(group, weight, scale)
                self.state[weight].update(self._to_learn(group, quantizer, weight, scale))

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step: base rule, constraint, clip and outputs in one pass over each tensor. The gradient is ``p.grad``;
        where that is None ``p.main_grad``, which may be float32 where p has 16 bits. Neither is written.

        The step is made as a whole or not at all: state is allocated and arguments are checked before the first weight
        moves, and Ctrl-C waits for the last one. What is left: the reference, which copies on its way, stops where
        there is no memory for it.

        Args:
            closure: reevaluates the model and returns the loss; it sees the trained weights.

        Raises:
            RuntimeError: called inside :meth:`quantized`.
            ValueError, TypeError: an argument is wrong, such as a sparse gradient or a keyword of a group; the message
                names it. Nothing has moved then.
        """
        try:
            if self._quantized_depth:
                raise RuntimeError(
                    "step() inside quantized(): the weights are snapped copies there; leave the block first"
                )
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if not self._overflowed():
                self._make()
            return loss
        except BaseException:
            for key in ("grad_scale", "found_inf"):  # GradScaler takes them back after a step that succeeds alone
                self.__dict__.pop(key, None)
            raise

    def _make(self) -> None:
        if torch.compiler.is_compiling():
            self._trace()
            return
        plan = self._plan
        if plan is None or not plan.holds(self):
            plan = Plan(self)
        lost = LostSteps(self.param_groups, self._stepped) if plan.additions else None
        entries, in_place = self._advances() if plan.parts else ([], [])
        plan.lay_out()
        if plan is self._plan and plan.is_one_call and not in_place:
            plan.run(entries)
        else:
            with deferred():
                plan.run(entries)
                for write in in_place:
                    write()
                if plan is not self._plan:
                    self._adopt(plan)
        if lost and not self._overflowed(wait=True):  # nothing moves then
            lost.warn()
        total, count = (self.param_groups[0][key] for key in ("total_steps", "steps_done"))
        if total is not None and not 5 * count > total >= count:  # early, or past the end
            hints.after_step(self, count, total)

    def _advances(self) -> tuple[list[tuple[Group, str, Any]], list[Callable[[], object]]]:
        """What a step changes in the param groups: entries, and what is written in place."""
        entries: list[tuple[Group, str, Any]] = []
        in_place: list[Callable[[], object]] = []
        for group in self.param_groups:
            if group["low_precision"] == "stochastic":
                if isinstance(group["seed"], Tensor):
                    checks.check_filled("seed", group["seed"])
                    in_place.append(functools.partial(advance_seed, group["seed"]))
                else:
                    entries.append((group, "seed", next_seed(group["seed"])))
            done = group["steps_done"]
            if group["total_steps"] is not None and not (type(done) is int and done >= 0):
                check_keywords(group, ("steps_done",))
            state = schedule.next_state(group)
            if state is not None:
                count, epsilon = state
                entries.append((group, "steps_done", count))
                if isinstance(group["epsilon"], Tensor):
                    checks.check_filled("epsilon", group["epsilon"])
                    in_place.append(functools.partial(schedule.put_epsilon, group, epsilon))
                elif epsilon is not group["epsilon"]:
                    entries.append((group, "epsilon", epsilon))
        return entries, in_place

    def _trace(self) -> None:
        """The step as torch.compile sees it: the operators, and no plan."""
        found = list(parts(self, Traced()))
        for part in found:
            for call in calls_of(part):
                call()
            part.shorten()
        if found:
            for group in self.param_groups:
                schedule.advance(group)

    def _adopt(self, plan: Plan) -> None:
        """Keeps a plan that was carried out, and lets go of weights that are in no group any more."""
        self._plan = plan if plan.lasts else None
        members = {weight for group in self.param_groups for weight in group["params"]}
        for table in (self._stepped, self._scaled, self._settled, self.outputs, self.first_elements):
            for gone in [weight for weight in table if weight not in members]:
                del table[gone]
        for part in plan.parts:
            if part.settles:
                self._settled.update(zip(part.batch.weights, part.kept["scale"], strict=True))
            self._stepped.update(dict.fromkeys(part.batch.weights, True))
            quantizer = self._quantizer(part.group)
            if quantizer is not None:
                self._scaled.update(dict.fromkeys(part.batch.weights, quantizer))

    # What a rule brings: the name of its operator; which lists of the operator's signature are which keys of the state;
    # its settings.
    _operator: str

    def _moments(self, group: Group) -> dict[str, str]:
        raise NotImplementedError

    def _rule(self, group: Group) -> dict[str, Any]:
        raise NotImplementedError

    def _counted_there(self, group: Group) -> bool:
        """Whether the weights' device counts the steps."""
        return False

    def _split(self, group: Group, batch: Batch) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Batches that step in different calls, and what is set in each whatever the group says."""
        yield batch, {}

    def _scales(self, group: Group, batch: Batch) -> Iterator[tuple[Batch, dict[str, list[Tensor]]]]:
        """The weights whose scales learn and the others, with what their state holds of scales; scales that are missing
        are estimated now, all together.
        """
        quantizer = self._quantizer(group)
        if quantizer is None:
            yield batch, {}
            return
        fresh = ["scale" not in state for state in batch.states]
        made: dict[Tensor, Tensor] = {}

        def make(weight: Tensor) -> Tensor:
            if not made:
                missing = {each for each, new in zip(batch.weights, fresh, strict=True) if new}
                wanted = [(group, quantizer, name, each) for name, each in self._named(group) if each in missing]
                found = self._new_scales(self._new_scale, wanted, self._company)
                made.update((each, scale) for (*_, each), scale in zip(wanted, found, strict=True))
            return made[weight]

        for weight, new in zip(batch.weights, fresh, strict=True):
            self._check_scale(group, weight, not new)
        scales = batch.tensors("scale", make)
        for weight, state, scale, new in zip(batch.weights, batch.states, scales, fresh, strict=True):
            if new:
                for key, value in self._to_learn(group, quantizer, weight, scale).items():
                    batch.additions.put(state, key, value)
        pairs = zip(batch.weights, batch.states, scales, strict=True)
        learns = [
            batch.additions.has(state, "scale_velocity") and self._settled.get(weight) is not scale
            for weight, state, scale in pairs
        ]
        for each, keys in ((True, ("scale", *LEARNING)), (False, ("scale",))):
            alike = batch if all(each == one for one in learns) else batch.pick([each == one for one in learns])
            yield alike, {key: alike.tensors(key, self._no_such_state) for key in keys} if alike.weights else {}

    def _no_such_state(self, weight: Tensor) -> Tensor:
        raise ValueError(
            f"the state of {self._name_of(weight)} has only a part of {', '.join(LEARNING)}, with which its scale "
            "learns; put it back, load a checkpoint, or remove both: the scale is fixed then"
        )

    def _to_learn(self, group: Group, quantizer: Quantizer, weight: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """What the state of a weight has besides a scale that learns: one that was estimated, of weights that are free
        and whose storage does not round its growth away.
        """
        rounds = weight.dtype.itemsize == 2 and group["low_precision"] == "nearest"
        epsilon = group["epsilon"]
        free = isinstance(epsilon, Tensor) or epsilon == 1
        estimated = isinstance(quantizer.scale, str) and group["pretrained"] != "packed"
        if scales.learning_rate(group, quantizer) > 0 and free and estimated and not rounds:
            return {"scale_velocity": torch.zeros_like(scale), "scale_growth": torch.ones_like(scale)}
        return {}

    def _check_scale(self, group: Group, weight: Tensor, has_scale: bool) -> None:
        """Whether a weight's scale is that of its quantizer, and is still there once annealing has begun."""
        before = self._scaled.get(weight)
        if before is None:
            return
        same = before == self._quantizer(group)
        if has_scale and not same:
            raise ValueError(
                f"quantizer = {group['quantizer']!r}, but the scale of {self._name_of(weight)} was set for "
                f"{before.plain()!r}; for a new one, remove the old: del optimizer.state[weight]['scale']"
            )
        if not has_scale and same and float(group["epsilon"]) < 1:
            raise ValueError(
                f"the scale of {self._name_of(weight)} is gone from optimizer.state in mid-annealing (epsilon = "
                f"{float(group['epsilon']):.3g}): a new one would move every level. Put the state back, or load a "
                "checkpoint"
            )

    def _set_scale(self, group: Group, weight: Tensor, scale: Tensor) -> None:
        quantizer = self._quantizer(group)
        assert quantizer is not None
        self.state[weight]["scale"] = scale
        self._scaled[weight] = quantizer

    def _settle(self, weight: Tensor) -> None:
        """The weight's scale learns no more. Its state keeps its keys: a checkpoint has those of a fresh optimizer."""
        state = self.state[weight]
        self._settled[weight] = state["scale"]
        for key, value in zip(LEARNING, (math.inf, 1.0), strict=True):
            if key in state:
                distributed.local(state[key]).fill_(value)

    def _overflowed(self, wait: bool = False) -> bool:
        """Whether AMP found an infinity: the step then does nothing. Unless told to, it does not wait for a device to
        know: False.
        """
        found: Tensor | float | None = getattr(self, "found_inf", None)
        if found is None:
            return False
        checks.check_numbers({"found_inf": found}, getattr(found, "device", _CPU))
        known = not isinstance(found, Tensor) or found.device.type == "cpu" or (wait and not found.is_meta)
        return known and bool(found != 0)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, of plain values and tensors; of a callable ``shape`` it says "callable" only."""
        saved: dict[str, Any] = super().state_dict()
        for group in saved["param_groups"]:
            if callable(group.get("shape")):
                group["shape"] = "callable"
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this optimizer, or of torch's of the same rule: then the groups keep their quantizers
        and their keywords.

        Weights are matched by name where both have names (the groups may then differ; the prefixes of DDP and
        torch.compile don't count), else by position. Scales are taken over as they are; a checkpoint without them drops
        the stored ones (set again at the next step). What says how to compute (backend, outputs, fused, ..), and
        total_steps, hold, end and shape stay as they are here; the count of steps is taken, and epsilon is where it is
        then. Where there is none, it is found by the saved epsilon. ``state_dict`` is not mutated, and no tensor is
        shared with it.

        Raises:
            ValueError, TypeError: the weights don't match, or a value is out of range. Nothing has been loaded then.

        Warns: total_steps here and there differ, or the count had to be guessed.
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

    def _quantized_weights(self, scales: bool = True) -> Iterator[tuple[str, Tensor, Any, tuple[float, ...], Group]]:
        """name, weight, scale, levels and group of each quantized weight; a scale that is not set yet is computed, not
        stored (None without ``scales``). Without those that are left alone, frozen and never stepped.
        """
        for group in self.param_groups:
            quantizer = self._quantizer(group)
            if quantizer is not None:
                for name, weight in self._named(group):
                    if self._left_alone(group, weight):
                        continue
                    checks.check_memory_of(weight, name)
                    scale = self._scale(weight)
                    if weight not in self._lent:
                        self._check_scale(group, weight, scale is not None)
                    scale = self._lent.get(weight) if scale is None else scale
                    if scale is None and scales:
                        (scale,) = self._new_scales(self._estimate, [(group, quantizer, name, weight)])
                    yield name, weight, scale, quantizer.codebook.levels, group

    def quantized_parameters(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """(weight, codes, levels, scale) of every quantized weight: the snapped weight is ``scale * levels[codes]``.

        codes: uint8, as the weight; 0 for NaN, which has no level.
        levels: (K,), the scale's dtype. scale: (), or the weight's shape with 1 or a
        divisor in the dimensions that it covers, or (rows, groups) for ``weight.reshape(rows, groups, -1)``. Nothing is
        mutated. Weights that are frozen and were never stepped are not among them, unless their group says
        quantize_frozen. Of a weight that is a DTensor, all of them are.
        """
        for _, weight, scale, levels, _ in self._quantized_weights():
            found = codes(distributed.local(weight).detach(), distributed.local(scale), levels)
            numbers = distributed.everywhere(distributed.local(scale).new_tensor(levels), weight)
            yield weight, distributed.like(weight, found), numbers, scale

    @contextlib.contextmanager
    def quantized(self) -> Iterator[None]:
        """Weights on their levels inside the block; the trained ones are back after it, whatever happens in it. May be
        nested.

        Holds a copy of the quantized weights meanwhile. step() is refused inside. Where weights are sharded, all ranks
        must enter and leave.
        """
        if self._quantized_depth:
            self._quantized_depth += 1
            try:
                yield
            finally:
                self._quantized_depth -= 1
            return
        trained: list[tuple[Tensor, Tensor]] = []
        try:
            try:
                with torch.no_grad(), deferred():
                    for _, weight, scale, levels, _ in self._quantized_weights():
                        here = distributed.local(weight)
                        trained.append((here, memory.copy_of(here)))
                        self._lent[weight] = scale
                        snap_(here, distributed.local(scale), levels)
                    self._quantized_depth = 1
                distributed.tell(self)
                yield
            finally:
                with deferred():
                    self._give_back(trained)
                distributed.tell(self)
        finally:  # Ctrl-C may come on the way to where it is held back
            self._give_back(trained)

    @torch.no_grad()
    def _give_back(self, trained: list[tuple[Tensor, Tensor]]) -> None:
        while trained:
            weight, value = trained[-1]
            weight.copy_(value)
            trained.pop()
        self._lent.clear()
        self._quantized_depth = 0

    @torch.no_grad()
    def finalize(self) -> FinalizeReport:
        """Snaps every quantized weight onto its level, for good, and says how far they were.

        All weights are looked at before the first one is snapped, in place. Weights that are frozen and were never
        stepped, such as the base of LoRA, keep their values, unless their group says quantize_frozen. Warns where
        weights have a way to go, more than 1/64 of half the distance between levels: which share, how far, in which
        tensors.

        Returns: The largest distance, in units of half the distance between levels, the share of weights that were on a
            level, and the names of quantized weights that never received a gradient; per tensor and in all.

        Raises:
            ValueError: a weight holds NaN; nothing has been snapped.
            RuntimeError: called inside :meth:`quantized`.
        """
        if self._quantized_depth:
            raise RuntimeError("finalize() inside quantized(): leave the block first")
        found = list(self._quantized_weights())

        def look(i: int, weight: Tensor, scale: Tensor) -> Measured:
            *_, levels, group = found[i]
            return counting(weight, scale, levels, schedule.near(levels, weight.dtype, group["low_precision"]))()

        looked = distributed.each_whole([each[1:3] for each in found], look)
        mine = [
            (name, weight, (weight.numel(), seen, weight in self._stepped))
            for (name, weight, *_), seen in zip(found, looked, strict=True)
        ]
        tensors, moves, never = [], [], []
        for name, (numel, seen, stepped) in distributed.all_rows(mine, self):
            if seen.lost:
                raise ValueError(f"finalize: {name} holds {seen.lost} NaN weights; they have no level")
            tensors.append(TensorReport(name, numel, seen.largest, seen.on_level / numel if numel else 1.0))
            moves.append((name, numel, seen.away, seen.largest))
            never += [] if stepped else [name]
        epsilon = max((float(group["epsilon"]) for *_, group in found), default=0.0)
        hints.warn_of_moves(moves, epsilon)
        local = distributed.local
        ready = [
            (snapping(local(weight), local(scale), levels), group, weight, scale)
            for _, weight, scale, levels, group in found
        ]
        with deferred():
            for snap, group, weight, scale in ready:
                snap()
                self._set_scale(group, weight, scale)
                self._settle(weight)
                if "remainder" in self.state[weight]:
                    local(self.state[weight]["remainder"]).zero_()
        distributed.tell(self)
        return self._report(tensors, never)

    def _report(self, tensors: list[TensorReport], never: list[str]) -> FinalizeReport:
        """Of all tensors together."""
        total = sum(each.numel for each in tensors)
        largest = max((each.max_distance for each in tensors), default=0.0)
        share = sum(each.share_on_level * each.numel for each in tensors) / total if total else 1.0
        left = [
            (name, weight, None)
            for group in self.param_groups
            if group["quantizer"] is not None
            for name, weight in self._named(group)
            if self._left_alone(group, weight)
        ]
        names = tuple(name for name, _ in distributed.all_rows(left, self))
        return FinalizeReport(largest, share, tuple(never), tuple(tensors), names)

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.param_groups):
            quantizer = self._quantizer(group)
            kinds = dict.fromkeys((weight.device, weight.dtype) for weight in group["params"])
            chosen = [backends.explain(group["backend"], device, dtype) for device, dtype in kinds]
            shown = {key: value for key, value in sorted(group.items()) if key not in ("params", "param_names")}
            shown["quantizer"] = None if quantizer is None else quantizer.summary()
            lines += [f"Parameter Group {i}", *(f"    {key}: {value}" for key, value in shown.items())]
            lines.append(f"    runs on: {', '.join(chosen) or 'nothing'}")
        return "\n".join([*lines, ")"])
