"""What a step does, worked out and checked once, and done again and again while nothing that it depends on changes.

A plan holds the tensors themselves. :meth:`Plan.holds` compares them, the settings and the gradients with what the plan
was made for, hands changed numbers over, and says when it has to be made anew. The extension makes the calls of all
groups in one, and Triton's backend keeps its own.
"""

import itertools
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import compress
from operator import is_, itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import backends, checks, distributed, keywords, schedule
from . import scales as scale_rules
from .checks import Call, Learning
from .keywords import Group, check_state_dtype, counter_dtype
from .reference import with_double

if TYPE_CHECKING:
    from .optimizer import QuantizedOptimizer

AMP = ("grad_scale", "found_inf")  # set by torch.amp.GradScaler, on its own device
SHARED = tuple(name for name in checks.OF_BOTH if name not in AMP)
# Numbers that a plan takes as they come. With another flag, word or None all is checked together, in a new plan.
FREE = {*AMP, "seed", *(name for name, kinds in checks.NUMBERS.items() if type(None) not in kinds)}
# Keywords of a group that decide what its calls are, or with which all is checked again: those that a call does not
# take as a number or a flag, and that no step changes.
STRUCTURE = tuple(
    name for name in (*keywords.KEYWORDS, "foreach", "fused") if name not in (*SHARED, "seed", "steps_done")
)
_structure_values = itemgetter(*STRUCTURE)
SCHEDULED = {"lr", "epsilon", "steps_done"}  # what schedules change, and nothing else depends on


