"""A call of an operator as data, and all that can be wrong with it: found before anything is written, for every
backend.
"""

import ctypes
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The lists of an operator's signature between the gradients and the scales, but for AdamW's steps.
STATES = {"sgd_": ("momentum_buffers",), "adamw_": ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")}
# The settings of one rule alone; all other fields of reference.Settings go with both.
OF_RULE = {"sgd_": ("momentum", "dampening", "nesterov"), "adamw_": ("beta1", "beta2", "eps", "amsgrad")}
OF_BOTH = tuple(name for name in reference.Settings._fields if not any(name in names for names in OF_RULE.values()))
ROUNDING = ("seed", "streams", "first_elements")
_TYPES = {name: typing.get_args(kind) or (kind,) for name, kind in typing.get_type_hints(reference.Settings).items()}
NUMBERS: dict[str, tuple[Any, ...]] = {
    **{name: kinds for name, kinds in _TYPES.items() if float in kinds},
    "found_inf": (float, Tensor, type(None)),
    "seed": (int, Tensor, type(None)),
}

PLAIN = (Tensor, torch.nn.Parameter)  # types without a __torch_dispatch__ or __torch_function__ of their own

Names = Callable[[], Sequence[str]]  # of a call's weights, asked for when something is wrong


class Call(NamedTuple):
    """An operator with its arguments by name; :func:`askew_cuda.reference.sgd_` describes them."""

    operator: str  # "sgd_" or "adamw_"
    lists: Mapping[str, Sequence[Tensor]]
    levels: tuple[float, ...]
    settings: dict[str, Any]

    @classmethod
    def of(
        cls,
        operator: str,
        *lists: Any,
        remainders: Sequence[Tensor] = (),
        growths: Sequence[Tensor] = (),
        sums: Sequence[Tensor] = (),
        **settings: Any,
    ) -> "Call":
        """From the arguments as a signature has them."""
        steps = ("steps",) if operator == "adamw_" else ()
        names = ("weights", "grads", *STATES[operator], *steps, "scales", "levels", "codes", "snapped", "remainders")
        by_name: dict[str, Any] = {"remainders": remainders, "growths": growths, "sums": sums}
        by_name |= zip((*names, "growths", "sums"), lists, strict=False)
        levels = tuple(by_name.pop("levels"))
        return cls(operator, by_name, levels, settings)

    def arguments(self) -> dict[str, Any]:
        """All of them, by name."""
        return {**self.lists, "levels": self.levels, **self.settings}


class Learning(NamedTuple):
    """What the scales of a call learn with; :func:`askew_cuda.reference.learn_scales_` describes it."""

    velocities: Sequence[Tensor]
    counts: Sequence[int]
    scale_lr: float

    def arguments(self, call: Call) -> dict[str, Any]:
        """All that ``learn_scales_`` takes after this call, by name."""
        lists = {name: call.lists[name] for name in ("scales", "growths", "sums")}
        settings = call.settings
        shared = {name: settings.get(name) for name in ("lr", "epsilon", "maximize", "grad_scale", "found_inf")}
        if call.operator == "sgd_":
            shared |= {"momentum": settings["momentum"], "dampening": settings["dampening"]}
        else:
            shared |= {"momentum": settings["beta1"], "dampening": settings["beta1"]}
        return {**lists, **self._asdict(), **shared}


def check_call(call: Call, names: Names | None = None) -> None:
    """Raises ValueError or TypeError, which name the argument, its value and the remedy; the names are those of the
    weights.
    """
    if not call.lists["weights"]:
        return
    subject = Subject(call, names)
    subject.check_tensors()
    subject.check_weights()
    subject.check_lists()
    subject.check_levels()
    subject.check_scales()
    subject.check_growths()
    subject.check_names()
    subject.check_rule()
    subject.check_constraint()
    subject.check_rounding()
    check_numbers(call.settings, call.lists["weights"][0].device)


class Subject:
    """A call that is looked at."""

    def __init__(self, call: Call, names: Names | None):
        self.call, self.names, self.lists, self.settings = call, names, call.lists, call.settings
        self.weights = call.lists["weights"]

    def what(self, name: str, i: int) -> str:
        known = self.names() if self.names else ()
        return f"askew_cuda: {name}[{i}]" + (f" ({known[i]})" if i < len(known) else "")

    def check_weights(self) -> None:
        first = self.weights[0]
        for i, weight in enumerate(self.weights):
            if weight.dtype not in DTYPES:
                supported = "float32, float64, bfloat16 and float16 are supported"
                raise TypeError(f"{self.what('weights', i)}: a weight has dtype {weight.dtype}; {supported}")
            if weight.dtype != first.dtype:
                raise TypeError(
                    f"{self.what('weights', i)} is {weight.dtype} but weights[0] is {first.dtype}; one call takes "
                    "one dtype"
                )
            if weight.device != first.device:
                raise ValueError(f"{self.what('weights', i)} is on {weight.device} but weights[0] is on {first.device}")
            if torch._debug_has_internal_overlap(weight) == 1:
                raise ValueError(f"{self.what('weights', i)} of strides {weight.stride()} overlaps itself; clone() it")

    def check_tensors(self) -> None:
        """What is asked of a tensor whatever it is for."""
        for name, tensors in self.lists.items():
            for i, tensor in enumerate(tensors):
                if not isinstance(tensor, Tensor):
                    raise TypeError(f"{self.what(name, i)} is {tensor!r}; a tensor is needed")
                if tensor.layout != torch.strided:
                    raise ValueError(
                        f"{self.what(name, i)} is not a dense tensor ({tensor.layout}); make it one: to_dense()"
                    )
                if lacks_memory(tensor):
                    raise ValueError(f"{self.what(name, i)} has no memory: {_FREED}")
                if (
                    name not in ("grads", "scales", "growths")
                    and tensor.is_inference()
                    and not torch.is_inference_mode_enabled()
                ):
                    raise RuntimeError(
                        f"{self.what(name, i)} was made in inference mode, where alone it can be written to; clone() it"
                    )

    def check_lists(self) -> None:
        """Lists that have a tensor for each weight, of its shape."""
        for name in ("grads", *STATES[self.call.operator], "codes", "snapped", "remainders"):
            tensors = self.lists.get(name, ())
            if name != "grads" and not tensors:
                continue
            self.check_length(name, tensors)
            for i, (weight, tensor) in enumerate(zip(self.weights, tensors, strict=True)):
                if tensor.shape != weight.shape:
                    raise ValueError(
                        f"{self.what(name, i)} has shape {list(tensor.shape)} but weights[{i}] has {list(weight.shape)}"
                    )
                self.check_device(name, i, tensor)
            self.check_dtypes(name, tensors)
        states = {name: self.lists.get(name, ()) for name in STATES[self.call.operator]}
        kinds = {name: tensors[0].dtype for name, tensors in states.items() if tensors}
        if len(set(kinds.values())) > 1:
            raise TypeError(f"askew_cuda: the dtypes of the states differ: {kinds}; one dtype for all")

    def check_length(self, name: str, tensors: Sequence[Tensor]) -> None:
        if len(tensors) != len(self.weights):
            raise ValueError(f"askew_cuda: {name} has {len(tensors)} tensors for {len(self.weights)} weights")

    def check_device(self, name: str, i: int, tensor: Tensor) -> None:
        if tensor.device != self.weights[i].device:
            where = self.weights[i].device
            raise ValueError(
                f"{self.what(name, i)} is on {tensor.device} but weights[{i}] is on {where}; move it there. "
                "Where a model was moved after it was stepped, optimizer.load_state_dict(optimizer.state_dict()) moves "
                "the state"
            )

    def check_dtypes(self, name: str, tensors: Sequence[Tensor]) -> None:
        wanted = self.weights[0].dtype
        for i, tensor in enumerate(tensors):
            dtype = tensor.dtype
            if name in ("codes", "remainders"):
                kind = torch.uint8 if name == "codes" else torch.int16
                if dtype != kind:
                    raise TypeError(f"{self.what(name, i)} is {dtype}; {name} are {kind}")
            elif name == "grads":
                if dtype != wanted and not (dtype == torch.float32 and wanted.itemsize == 2):
                    raise TypeError(
                        f"{self.what(name, i)} is {dtype} but weights[{i}] is {wanted}; the weight's dtype, or float32 "
                        "for a 16-bit weight, is needed"
                    )
            elif name == "snapped":
                if dtype not in DTYPES:
                    supported = "float32, float64, bfloat16 and float16 are supported"
                    raise TypeError(f"{self.what(name, i)} is {dtype}; {supported}")
            elif dtype != wanted and not (dtype == torch.float32 and wanted.itemsize == 2):
                raise TypeError(
                    f"{self.what(name, i)} is {dtype} for weights of {wanted}; their dtype, or float32 for 16-bit "
                    "weights, is needed. Where a model changed its dtype after it was stepped, "
                    "optimizer.load_state_dict(optimizer.state_dict()) casts the state"
                )
            if dtype != tensors[0].dtype:
                raise TypeError(
                    f"{self.what(name, i)} is {dtype} but {name}[0] is {tensors[0].dtype}; one dtype for all"
                )

    def check_levels(self) -> None:
        levels = self.call.levels
        if levels and not 2 <= len(levels) <= 256:
            raise ValueError(f"askew_cuda: levels has {len(levels)} entries; 2 to 256 are supported")
        for k, level in enumerate(levels):
            if ctypes.c_float(level).value != level:
                raise ValueError(f"askew_cuda: levels[{k}] = {level:g} is not a float32 number; round it first")
            if k > 0 and not level > levels[k - 1]:
                raise ValueError(
                    f"askew_cuda: levels[{k}] = {level:g} is not above levels[{k - 1}] = {levels[k - 1]:g}; "
                    "levels are strictly increasing"
                )
        if not levels and (self.lists.get("codes") or self.lists.get("snapped")):
            raise ValueError("askew_cuda: codes and snapped need levels")

    def check_scales(self) -> None:
        scales, levels = self.lists["scales"], self.call.levels
        wanted = len(self.weights) if levels else 0
        if len(scales) != wanted:
            raise ValueError(
                f"askew_cuda: scales has {len(scales)} tensors; {wanted} are needed for {len(self.weights)} weights "
                f"and {len(levels)} levels"
            )
        kind = reference.arithmetic(self.weights[0].dtype)
        for i, (weight, scale) in enumerate(zip(self.weights, scales, strict=False)):
            if scale.dtype != kind:
                raise TypeError(
                    f"{self.what('scales', i)} has dtype {scale.dtype}; {kind} goes with weights of {weight.dtype}. "
                    "Where a model changed its dtype after it was stepped, "
                    "optimizer.load_state_dict(optimizer.state_dict()) casts the state"
                )
            self.check_device("scales", i, scale)
            if not reference.is_scale_shape(scale.shape, weight.shape):
                raise ValueError(
                    f"{self.what('scales', i)} has shape {list(scale.shape)} for a weight of shape "
                    f"{list(weight.shape)}; one number, in each dimension 1, the weight's size or a divisor of it, "
                    "such as (channels, 1, ..), or (rows, groups) are understood"
                )

    def check_growths(self) -> None:
        """What lets scales learn (E7)."""
        growths, sums, scales = self.lists.get("growths", ()), self.lists.get("sums", ()), self.lists["scales"]
        if len(growths) != len(sums) or (growths and len(growths) != len(scales)):
            raise ValueError(
                f"askew_cuda: growths has {len(growths)} tensors and sums {len(sums)} for {len(scales)} scales; one "
                "for each of both, or none"
            )
        kinds = 2 if self.call.operator == "sgd_" else 3
        for i, (scale, growth, each) in enumerate(zip(scales, growths, sums, strict=False)):
            if growth.shape != scale.shape or growth.dtype != scale.dtype:
                raise ValueError(
                    f"{self.what('growths', i)} is {growth.dtype} of shape {list(growth.shape)} but scales[{i}] is "
                    f"{scale.dtype} of shape {list(scale.shape)}"
                )
            self.check_device("growths", i, growth)
            there = reference.with_double(scale).device
            if each.dtype != torch.float64 or list(each.shape) != [kinds, scale.numel()] or each.device != there:
                raise ValueError(
                    f"{self.what('sums', i)} is {each.dtype} of shape {list(each.shape)} on {each.device}; float64 of "
                    f"shape {[kinds, scale.numel()]} on {there} is needed"
                )
            if not each.is_contiguous():
                raise ValueError(f"{self.what('sums', i)} has strides {each.stride()}; contiguous() is needed")

    def check_names(self) -> None:
        """Whether the settings are those of the operator, and complete."""
        known = {*OF_BOTH, *OF_RULE[self.call.operator]}
        optional = {"grad_scale", "found_inf", *ROUNDING}
        missing, unknown = known - optional - set(self.settings), set(self.settings) - known - optional
        if missing or unknown:
            raise TypeError(
                f"askew_cuda: {self.call.operator} takes {', '.join(sorted(known))}; missing: "
                f"{', '.join(sorted(missing)) or 'none'}, unknown: {', '.join(sorted(unknown)) or 'none'}"
            )

    def check_rule(self) -> None:
        """What SGD and AdamW need by themselves."""
        if self.call.operator == "sgd_":
            momentum = self.settings["momentum"]
            if momentum != 0 and not self.lists["momentum_buffers"]:
                raise ValueError(f"askew_cuda: momentum = {momentum} needs momentum_buffers")
            return
        if not self.lists["exp_avgs"] or not self.lists["exp_avg_sqs"]:
            raise ValueError("askew_cuda: adamw_ needs exp_avgs and exp_avg_sqs")
        amsgrad, largest = bool(self.settings["amsgrad"]), self.lists["max_exp_avg_sqs"]
        if amsgrad != bool(largest):
            raise ValueError(f"askew_cuda: amsgrad = {amsgrad} but max_exp_avg_sqs has {len(largest)} tensors")
        steps, there = self.lists["steps"], self.weights[0].device
        self.check_length("steps", steps)
        for i, step in enumerate(steps):
            good = step.numel() == 1 and step.dtype in (torch.float32, torch.float64)
            good = good and (step.is_cpu or step.dtype == steps[0].dtype)
            if not good or step.device not in (torch.device("cpu"), there) or step.device != steps[0].device:
                raise TypeError(
                    f"{self.what('steps', i)} is {step.dtype} of shape {list(step.shape)} on {step.device}; 0-d "
                    f"float32 or float64 tensors, all on the CPU or all of one dtype on {there}, are needed"
                )

    def check_constraint(self) -> None:
        anneal, skew_at = self.settings["anneal"], self.settings["skew_at"]
        if anneal not in ("interval", "capture"):
            raise ValueError(f"askew_cuda: anneal = {anneal!r}; 'interval' or 'capture'")
        if skew_at not in ("gradient", "velocity"):
            raise ValueError(f"askew_cuda: skew_at = {skew_at!r}; 'gradient' or 'velocity'")
        recovery, alpha = self.settings["recovery"], self.settings["alpha"]
        if (recovery is None) == (alpha is None):
            raise ValueError("askew_cuda: give recovery or alpha, not both and not neither")
        if skew_at == "gradient" and (alpha is None or anneal == "capture"):
            raise ValueError("askew_cuda: skew_at = 'gradient' needs alpha and anneal = 'interval'")

    def check_rounding(self) -> None:
        remainders, seed = self.lists.get("remainders", ()), self.settings.get("seed")
        if self.weights[0].dtype.itemsize != 2 and (remainders or seed is not None):
            raise ValueError(
                f"askew_cuda: weights[0] is {self.weights[0].dtype}; remainders and seed are for bfloat16 and float16"
            )
        if remainders and seed is not None:
            raise ValueError("askew_cuda: give remainders or a seed, not both")
        if isinstance(seed, Tensor) and (seed.dtype != torch.int64 or seed.numel() != 1):
            raise TypeError(f"askew_cuda: seed is {seed.dtype} of shape {list(seed.shape)}; one int64 number is needed")
        for name in ("streams", "first_elements"):
            entries = self.settings.get(name) or ()
            if entries and len(entries) != len(self.weights):
                raise ValueError(f"askew_cuda: {name} has {len(entries)} entries for {len(self.weights)} weights")
            for i, entry in enumerate(entries):
                if isinstance(entry, bool) or not isinstance(entry, int) or not 0 <= entry < 2**63:
                    raise TypeError(f"{self.what(name, i)} = {entry!r}; a whole number in [0, 2^63) is needed")


def check_numbers(settings: Mapping[str, Any], there: torch.device) -> None:
    """Whether those of the settings that are numbers can go with weights that are there."""
    for name, value in settings.items():
        kinds = NUMBERS.get(name)
        if kinds is None or (value is None and type(None) in kinds):
            continue
        if isinstance(value, Tensor) and Tensor in kinds:
            if value.numel() != 1 or value.layout != torch.strided:
                raise ValueError(f"askew_cuda: {name} has shape {list(value.shape)}; one number is needed")
            if value.device.type != "cpu" and value.device != there:
                raise ValueError(
                    f"askew_cuda: {name} is on {value.device} but weights[0] is on {there}; put it there, or on the CPU"
                )
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"askew_cuda: {name} = {value!r}; a number is needed")


