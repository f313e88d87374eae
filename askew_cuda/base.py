"""What AskewSGD and AskewAdamW share: group keywords, scales, and the way from trained to quantized weights."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops, reference, scales
from .keywords import CONSTRAINT, EXECUTION, check_group, resolve_rate
from .quantizer import Quantizer, codes, distance, snap


@dataclass(frozen=True)
class TensorReport:
    """One tensor, before finalize() snapped it. Distances are in units of half the distance between levels: 0 on a level, 1 half-way."""

    name: str
    numel: int
    max_distance: float
    share_on_level: float


@dataclass(frozen=True)
class FinalizeReport:
    """What finalize() did: in all, and per tensor. ``never_stepped`` names quantized weights that never received a gradient."""

    max_distance: float
    share_on_level: float
    never_stepped: tuple[str, ...]
    tensors: tuple[TensorReport, ...]


class Batch(NamedTuple):
    """Weights that step in one call, their gradients and their states."""

    weights: list[Tensor]
    grads: list[Tensor]
    states: list[dict]

    def pick(self, wanted: list[bool]) -> "Batch":
        """Those that are wanted."""
        return Batch(*([item for item, keep in zip(items, wanted, strict=True) if keep] for items in self))


class QuantizedOptimizer(torch.optim.Optimizer):
    """Base of the optimizers: everything but the rule. Subclasses say what a call takes, in :meth:`_calls`."""

    def __init__(self, params, defaults: dict, constraint: dict):
        unknown = set(constraint) - set(CONSTRAINT)
        if unknown:
            raise TypeError(
                f"{type(self).__name__}: unknown keywords {', '.join(sorted(unknown))}; beyond torch's there are {', '.join(CONSTRAINT)}"
            )
        self._start()
        super().__init__(params, {**defaults, **CONSTRAINT, **constraint})

    def _start(self) -> None:
        """What is neither saved nor copied."""
        self.outputs: dict[Tensor, dict[str, Tensor]] = {}
        self._stepped: set[Tensor] = set()
        self._quantized_depth = 0
        self._lent: dict[Tensor, Tensor] = {}  # scales that are not set yet, while quantized() holds them
        self._parsed: dict[int, tuple[object, Quantizer]] = {}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "_parsed" not in self.__dict__:  # unpickled or copied; load_state_dict also comes through here
            self._start()
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    # Param groups

    def add_param_group(self, param_group: dict) -> None:
        """As torch's; the group may bring any of the keywords of the constructor. Nothing is added when one is wrong."""
        group = dict(param_group)
        if "params" in group:
            group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        settings = {**self.defaults, **group}
        group["recovery"], group["alpha"] = resolve_rate(group, self.defaults, settings["skew_at"])
        settings.update(group)
        check_group(settings)
        self._check_rule(settings)
        quantizer = None if settings["quantizer"] is None else Quantizer.parse(settings["quantizer"])
        group["quantizer"] = None if quantizer is None else quantizer.plain()
        group["outputs"] = list(settings["outputs"])
        group["state_dtype"] = None if settings["state_dtype"] is None else "float32"
        for index, item in enumerate(group.get("params", ())):
            name, weight = item if isinstance(item, tuple) else (f"params[{index}]", item)
            if not isinstance(weight, Tensor):
                continue  # torch's own error says it best
            if weight.layout != torch.strided or weight.is_complex() or weight.dtype not in ops.DTYPES:
                raise TypeError(
                    f"{name} is {weight.dtype} ({weight.layout}); dense float32, float64, bfloat16 and float16 weights can be stepped"
                )
            if group["state_dtype"] is not None and weight.dtype == torch.float64:
                raise ValueError(f"state_dtype = float32, but {name} is float64; it is for 16-bit weights")
            if quantizer is not None:
                quantizer.check(weight, name)
            chosen = ops.choose(settings["backend"], weight.device, weight.dtype)
            if settings["fused"] and chosen == "reference":
                raise RuntimeError(f"fused = True, but the pure PyTorch reference would step {name} on {weight.device}; leave it None")
        super().add_param_group(group)

    def _quantizer(self, group: dict) -> Quantizer | None:
        plain = group["quantizer"]
        if plain is None:
            return None
        known = self._parsed.get(id(group))
        if known is None or known[0] != plain:
            known = self._parsed[id(group)] = (plain, Quantizer.parse(plain))
        return known[1]

    def _named(self, group: dict) -> Iterator[tuple[str, Tensor]]:
        names = group.get("param_names")
        where = next(i for i, each in enumerate(self.param_groups) if each is group)
        for i, weight in enumerate(group["params"]):
            yield (names[i] if names else f"param_groups[{where}]['params'][{i}]"), weight

    # Scales

    @staticmethod
    def _new_scale(group: dict, quantizer: Quantizer, name: str, weight: Tensor) -> Tensor:
        return scales.estimate(weight.detach(), quantizer, pretrained=group["pretrained"], name=name)

    def _set_scale(self, group: dict, quantizer: Quantizer, name: str, weight: Tensor) -> None:
        """Sets a weight's scale, for ever, and warns when the first clip would tear a trained network apart."""
        scale = self._new_scale(group, quantizer, name, weight)
        if group["clip"] and not group["pretrained"] and not scales.is_torch_default(weight):
            outside = scales.share_outside(weight.detach(), scale, quantizer.codebook.levels)
            if outside > 0.25:
                warnings.warn(
                    f"{name}: clipping to the outermost levels will move {outside:.0%} of its weights in the first step; "
                    "if the network is trained already, pass pretrained=True; clip=False leaves them outside",
                    stacklevel=4,
                )
        self.state[weight]["scale"] = scale

    @torch.no_grad()
    def prepare(self) -> None:
        """Sets every quantized weight's scale now, from the weights as they are, instead of at its first step.

        It is the one moment that may synchronise with a device: call it before capturing a graph or compiling.

        Raises:
            ValueError: a weight holds NaN, infinity or nothing but zeros; the message names it. Scales set before it stay.
        """
        for group in self.param_groups:
            quantizer = self._quantizer(group)
            if quantizer is not None:
                for name, weight in self._named(group):
                    if "scale" not in self.state[weight]:
                        self._set_scale(group, quantizer, name, weight)

    def _scales(self, group: dict, batch: Batch) -> list[Tensor]:
        """The scale of each weight; set now where it is missing."""
        quantizer = self._quantizer(group)
        if quantizer is None:
            return []
        try:
            return [state["scale"] for state in batch.states]
        except KeyError:
            wanted = set(batch.weights)
            for name, weight in self._named(group):
                if weight in wanted and "scale" not in self.state[weight]:
                    self._set_scale(group, quantizer, name, weight)
            return [state["scale"] for state in batch.states]

    def _outputs(self, group: dict, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Buffers for codes and snapped weights; empty lists where they are not wanted."""
        lists: dict[str, list[Tensor]] = {"codes": [], "snapped": []}
        for key in group["outputs"]:
            for weight in batch.weights:
                kept = self.outputs.setdefault(weight, {})
                if key not in kept:
                    kept[key] = torch.empty_like(weight, dtype=torch.uint8 if key == "codes" else None, requires_grad=False)
                lists[key].append(kept[key])
        return lists["codes"], lists["snapped"]

    # The step

    @torch.no_grad()
    def step(self, closure=None):
        """One step: base rule, constraint, clip and outputs in one pass over each tensor. ``p.grad`` is never written.

        Args:
            closure: reevaluates the model and returns the loss; it sees the trained weights.

        Raises:
            RuntimeError: called inside :meth:`quantized`. ValueError: a gradient is sparse, or a scale can't be set. Nothing has
                moved then.
        """
        if self._quantized_depth:
            raise RuntimeError("step() inside quantized(): the weights are snapped copies there; leave the block first")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        calls = [call for group in self.param_groups for call in self._group_calls(group)]
        for call in calls:
            call()
        return loss

    def _group_calls(self, group: dict) -> Iterator[Callable[[], None]]:
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
        batch = Batch(weights, grads, [self.state[weight] for weight in weights])
        kinds = {(device, dtype) for device in {w.device for w in weights} for dtype in {w.dtype for w in weights}}
        for device, dtype in kinds:
            same = batch if len(kinds) == 1 else batch.pick([w.dtype == dtype and w.device == device for w in weights])
            if same.weights:
                yield from self._calls(group, ops.operators(ops.choose(group["backend"], device, dtype)), same)
        if len(self._stepped) < sum(len(each["params"]) for each in self.param_groups):
            self._stepped.update(weights)

    @staticmethod
    def _state_tensors(group: dict, batch: Batch, key: str) -> list[Tensor]:
        """A state tensor of each weight; zeros where it is missing."""
        try:
            return [state[key] for state in batch.states]
        except KeyError:
            dtype = None if group["state_dtype"] is None else torch.float32
            for weight, state in zip(batch.weights, batch.states, strict=True):
                if key not in state:
                    state[key] = torch.zeros_like(weight, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
            return [state[key] for state in batch.states]

    def _constraint(self, group: dict) -> tuple[list[float], dict]:
        """Levels and keyword arguments of a call that both rules share."""
        quantizer = self._quantizer(group)
        keys = ("lr", "weight_decay", "maximize", "epsilon", "anneal", "skew_at", "recovery", "alpha", "max_step", "clip")
        return ([] if quantizer is None else quantizer.codebook.levels), {key: group[key] for key in keys}

    # From trained to quantized

    def _quantized_weights(self) -> Iterator[tuple[str, Tensor, Tensor, tuple[float, ...], dict]]:
        """name, weight, scale, levels and group of each quantized weight; a scale that is not set yet is computed, not stored."""
        for group in self.param_groups:
            quantizer = self._quantizer(group)
            if quantizer is not None:
                for name, weight in self._named(group):
                    scale = self.state[weight].get("scale") if weight in self.state else None
                    scale = self._lent.get(weight) if scale is None else scale
                    scale = self._new_scale(group, quantizer, name, weight) if scale is None else scale
                    yield name, weight, scale, quantizer.codebook.levels, group

    def quantized_parameters(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """(weight, codes, levels, scale) of every quantized weight: the snapped weight is ``scale * levels[codes]``.

        codes: uint8, as the weight. levels: (K,), the scale's dtype. scale: () | (channels, 1, ..) | (rows, groups), the last for
        ``weight.reshape(rows, groups, -1)``. Nothing is mutated.
        """
        for _, weight, scale, levels, _ in self._quantized_weights():
            yield weight, codes(weight.detach(), scale, levels), scale.new_tensor(levels), scale

    @contextlib.contextmanager
    def quantized(self):
        """Weights on their levels inside the block; the trained ones are back after it, whatever happens in it. May be nested.

        Holds a copy of the quantized weights meanwhile. step() is refused inside.
        """
        self._quantized_depth += 1
        trained: list[tuple[Tensor, Tensor]] = []
        try:
            if self._quantized_depth == 1:
                with torch.no_grad():
                    for _, weight, scale, levels, _ in self._quantized_weights():
                        snapped = snap(weight, scale, levels)
                        trained.append((weight, weight.detach().clone()))
                        self._lent[weight] = scale
                        weight.copy_(snapped)
            yield
        finally:
            with torch.no_grad():
                for weight, value in trained:
                    weight.copy_(value)
            self._quantized_depth -= 1
            if self._quantized_depth == 0:
                self._lent.clear()

    @torch.no_grad()
    def finalize(self) -> FinalizeReport:
        """Snaps every quantized weight onto its level, for good, and says how far they were.

        Returns:
            The largest distance, in units of half the distance between levels, the share of weights that were on a level, and
            the names of quantized weights that never received a gradient; per tensor and in all.

        Raises:
            ValueError: a weight holds NaN; nothing has been snapped. RuntimeError: called inside :meth:`quantized`.
        """
        if self._quantized_depth:
            raise RuntimeError("finalize() inside quantized(): leave the block first")
        found, tensors, annealing = list(self._quantized_weights()), [], 0.0
        for name, weight, scale, levels, group in found:
            away = distance(weight, scale, levels)
            if away.isnan().any():
                raise ValueError(f"finalize: {name} holds {int(away.isnan().sum())} NaN weights; they have no level")
            largest, share = (float(away.max()), float((away == 0).double().mean())) if away.numel() else (0.0, 1.0)
            tensors.append(TensorReport(name, weight.numel(), largest, share))
            annealing = max(annealing, float(group["epsilon"]))
        total = sum(each.numel for each in tensors)
        largest = max((each.max_distance for each in tensors), default=0.0)
        share = sum(each.share_on_level * each.numel for each in tensors) / total if total else 1.0
        if annealing > 0:
            warnings.warn(
                f"finalize: epsilon is still {annealing:.3g}: {1 - share:.1%} of the weights are off their levels and will move, "
                f"by up to {largest:.3g} of half the distance between levels; anneal to 0 first",
                stacklevel=2,
            )
        for _, weight, scale, levels, _ in found:
            weight.copy_(snap(weight, scale, levels))
            self.state[weight]["scale"] = scale
        never = tuple(name for name, weight, *_ in found if weight not in self._stepped)
        return FinalizeReport(largest, share, never, tuple(tensors))

    # Checkpoints

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads a checkpoint of this optimizer, or of torch's: then the groups keep their quantizers and the other keywords.

        Scales are taken over as they are; a checkpoint without them drops the stored ones (set again at the next step). What
        says how to compute (backend, outputs, fused, ..) stays as it is here.
        """
        saved = state_dict["param_groups"]
        if len(saved) == len(self.param_groups):  # if not, torch's error says it
            keep = (*CONSTRAINT, *EXECUTION)
            merged = []
            for theirs, mine in zip(saved, self.param_groups, strict=True):
                kept = {key: mine[key] for key in keep if key in mine and (key not in theirs or key in EXECUTION)}
                merged.append({**theirs, **kept})
            state_dict = {**state_dict, "param_groups": merged}
        super().load_state_dict(state_dict)
        ids = [index for group in saved for index in group["params"]]
        for index, weight in zip(ids, (w for group in self.param_groups for w in group["params"]), strict=True):
            raw = state_dict["state"].get(index)
            if raw:
                self._stepped.add(weight)
                self._exempt(weight, raw)

    def _exempt(self, weight: Tensor, raw: dict) -> None:
        """torch casts loaded state to the weight's dtype; scales keep theirs, and so does float32 state of 16-bit weights."""
        group = next(group for group in self.param_groups if any(each is weight for each in group["params"]))
        for key, value in raw.items():
            if value is None:
                del self.state[weight][key]  # old versions of torch write a momentum_buffer that is None
            elif key == "scale":
                self.state[weight][key] = value.to(weight.device, reference.arithmetic(weight.dtype), copy=True)
            elif key != "step" and group["state_dtype"] is not None and isinstance(value, Tensor):
                self.state[weight][key] = value.to(weight.device, torch.float32, copy=True)

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.param_groups):
            quantizer = self._quantizer(group)
            kinds = dict.fromkeys((weight.device, weight.dtype) for weight in group["params"])
            chosen = [f"{ops.choose(group['backend'], device, dtype)} for {dtype} on {device}" for device, dtype in kinds]
            shown = {key: value for key, value in sorted(group.items()) if key not in ("params", "param_names")}
            shown["quantizer"] = None if quantizer is None else quantizer.summary()
            lines += [f"Parameter Group {i}", *(f"    {key}: {value}" for key, value in shown.items())]
            lines.append(f"    runs on: {', '.join(chosen) or 'nothing'}")
        return "\n".join([*lines, ")"])
