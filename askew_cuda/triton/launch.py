"""The Triton backend: from the lists of a call to one launch of :mod:`askew_cuda.triton.kernel`.

A launch steps all tensors of a call, which :mod:`askew_cuda.triton.where` lays out. A plan keeps the calls
themselves, and asks of each tensor only whether it is where it was. Nothing is read from the device, and numbers that
lie there are read by the kernel; with one exception: AdamW's step counts on the CPU can only stand still for a
``found_inf`` that the host has read.

It is written for NVIDIA's GPUs and has not yet run on one. ROCm and XPU, which Triton compiles for as well, are
untested.

With TRITON_INTERPRET=1 in the environment Triton runs the same code on the CPU, slowly, for tests.
"""

import collections
import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter, eq
from typing import Any, NamedTuple, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from .. import reference
from ..checks import STATES, Call
from ..reference import Settings
from ..rounding import Storage
from . import where
from .kernel import step_kernel
from .where import INTERPRETED, Lists, Located, Rounding, Tensors

Scalar = float | Tensor | None  # one that changes from step to step
Rule = tuple[float | Tensor, ...]  # the settings of SGD or AdamW, in the order in which the kernel unpacks them
Step = TypeVar("Step", bound=Callable[..., None])


dtype_of = attrgetter("dtype")
# Triton's interpreter converts to bfloat16 by cutting off: there its bits are handled as integers, and rounded by the
# kernel.
STORAGE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.uint16 if INTERPRETED else tl.bfloat16,
    None: None,
}


captured: list[tuple[object, ...]] = []  # what CUDA graphs go on reading, as long as the process lives


def in_use(tensors: Tensors, device: torch.device) -> None:
    """The current stream reads these, which other streams may share: once they are dropped, torch's allocator gives
    their memory to nobody before that has been done.
    """
    if device.type != "cpu":
        stream = torch.get_device_module(device).current_stream(device)
        for tensor in tensors:
            tensor.record_stream(stream)


@functools.lru_cache(maxsize=64)
def kernel_book(
    levels: tuple[float, ...], device: torch.device
) -> tuple[tuple[float, float, float, float | Tensor], int]:
    """(book, capacity) as the kernel takes them; capacity 0: no table is needed."""
    if not levels:
        return (0.0, 0.0, 0.0, 0.0), 0
    like = torch.zeros((), dtype=torch.float32, device="cpu")
    book = reference.codebook(levels, like)
    ends = (float(book.unit), float(book.lowest), float(book.highest))
    if isinstance(book, reference.UniformCodebook):
        return (*ends, float(book.top)), 0
    capacity = 16 if len(levels) <= 16 else 256
    rows = (book.levels, book.midpoints, book.below, book.above, book.below.reciprocal(), book.above.reciprocal())
    table = torch.full((len(rows), capacity), math.inf, device="cpu")
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return (*ends, table.to(device)), capacity


def argument(name: str, value: Scalar, default: float, device: torch.device) -> float | Tensor:
    """A scalar as the kernel takes it: a number where the host has it, else where it lies, in float32."""
    if value is None:
        return default
    if not isinstance(value, Tensor) or (value.is_cpu and device.type != "cpu"):
        return float(value)
    if value.device != device:
        raise ValueError(
            f"askew_cuda: {name} is on {value.device} and the weights on {device}; it can be a number, there, or on "
            "the CPU"
        )
    return value.detach().to(torch.float32)


def snap_radius(
    dtype: torch.dtype, levels: tuple[float, ...], settings: Settings, device: torch.device
) -> float | Tensor:
    """The reference's, computed in double; where it depends on an lr that lies on the device, there."""
    if settings.alpha is None:
        share: float | Tensor = settings.recovery or 0.0
    elif isinstance(settings.lr, Tensor) and settings.lr.device == device:
        share = settings.lr.detach().double() * settings.alpha
    else:
        share = float(settings.lr) * settings.alpha
    radius = reference.snap_radius(dtype, levels, share)
    return radius.float() if isinstance(radius, Tensor) else radius