def check_filled(name: str, number: Tensor) -> None:
    """Whether a number in a tensor can be followed up by a step, in place."""
    if number.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(f"{name} = {number!r} was made in inference mode, where alone it can be filled; clone() it")
    if name == "epsilon" and not number.is_floating_point():
        raise TypeError(f"{name} = {number!r} holds whole numbers, and is filled with others; take torch.tensor(1.0)")


_FREED = "its storage was freed, or is smaller than the tensor; step where it is whole"


def lacks_memory(tensor: Tensor) -> bool:
    """Whether a tensor's storage ends before the tensor does, as where FSDP has freed it: to touch it
    would end the process.
    """
    if not has_address(tensor) or tensor.layout != torch.strided or tensor.numel() == 0:
        return False
    last = tensor.storage_offset() + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.untyped_storage().nbytes() < (last + 1) * tensor.itemsize


def check_memory_of(weight: Tensor, name: str) -> None:
    """Raises ValueError where a weight, by its name, can't even be read."""
    if lacks_memory(weight):
        raise ValueError(f"{name} has no memory: {_FREED}")


class Extent(NamedTuple):
    """Where a tensor lies: bytes [begin, end) of a device."""

    device: str
    begin: int
    end: int
    what: str
    tensor: Tensor
    written: bool