class Additions:
    """What a step adds to the optimizer - scales, zeroed moments, buffers for outputs - held back until nothing can
    fail any more.

    ``captured``: the step is captured in a CUDA graph, whose replays would add it anew: RuntimeError.
    """

    def __init__(self, captured: bool = False) -> None:
        self._added: dict[tuple[int, Any], tuple[dict[Any, Any], Any]] = {}
        self._captured = captured

    def __bool__(self) -> bool:
        """Whether anything is added."""
        return bool(self._added)

    def get(self, kept: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
        """``kept[key]``, or what ``make`` makes, once, which becomes it at commit()."""
        if key in kept:
            return kept[key]
        where = (id(kept), key)
        if where not in self._added:
            self._refuse_capture(key)
            self._added[where] = (kept, make())
        return self._added[where][1]

    def put(self, kept: dict[Any, Any], key: Any, value: Any) -> Any:
        """The value, which becomes ``kept[key]`` at commit()."""
        self._refuse_capture(key)
        self._added[(id(kept), key)] = (kept, value)
        return value

    def _refuse_capture(self, key: Any) -> None:
        if self._captured:
            what = key if isinstance(key, str) else "what belongs to a weight"
            raise RuntimeError(
                f"step() in a CUDA graph capture that would set up {what}: every replay would do it again, and what "
                "was learned would be lost. Step once before the capture, with the same settings; the warm-up that "
                "torch.cuda.graph asks for is such a step"
            )

    def has(self, kept: dict[Any, Any], key: Any) -> bool:
        """Whether ``kept`` has it, or will."""
        return key in kept or (id(kept), key) in self._added

    def commit(self) -> None:
        """From now on the optimizer has it."""
        for (_, key), (kept, value) in self._added.items():
            kept[key] = value


class Traced(Additions):
    """What a step adds while it is traced: at once. A trace that fails changes nothing, and follows no id()."""

    def get(self, kept: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
        """``kept[key]``, made where it is missing."""
        if key not in kept:
            kept[key] = make()
        return kept[key]

    def put(self, kept: dict[Any, Any], key: Any, value: Any) -> Any:
        """The value, which is ``kept[key]`` now."""
        kept[key] = value
        return value


class Batch(NamedTuple):
    """Weights of one group that step in one call, their gradients and their states."""

    weights: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Any]]
    additions: Additions

    def pick(self, wanted: list[bool]) -> "Batch":
        """Those that are wanted."""
        weights, grads, states = self[:3]
        return Batch(
            list(compress(weights, wanted)),
            list(compress(grads, wanted)),
            list(compress(states, wanted)),
            self.additions,
        )

    def tensors(self, key: str, make: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """A state tensor of each weight; made where it is missing."""
        pairs = zip(self.weights, self.states, strict=True)
        return [self.additions.get(state, key, partial(make, weight)) for weight, state in pairs]


class Part(NamedTuple):
    """A call, and what it was made from."""

    backend: str
    group: Group
    batch: Batch
    kept: dict[str, list[Tensor]]  # state tensors of the weights, by their key in the state
    fixed: dict[str, Any]  # settings that this call has whatever its group says
    call: Call
    learning: Learning | None  # what follows the call where its scales learn
    short: bool  # whether those are rounded once they have learned
    names: checks.Names

    @property
    def is_joint(self) -> bool:
        """Whether scales learn whose weights lie on several ranks: their sums go around between the two calls."""
        return self.learning is not None and distributed.is_joint(self.batch.weights, self.kept["scale"])

    @property
    def keeper(self) -> str:
        """The backend that can keep the call and make it again and again, "" where none does: the extension, which also
        makes what follows where scales learn, or Triton.
        """
        if self.backend == "triton":
            return "" if self.learning else "triton"
        return "extension" if self.backend in ("cpu", "cuda") and not self.is_joint else ""

    @property
    def settles(self) -> bool:
        """Whether its scales have learned enough: the host knows that annealing has begun."""
        epsilon = self.call.settings["epsilon"]
        return self.learning is not None and not isinstance(epsilon, Tensor) and epsilon < 1

    def shorten(self) -> None:
        """Rounds the scales that have learned, after the first step in which they don't any more. Where only a device
        knows whether this was one, after each: what is short already stays as it is.
        """
        epsilon = self.call.settings["epsilon"]
        if self.short and (self.settles or isinstance(epsilon, Tensor)):
            for scale in self.call.lists["scales"]:
                rounded = scale_rules.short(scale)
                scale.copy_(rounded if self.settles else torch.where(epsilon.to(scale.device) < 1, rounded, scale))


def main_gradient(weight: Tensor) -> Any:
    """``weight.main_grad``, or None."""
    return getattr(weight, "main_grad", None)


def check_main_gradients(optimizer: "QuantizedOptimizer", group: Group) -> None:
    """Whether there is one gradient of each weight, where it can be taken from."""
    for name, weight in optimizer._named(group):
        main = main_gradient(weight)
        if main is None:
            continue
        if not isinstance(main, Tensor):
            raise TypeError(f"main_grad of {name} is {main!r}; a tensor, or None, is needed")
        if weight.grad is not None:
            raise ValueError(f"{name} has a grad and a main_grad, and a step takes one of them; set the other to None")
        if distributed.is_sharded(weight):
            raise ValueError(
                f"{name} is a DTensor and has a main_grad; its gradient is taken from grad: put it there, and set "
                "main_grad to None"
            )


def batches(optimizer: "QuantizedOptimizer", group: Group, additions: Additions) -> Iterator[Batch]:
    """The weights of a group that have a gradient, by device, dtype and dtype of the gradient."""
    if any([main_gradient(weight) is not None for weight in group["params"]]):
        check_main_gradients(optimizer, group)
    weights, grads = [], []
    for weight in group["params"]:
        grad = distributed.local_gradient(weight)
        if grad is not None:
            weights.append(weight)
            grads.append(grad)
    if any([grad.is_sparse for grad in grads]):
        sparse = [weight for weight, grad in zip(weights, grads, strict=True) if grad.is_sparse]
        name = optimizer._name_of(sparse[0])
        raise ValueError(f"the gradient of {name} is sparse; dense gradients are needed (sparse=False in an embedding)")
    states = [additions.get(optimizer.state, weight, dict) for weight in weights]
    batch = Batch(weights, grads, states, additions)
    kinds = [(weight.device, weight.dtype, grad.dtype) for weight, grad in zip(weights, grads, strict=True)]
    distinct = list(dict.fromkeys(kinds))
    for kind in distinct:
        yield batch if len(distinct) == 1 else batch.pick([each == kind for each in kinds])


def parts(optimizer: "QuantizedOptimizer", additions: Additions) -> Iterator[Part]:
    """The calls of a step. Nothing is changed."""
    for group in optimizer.param_groups:
        for batch in batches(optimizer, group, additions):
            for some, fixed in optimizer._split(group, batch):
                for alike, scales in optimizer._scales(group, some):
                    if alike.weights:
                        yield part_of(optimizer, group, alike, scales, fixed)


def part_of(
    optimizer: "QuantizedOptimizer", group: Group, batch: Batch, scales: dict[str, list[Tensor]], fixed: dict[str, Any]
) -> Part:
    """The call of a batch. ``scales``: what its state holds of them, by key: none, scales, or scales that learn."""
    first, quantizer = batch.weights[0], optimizer._quantizer(group)
    if is_captured([first]):
        check_capture(group, batch)
    check_state_dtype(group, first, "a weight")
    operator, wide = optimizer._operator, None if group["state_dtype"] is None else torch.float32
    lists: dict[str, list[Tensor]] = {"weights": batch.weights, "grads": batch.grads}
    lists |= {name: [] for name in checks.STATES[operator]}
    kept: dict[str, list[Tensor]] = {}
    for name, key in optimizer._moments(group).items():
        lists[name] = kept[key] = batch.tensors(key, lambda w: torch.zeros_like(w, dtype=wide, requires_grad=False))
    if operator == "adamw_":
        lists["steps"] = kept["step"] = counters(batch, optimizer._counted_there(group))
    lists |= {"scales": [], "codes": [], "snapped": [], "remainders": [], "growths": [], "sums": []}
    kept |= scales
    lists["scales"] = scales.get("scale", [])
    learning, short = None, False
    if quantizer is not None and "scale_velocity" in scales:
        short = scale_rules.are_short(group, quantizer)
        lists["growths"], kinds = scales["scale_growth"], 2 if operator == "sgd_" else 3
        lists["sums"] = [sums_for(distributed.local(scale), kinds) for scale in lists["scales"]]
        counts = [w.numel() // max(1, s.numel()) for w, s in zip(batch.weights, lists["scales"], strict=True)]
        velocities = [distributed.local(velocity) for velocity in scales["scale_velocity"]]
        learning = Learning(velocities, counts, scale_rules.learning_rate(group, quantizer))
    for name in group["outputs"]:
        lists[name] = [buffer(optimizer, name, weight, batch.additions) for weight in batch.weights]
    if group["low_precision"] == "remainder" and first.dtype.itemsize == 2:
        zeros = partial(torch.zeros_like, dtype=torch.int16, requires_grad=False)
        lists["remainders"] = kept["remainder"] = batch.tensors("remainder", zeros)

    owner = weakref.ref(optimizer)  # or the optimizer would hold its plan, and the plan the optimizer

    def names() -> list[str]:
        here, alive = set(batch.weights), owner()
        return [] if alive is None else [name for name, weight in alive._named(group) if weight in here]

    levels = () if quantizer is None else quantizer.codebook.levels
    backend = optimizer._choose(group, first.device, first.dtype)
    call = Call(operator, distributed.here(lists), levels, settings_of(optimizer, group, batch) | fixed)
    return Part(backend, group, batch, kept, fixed, call, learning, short, names)


def sums_for(scale: Tensor, kinds: int) -> Tensor:
    """Where a step puts the sums that a scale learns by: (kinds, scales) float64."""
    there = with_double(scale).device
    return torch.zeros((kinds, scale.numel()), dtype=torch.float64, device=there)


def calls_of(part: Part) -> list[Callable[[], None]]:
    """The calls of a part, to be made one after the other."""
    calls = [backends.ready(part.backend, part.call)]
    if part.is_joint:
        weights, scales, sums = part.batch.weights, part.kept["scale"], part.call.lists["sums"]
        calls.append(partial(distributed.sum_over_ranks_, sums, weights, scales))
    if part.learning is not None:
        calls.append(backends.ready_to_learn(part.backend, part.call, part.learning))
    return calls


def counters(batch: Batch, there: bool) -> list[Tensor]:
    """How many steps each weight has made, counted on the CPU or there; once a GPU counts those of a call, it goes on
    doing so.
    """
    device = batch.weights[0].device
    where = device if there else torch.device("cpu")
    steps = batch.tensors("step", lambda weight: torch.zeros((), dtype=counter_dtype(), device=where))
    if device.type != "cpu" and len({step.device for step in steps} | {where}) > 1:
        pairs = zip(batch.states, steps, strict=True)
        put = batch.additions.put
        steps = [step if step.device == device else put(state, "step", step.to(device)) for state, step in pairs]
    return steps


def buffer(optimizer: "QuantizedOptimizer", name: str, weight: Tensor, additions: Additions) -> Tensor:
    """Where a step writes the codes or the snapped form of a weight."""
    dtype = torch.uint8 if name == "codes" else None
    kept = additions.get(optimizer.outputs, weight, dict)
    made: Tensor = additions.get(kept, name, lambda: torch.empty_like(weight, dtype=dtype, requires_grad=False))
    return made


def is_captured(weights: Sequence[Tensor]) -> bool:
    """Whether a step of these weights is being captured in a CUDA graph."""
    on_gpu = any([weight.is_cuda for weight in weights])
    return on_gpu and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def check_capture(group: Group, batch: Batch) -> None:
    """Whether a CUDA graph that is being captured would do, when it is replayed, what a step does then."""
    if group["total_steps"] is not None:
        raise RuntimeError(
            f"step() in a CUDA graph capture with total_steps = {group['total_steps']}: a replay counts no step; leave "
            "total_steps out and use Anneal, with epsilon=torch.tensor(1.0, device=...), which it fills in place"
        )
    if not group.get("capturable", True):
        raise RuntimeError(
            "step() in a CUDA graph capture with capturable = False: the step would never be counted; pass True"
        )
    first = batch.weights[0]

    def lies_there(value: Any) -> bool:
        return isinstance(value, Tensor) and value.device == first.device

    if group["low_precision"] == "stochastic" and first.dtype.itemsize == 2 and not lies_there(group["seed"]):
        raise RuntimeError(
            f"step() in a CUDA graph capture with seed = {group['seed']!r}: every replay would round by the same "
            "random bits; pass seed=torch.tensor(0, device=...), which each step advances"
        )
    if group["quantizer"] is None:
        return
    if not lies_there(group["epsilon"]):
        raise RuntimeError(
            f"step() in a CUDA graph capture with epsilon = {group['epsilon']!r}: the graph would never anneal; "
            "pass epsilon=torch.tensor(1.0, device=...), which Anneal fills in place"
        )


def settings_of(optimizer: "QuantizedOptimizer", group: Group, batch: Batch) -> dict[str, Any]:
    """The numbers and flags of a call as they are now."""
    settings = {key: group[key] for key in SHARED} | optimizer._rule(group)
    device = batch.weights[0].device
    for key in AMP:
        value = getattr(optimizer, key, None)
        settings[key] = value.to(device) if isinstance(value, Tensor) and not value.is_meta else value
    if group["low_precision"] == "stochastic" and batch.weights[0].dtype.itemsize == 2:
        number = {
            weight: i for i, weight in enumerate(weight for each in optimizer.param_groups for weight in each["params"])
        }
        settings["seed"] = group["seed"]
        settings["streams"] = [number[weight] for weight in batch.weights]
        first = optimizer.first_elements
        settings["first_elements"] = [
            first[each] if each in first else distributed.first_element(each) for each in batch.weights
        ]
    return settings


def changed_settings(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Those that are others than before. Another tensor is another setting, whatever it holds."""
    pairs = [(key, value, before.get(key)) for key, value in now.items()]
    others = [(key, value, old) for key, value, old in pairs if value is not old]
    return {
        key: value
        for key, value, old in others
        if isinstance(value, Tensor) or type(value) is not type(old) or value != old
    }


def same(values: Collection[Any], others: Collection[Any]) -> bool:
    """Whether these are the very same objects."""
    return len(values) == len(others) and all(map(is_, values, others))


class Plan:
    """The calls of a step, checked and ready. Making it changes nothing; :meth:`run` does, all of it or nothing.

    Raises:
        ValueError, TypeError, RuntimeError: an argument of a call is wrong; the message names it, its value and the
            remedy.
    """

    def __init__(self, optimizer: "QuantizedOptimizer"):
        for group in optimizer.param_groups:
            keywords.check_keywords(group)
            optimizer._check_rule(group)
            if group["total_steps"] is not None and group["quantizer"] is not None:
                schedule.phase(group)
        distributed.agree(optimizer, stepping=True)
        self.on_gpu = [weight for group in optimizer.param_groups for weight in group["params"] if weight.is_cuda][:1]
        captured = is_captured(self.on_gpu)
        self.additions = Additions(captured)
        self.parts = list(parts(optimizer, self.additions))
        for part in self.parts:
            checks.check_call(part.call, part.names)
        self.short = [part for part in self.parts if part.short]
        self.structures = [self._structure(optimizer, group) for group in optimizer.param_groups]
        self.groups = list(optimizer.param_groups)
        self.members = [list(group["params"]) for group in self.groups]
        self.values = [list(group.values()) for group in self.groups]  # as they were when the last step took them
        self.scheduled = [[(i, key) for i, key in enumerate(group) if key in SCHEDULED] for group in self.groups]
        self.amp = [getattr(optimizer, key, None) for key in AMP]
        self.restless = [group["low_precision"] == "stochastic" for group in self.groups]  # asks outside of its group
        every = itertools.chain.from_iterable(self.members)
        self.idle = [weight for weight in every if distributed.gradient_of(weight) is None]
        weights = [weight for part in self.parts for weight in part.batch.weights]
        # Where something listens to torch's operations, it hears the calls; else they go straight to the kernels.
        aliases = [weight for part in self.parts for weight in part.call.lists["weights"]]
        self.shards = None if same(weights, aliases) else distributed.Shards(weights, aliases)
        plain = all([type(weight) in checks.PLAIN for weight in aliases]) and torch._C._len_torch_dispatch_stack() == 0
        if torch._C._len_torch_dispatch_stack() == 0:
            checks.check_memory(self._extents())
        keepers = [part.keeper if plain else "" for part in self.parts]
        self.others = [part for part, keeper in zip(self.parts, keepers, strict=True) if not keeper]
        self.ready: list[Callable[[], None]] = []  # the others, as lay_out() has made them ready
        self.kept: dict[str, Any] = {}  # calls that are made again and again, by who keeps them
        self.together: list[Part] = []  # theirs
        self.places: list[tuple[str, int]] = []  # and where each is: who keeps it, its number among theirs
        for keeper in sorted(filter(None, set(keepers)), reverse=True):  # the extension last: see run()
            mine = list(compress(self.parts, [each == keeper for each in keepers]))
            self.kept[keeper] = backends.planned(keeper, [(part.call, part.learning) for part in mine])
            self.together += mine
            self.places += [(keeper, i) for i in range(len(mine))]
        mains = [list(map(main_gradient, part.batch.weights)) for part in self.together]
        self.has_main = [[each is not None for each in of_part] for of_part in mains]  # and not a .grad
        self.calls = [[i for i, part in enumerate(self.together) if part.group is group] for group in self.groups]
        # A weight that has a gradient and no call waits for its first one; what is fixed holds for this step alone.
        whole = len(weights) + len(self.idle) == sum(map(len, self.members))
        once = captured or any(part.fixed or part.settles for part in self.parts)
        self.lasts = plain and whole and not (self.others or once)

    def _extents(self) -> Iterator[checks.Extent]:
        for part in self.parts:
            for name, tensors in part.call.lists.items():
                if name != "grads":
                    names = part.names()
                    for i, tensor in enumerate(tensors):
                        if checks.has_address(tensor):
                            yield checks.extent(f"{name}[{i}] ({names[i]})", tensor, name != "scales")

    @staticmethod
    def _structure(optimizer: "QuantizedOptimizer", group: Group) -> tuple[Any, ...]:
        """What decides which calls a group needs."""
        return _structure_values(group), optimizer._moments(group), optimizer._counted_there(group)

    def holds(self, optimizer: "QuantizedOptimizer") -> bool:
        """Whether the next step is still this plan's; it then has the gradients and the numbers of that step."""
        groups = optimizer.param_groups
        if not self.lasts or not same(groups, self.groups):
            return False
        if is_captured(self.on_gpu):  # whether a capture would do is looked at where a plan is made
            return False
        if torch._C._len_torch_dispatch_stack() > 0:
            return False
        if any([distributed.gradient_of(weight) is not None for weight in self.idle]):
            return False
        amp = [getattr(optimizer, key, None) for key in AMP]
        scaled = not same(amp, self.amp)
        for k, group in enumerate(groups):
            if not same(group["params"], self.members[k]):
                return False
            if scaled or self.restless[k] or not same(group.values(), self.values[k]):
                if not self._take(optimizer, k, scaled):
                    return False
                self.values[k] = list(group.values())
        self.amp = amp
        current = all([self._is_current(optimizer, part) for part in self.together])
        if not current or not (self.shards is None or self.shards.renew()):
            return False
        given = self._given()
        return given is not None and all([calls.take_gradients(given[keeper]) for keeper, calls in self.kept.items()])

    def _given(self) -> dict[str, dict[int, list[Tensor]]] | None:
        """The gradients of calls whose weights don't have them all in ``grad``, where each call asks; None where a
        weight has them elsewhere than it had.
        """
        given: dict[str, dict[int, list[Tensor]]] = {keeper: {} for keeper in self.kept}
        for part, (keeper, number), has_main in zip(self.together, self.places, self.has_main, strict=True):
            mains = list(map(main_gradient, part.batch.weights))
            if [each is not None for each in mains] != has_main:
                return None
            if any(has_main):
                own = [weight.grad for weight in part.batch.weights]
                grads = [main if grad is None else grad for main, grad in zip(mains, own, strict=True)]
                if [each is None for each in own] != has_main or not all([isinstance(each, Tensor) for each in grads]):
                    return None
                given[keeper][number] = grads
        return given

    def _take(self, optimizer: "QuantizedOptimizer", k: int, scaled: bool) -> bool:
        """Hands over what has changed in a group. False where a new plan is needed."""
        group, before = self.groups[k], self.values[k]
        if not scaled and not self.restless[k] and len(group) == len(before):
            now = list(before)
            for place, key in self.scheduled[k]:
                now[place] = group.get(key)
            if same(group.values(), now):  # only what schedules change
                pairs = [(key, now[place]) for place, key in self.scheduled[k] if now[place] is not before[place]]
                changed = {key: value for key, value in pairs if key != "steps_done"}
                return all([self._set(optimizer, i, changed) for i in self.calls[k]])
        if self._structure(optimizer, group) != self.structures[k]:
            return False
        for i in self.calls[k]:
            part = self.together[i]
            settings = settings_of(optimizer, group, part.batch)
            if not self._set(optimizer, i, changed_settings(settings, part.call.settings)):
                return False
        return True

    def _set(self, optimizer: "QuantizedOptimizer", i: int, changed: dict[str, Any]) -> bool:
        """Other numbers for a call. False for flags and words, which a new plan checks together."""
        if not changed:
            return True
        part = self.together[i]
        if not changed.keys() <= FREE:
            return False
        if part.learning and not isinstance(changed.get("epsilon", 1), Tensor) and changed.get("epsilon", 1) < 1:
            return False  # its scales learn no more
        keywords.check_keywords(part.group, changed)
        if not changed.keys() <= keywords.KEYWORDS.keys():
            optimizer._check_rule(part.group)
        checks.check_numbers(changed, part.batch.weights[0].device)
        keeper, number = self.places[i]
        self.kept[keeper].set(number, changed)
        part.call.settings.update(changed)
        return True

    def _is_current(self, optimizer: "QuantizedOptimizer", part: Part) -> bool:
        """Whether the optimizer still has the state that a part was made with."""
        weights, _, states, _ = part.batch
        if not all(map(is_, map(optimizer.state.get, weights), states)):
            return False
        try:
            for key, tensors in part.kept.items():
                if not all(map(is_, map(itemgetter(key), states), tensors)):
                    return False
        except KeyError:
            return False
        if part.group["outputs"]:
            outputs = [optimizer.outputs.get(weight, {}) for weight in weights]
            for name in part.group["outputs"]:
                if not all(map(is_, [distributed.local(each.get(name)) for each in outputs], part.call.lists[name])):
                    return False
        return True

    @property
    def is_one_call(self) -> bool:
        """Whether run() of a plan that was kept is one call of the extension, which nothing interrupts."""
        return self.lasts and self.kept.keys() == {"extension"}

    def lay_out(self) -> None:
        """What is left that can fail: numbers that lie in tensors, copies of tensors that lie in another order than
        their weights.
        """
        for calls in self.kept.values():
            calls.lay_out()
        self.ready = [call for part in self.others for call in calls_of(part)]

    def run(self, entries: list[tuple[dict[str, Any], str, Any]]) -> None:
        """The step. What it adds to the optimizer comes to be with it, and so do entries of param groups: (group, key,
        value).
        """
        if self.additions:
            self.additions.commit()
            self.additions = Additions()
        for call in self.ready:
            call()
        for keeper, calls in self.kept.items():
            if keeper == "extension":
                calls.run(entries)
            else:
                calls.run()
        if "extension" not in self.kept:
            for group, key, value in entries:
                group[key] = value
        for part in self.short:
            part.shorten()
        if self.shards is not None:
            self.shards.release()
        for part in self.parts:  # so that zero_grad() frees them
            for gradients in (part.batch.grads, part.call.lists["grads"]):
                if isinstance(gradients, list):
                    gradients.clear()