def bias_corrections(
    steps: Tensors, beta1: float, beta2: float, device: torch.device
) -> tuple[float | Tensor, float | Tensor]:
    """1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t) for the step to come, computed in double, rounded once to float32:
    two numbers where all weights have taken as many steps, else two tensors with one for each weight.
    """
    if not steps[0].is_cpu:
        return device_bias_corrections(torch.stack(list(steps)), beta1, beta2)
    counts = [step.item() + 1 for step in steps]
    pairs = {count: (1 / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count)) for count in set(counts)}
    if len(pairs) == 1:
        return pairs[counts[0]]
    first, second = (
        torch.tensor(each, dtype=torch.float32, device="cpu").to(device, non_blocking=True)
        for each in zip(*map(pairs.__getitem__, counts), strict=True)
    )
    return first, second


def device_bias_corrections(steps: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """The same where the steps lie. A device's powers may be an ulp of double away, so these one of float32."""
    count = steps.double() + 1
    return (1 / (1 - beta1**count)).float(), (1 / (1 - beta2**count).sqrt()).float()


def count_steps(steps: Tensors, infinite: float | Tensor) -> None:
    """One step more, but where AMP found an infinity: on a device that is known there alone."""
    if isinstance(infinite, float) and steps[0].is_cpu:
        for step in steps:  # in half the time of torch._foreach_add_
            step.fill_(step.item() + 1)
    elif isinstance(infinite, float):
        torch._foreach_add_(list(steps), 1)
    else:
        torch._foreach_add_(list(steps), (infinite == 0).to(steps[0].dtype))


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Where Triton launches: on the current device. NumPy, which interprets, is to compute with infinities and NaN
    without a word.
    """
    if device.type != "cpu":
        with torch.get_device_module(device).device(device):
            yield
    else:
        import numpy

        with numpy.errstate(all="ignore"):
            yield


class Launch(NamedTuple):
    """What the kernel is called with."""

    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    infinite: float | Tensor

    def make(self, located: Located) -> None:
        """One launch for all tensors, whose versions it increments."""
        (table, owner), book, device = self.arguments[:2], self.arguments[7], located.layout.owner.device
        in_use([each for each in (table, owner, *book) if isinstance(each, Tensor)], device)
        if where.capturing(device):
            captured.append((table, owner, book))
        if len(owner):
            with on_device(device):
                step_kernel[(len(owner),)](*self.arguments, **self.constants)
        for original, copy in located.written:
            original.copy_(copy)
        torch.autograd.graph.increment_version(located.changed)


def make_launch(
    located: Located, s: Settings, seed: Tensor | int | None, steps: Tensors, infinite: float | Tensor
) -> Launch:
    """From the numbers as they are now."""
    lists, layout, rounding = located.lists, located.layout, located.lists.rounding._replace(seed=seed)
    device, dtype, quantized = lists.weights[0].device, lists.weights[0].dtype, bool(lists.levels)
    book, capacity = kernel_book(lists.levels, device)
    capture, rate, adamw = s.anneal == "capture", s.alpha if s.recovery is None else s.recovery, bool(steps)
    assert rate is not None  # checked before
    exact = torch.float32 if rounding.remainders else dtype  # as which a weight is as exact as it is stored
    snap = snap_radius(exact, lists.levels, s, device) if capture and quantized else 0.0
    numbers = [
        argument(name, getattr(s, name), default, device)
        for name, default in (("lr", 0.0), ("epsilon", 0.0), ("grad_scale", 1.0))
    ]
    pull = (float(rate), float(s.max_step), snap)
    states = [tensors for tensors in lists.state.values() if tensors]
    constants = {
        "BLOCK": layout.program.block, "MAXIMIZE": bool(s.maximize), "RATE_IS_ALPHA": s.alpha is not None,
        "WEIGHT_TYPE": STORAGE[dtype], "GRAD_TYPE": STORAGE[located.grad_dtype],
        "STATE_TYPE": STORAGE[states[0][0].dtype if states else torch.float32],
        "SNAPPED_TYPE": STORAGE[lists.snapped[0].dtype if lists.snapped else None], "CODED": bool(lists.codes),
        "ROUNDING": rounding.name, "ADAMW": adamw, "STATES": len(states), "DECAYS": adamw or s.weight_decay != 0,
        "NESTEROV": bool(s.nesterov and s.momentum != 0), "QUANTIZED": quantized, "GROWS": bool(lists.growths),
        "CAPACITY": capacity, "PER_TENSOR": layout.per_tensor, "CAPTURE": capture,
        "SKEW_GRADIENT": quantized and s.skew_at == "gradient", "CLIP": quantized and bool(s.clip),
        "num_warps": layout.program.warps, "enable_fp_fusion": False,
    }  # fmt: skip
    seeds, rule = rounding.seed_argument(device), rule_of(s, steps, device)
    return Launch((located.table, layout.owner, *numbers, infinite, pull, book, rule, seeds), constants, infinite)


def sum_up(lists: Lists, sums: Tensors, infinite: float | Tensor) -> None:
    """(E7) before the launch, by PyTorch's operations, which take memory and time that the kernel does not; scales
    learn while weights are free.
    """
    storage = Storage(lists.rounding.remainders, None, (), (), infinite)
    for i, each in enumerate(sums):
        weight = lists.weights[i]
        radial = reference.radial_sums(lists.grads[i].float(), storage.load(i, weight), lists.scales[i].shape)
        storage.write(each[:2], torch.stack(radial))


def sum_up_second(lists: Lists, sums: Tensors, steps: Tensors, s: Settings, infinite: float | Tensor) -> None:
    """The same of AdamW's second moments, after the launch."""
    storage = Storage((), None, (), (), infinite)
    for i, each in enumerate(sums):
        square = lists.state["max_exp_avg_sqs" if s.amsgrad else "exp_avg_sqs"][i].float()
        storage.write(each[2], reference.second_moments(square, steps[i], s, lists.scales[i].shape))


def rule_of(s: Settings, steps: Tensors, device: torch.device) -> Rule:
    """The numbers of SGD, or, where steps are counted, of AdamW, in the kernel's order."""
    if not steps:
        return float(s.momentum), 1.0 - s.dampening, float(s.weight_decay)
    moments = (float(s.beta1), 1.0 - s.beta1, float(s.beta2), 1.0 - s.beta2)
    return (*moments, float(s.eps), float(s.weight_decay), *bias_corrections(steps, s.beta1, s.beta2, device))


def lists_of(call: Call) -> Lists:
    """Those of a call, of which some may be left out."""
    lists, settings = collections.defaultdict(tuple, call.lists), call.settings
    has_state = settings.get("momentum") != 0
    numbers = (settings.get(name, ()) for name in ("streams", "first_elements"))
    rounding = Rounding(lists["remainders"], settings.get("seed"), *numbers)
    return Lists(
        lists["weights"],
        lists["grads"],
        {name: lists[name] if has_state else () for name in STATES[call.operator]},
        lists["scales"],
        call.levels,
        lists["growths"],
        lists["codes"],
        lists["snapped"],
        rounding,
    )


class Prepared:
    """A call that is ready to be made, as often as its tensors stay what they are; gradients come anew each time. What
    can be wrong with its arguments was checked before (``checks.py``).
    """

    def __init__(self, call: Call):
        self.lists, self.settings = lists_of(call), dict(call.settings)
        self.steps, self.sums = call.lists.get("steps", ()), call.lists.get("sums", ())
        self.located: Located | None = None
        self.launch: Launch | None = None

    def lay_out(self) -> None:
        """Everything that can fail: numbers, copies, the table. Where AMP found an infinity, as far as the host knows,
        there is nothing to launch.
        """
        self.launch = None
        if not self.lists.weights:
            return
        device = self.lists.weights[0].device
        infinite = argument("found_inf", self.settings.get("found_inf"), 0.0, device)
        if isinstance(infinite, Tensor) and self.steps and self.steps[0].is_cpu:
            infinite = float(infinite)
        if isinstance(infinite, float) and infinite != 0:
            return
        if self.located is None:
            self.located = Located(self.lists)
        else:
            self.located.follow(self.lists.grads)
        self.launch = make_launch(self.located, self._numbers(), self.settings.get("seed"), self.steps, infinite)

    def _numbers(self) -> Settings:
        return Settings(**{key: value for key, value in self.settings.items() if key in Settings._fields})

    def run(self) -> None:
        """The step; then gradients are let go of, so that zero_grad() frees them."""
        if self.launch is not None and self.located is not None:
            infinite = self.launch.infinite
            sum_up(self.lists, self.sums, infinite)
            self.launch.make(self.located)
            if self.steps:
                sum_up_second(self.lists, self.sums, self.steps, self._numbers(), infinite)
                count_steps(self.steps, infinite)
        if self.located is not None and not self.located.in_order:
            self.located = None  # copies are made anew each time
        self.lists = self.lists._replace(grads=())


# The launch follows addresses, which a trace does not have.
outside_of_graphs: Callable[[Step], Step] = torch.compiler.disable(
    reason="the Triton backend is launched outside of torch.compile's graphs"
)


@outside_of_graphs
@torch.no_grad()
def make(call: Call) -> None:
    """A call of an operator in one launch, for float32, bfloat16 and float16; arguments are checked before. The host
    reads nothing of what lies on the weights' device (lr, epsilon, grad_scale, found_inf), but for a found_inf where
    AdamW's steps are counted on the CPU, so that they can stand still. Where those are counted on the weights' device,
    the bias corrections may differ from the reference's by a last bit.
    """
    prepared = Prepared(call)
    prepared.lay_out()
    prepared.run()


def sgd_(*lists: Any, **settings: Any) -> None:
    """:func:`askew_cuda.reference.sgd_`."""
    make(Call.of("sgd_", *lists, **settings))


def adamw_(*lists: Any, **settings: Any) -> None:
    """:func:`askew_cuda.reference.adamw_`."""
    make(Call.of("adamw_", *lists, **settings))


class Kept(Prepared):
    """A call that a plan makes again and again."""

    def __init__(self, call: Call):
        super().__init__(call)
        # That states and outputs are the same tensors is the plan's to know; what it does not see is their data being
        # set to lie elsewhere.
        self.lasting, self.grad_dtype = where.lasting(self.lists), self.lists.grads[0].dtype
        self.places = where.places(self.lasting)
        self.forms = [list(map(form, tensors)) for form, tensors in self._forms(self.lists.grads)]

    def _forms(self, grads: Tensors) -> list[tuple[Callable[[Tensor], Any], Tensors]]:
        """What the form of tensors is told by. It says the shape of a weight, and of its ``grad``, which torch holds to
        the weight's shape and device.
        """
        return [(form, tensors) for tensors in (self.lists.weights, grads) for form in (Tensor.numel, Tensor.stride)]

    def take_gradients(self, given: Tensors | None) -> bool:
        """The weights' gradients as they are now, or those that are given. False where a tensor, or a gradient, is not
        of the kind or in the place that the call was made for.
        """
        grads = given or [grad for weight in self.lists.weights if (grad := weight.grad) is not None]
        if len(grads) != len(self.lists.weights) or set(map(dtype_of, grads)) != {self.grad_dtype}:
            return False
        if given and not all(map(_lies_beside, given, self.lists.weights)):
            return False
        self.lists = self.lists._replace(grads=grads)
        try:
            now = (map(form, tensors) for form, tensors in self._forms(grads))
            same = all([all(map(eq, form, before)) for form, before in zip(now, self.forms, strict=True)])
        except RuntimeError:  # a sparse gradient has no strides
            return False
        return same and where.places(self.lasting) == self.places


def _lies_beside(grad: Tensor, weight: Tensor) -> bool:
    """Whether a gradient that is not the weight's ``grad`` has its shape and lies on its device."""
    return grad.shape == weight.shape and grad.device == weight.device


class KeptCalls:
    """Calls that are made together, again and again: the extension's Plan for this backend."""

    def __init__(self, calls: Sequence[Call]):
        self.calls = [Kept(call) for call in calls]

    def set(self, call: int, changed: Mapping[str, Any]) -> None:
        """Other numbers for one call."""
        self.calls[call].settings |= changed

    def take_gradients(self, given: Mapping[int, Tensors]) -> bool:
        """Whether all calls can be made again, with the weights' gradients as they are now, or with those that are
        given, by the number of their call.
        """
        return all([call.take_gradients(given.get(i)) for i, call in enumerate(self.calls)])

    def lay_out(self) -> None:
        """All that can fail, before run()."""
        for call in self.calls:
            call.lay_out()

    def run(self) -> None:
        """All calls."""
        for call in self.calls:
            call.run()