def extent(what: str, tensor: Tensor, written: bool) -> Extent:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return Extent(str(tensor.device), begin, begin + (last + 1) * tensor.itemsize, what, tensor, written)


def has_address(tensor: Tensor) -> bool:
    """Whether a tensor lies in memory itself, not in others that its class wraps."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def check_memory(extents: Iterable[Extent]) -> None:
    """Raises ValueError where something that a step writes lies in the memory of another of its tensors: kernels step
    all at once, and one of two updates would be lost, now and then.
    """
    before: list[Extent] = []
    for now in sorted((each for each in extents if each.tensor.numel()), key=lambda each: each[:3]):
        before = [each for each in before if each.device == now.device and each.end > now.begin]
        for each in before:
            if (each.written or now.written) and _share(each.tensor, now.tensor):
                raise ValueError(
                    f"{each.what} and {now.what} share memory, and one of two steps would be lost at random; tie "
                    "weights as one Parameter (a.weight = b.weight), or clone() one of them"
                )
        before.append(now)


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose extents overlap have an element in common: those between the elements of a slice don't
    count.
    """
    apart = b.data_ptr() - a.data_ptr()
    if all(map(torch.ops.aten.is_non_overlapping_and_dense, (a, b))) or a.itemsize != b.itemsize or apart % a.itemsize:
        return True
    return bool(torch.isin(_offsets(a), _offsets(b) + apart // a.itemsize).any())


def _offsets(tensor: Tensor) -> Tensor:
    """Where each element lies, counted in elements from the first; on the CPU."""
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size, device="cpu") * stride
    return offsets.flatten()
