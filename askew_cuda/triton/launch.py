"""The Triton backend: from the lists of a call to one launch of :mod:`askew_cuda.triton.kernel`.

A launch steps all tensors of a call: a table on the device says where they lie, and a map which tensor each program's
block is in. Both are kept: the map is made anew only for other layouts, the table where tensors lie elsewhere. A call
with the tensors of an earlier one is known by their addresses, before anything else is looked at. Nothing is read from
the device, and numbers that lie there are read by the kernel; with one exception: AdamW's step counts on the CPU can
only stand still for a ``found_inf`` that the host has read.

It is written for NVIDIA's GPUs and has not yet run on one. ROCm and XPU, which Triton compiles for as well, are
untested.

With TRITON_INTERPRET=1 in the environment Triton runs the same code on the CPU, slowly, for tests.
"""

import contextlib
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference import Settings
from ..rounding import Storage
from .kernel import step_kernel

Tensors = Sequence[Tensor]
Scalar = float | Tensor | None  # one that changes from step to step
Addresses = tuple[tuple[int, ...], ...]
Rule = tuple[float | Tensor, ...]  # the settings of SGD or AdamW, in the order in which the kernel unpacks them
Made = TypeVar("Made")
Step = TypeVar("Step", bound=Callable[..., None])


class Program(NamedTuple):
    """Its weights, and the warps that share them."""

    block: int
    warps: int


# 4 weights per thread: 16 bytes of float32. A warp has 32 threads; on AMD's data-center GPUs 64, on Intel's 16.
PROGRAMS = {"cuda": Program(512, 4), "hip": Program(1024, 4), "xpu": Program(512, 8), "cpu": Program(512, 4)}
BESIDE = 8  # columns of the table that hold addresses of weights and what lies beside them
INTERPRETED = not isinstance(step_kernel, triton.JITFunction)
DEVICES = ("cpu",) if INTERPRETED else ("cuda", "xpu")
# Triton's interpreter converts to bfloat16 by cutting off: there its bits are handled as integers, and rounded by the
# kernel.
STORAGE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.uint16 if INTERPRETED else tl.bfloat16,
    None: None,
}


class Rounding(NamedTuple):
    """How weights are stored, of :func:`reference.sgd_`'s arguments."""

    remainders: Tensors = ()
    seed: Tensor | int | None = None
    streams: Sequence[int] = ()
    first_elements: Sequence[int] = ()

    @property
    def name(self) -> str:
        return "stochastic" if self.seed is not None else "remainder" if self.remainders else "nearest"

    def numbers(self, weights: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of each weight: its stream, and the number of its first element."""
        nothing = (0,) * weights
        return tuple(self.streams) or nothing, tuple(self.first_elements) or nothing

    def seed_argument(self, device: torch.device) -> tuple[int | Tensor, int, int]:
        """As the kernel takes it: numbers of 21 bits, which don't change their type from seed to seed."""
        if isinstance(self.seed, Tensor) and self.seed.device == device:
            return self.seed, 0, 0
        seed, piece = int(self.seed or 0), 2**21 - 1
        return seed & piece, seed >> 21 & piece, seed >> 42


class Lists(NamedTuple):
    """The lists of one call; those of ``state``, by name, are empty or have a tensor for each weight."""

    weights: Tensors
    grads: Tensors
    state: dict[str, Tensors]
    scales: Tensors
    levels: tuple[float, ...]
    growths: Tensors
    codes: Tensors
    snapped: Tensors
    rounding: Rounding

    def beside_weights(self) -> dict[str, Tensors]:
        """The lists whose tensors have the shapes of the weights, by name."""
        outputs = {"codes": self.codes, "snapped": self.snapped, "remainders": self.rounding.remainders}
        return {"grads": self.grads, **self.state, **outputs}


class Latest(dict[Hashable, Made]):
    """The last things that were made, by what they were made from."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit

    def make(self, key: Hashable, maker: Callable[[], Made]) -> Made:
        if key not in self:
            if len(self) == self.limit:
                del self[next(iter(self))]
            self[key] = maker()
        return self[key]


class BlockMap(NamedTuple):
    """What a launch needs to know of its tensors, but where they lie; and the last tables that said that, too."""

    owner: Tensor  # (programs,) int32, on the device: the tensor that a program's block is in
    columns: Tensor  # (tensors, 6) int64: size, four of scales, first block
    program: Program
    per_tensor: bool  # no weight has more than one scale
    tables: Latest[Tensor]


class Known(NamedTuple):
    """A call that needed no copies: where its tensors lay, which ones they were, and what was made of them."""

    addresses: Addresses
    lengths: tuple[int, ...]
    tensors: list[weakref.ref[Tensor]]  # but for gradients, which come anew
    strides: list[tuple[int, ...]]  # of the weights
    levels: tuple[float, ...]
    layout: BlockMap
    table: Tensor

    def is_of(self, lists: Lists, addresses: Addresses) -> bool:
        """Whether these are the same tensors, where they were; gradients may be others that lie alike. What a tensor is
        can't change with its place unless somebody sets its data.
        """
        if self.addresses != addresses or self.lengths != lengths_of(lists) or self.levels != lists.levels:
            return False
        same = all(kept() is tensor for kept, tensor in zip(self.tensors, lasting(lists), strict=True))
        dtype = lists.weights[0].dtype
        return same and all(
            grad.stride() == strides and grad.dtype == dtype
            for grad, strides in zip(lists.grads, self.strides, strict=True)
        )


known: list[Known] = []  # the last ones, newest first
layouts: Latest[BlockMap | None] = Latest(64)
captured: list[tuple[object, ...]] = []  # what CUDA graphs go on reading, as long as the process lives


def capturing(device: torch.device) -> bool:
    """Whether launches are being captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def in_use(tensors: Tensors, device: torch.device) -> None:
    """The current stream reads these, which other streams may share: once they are dropped, torch's allocator gives
    their memory to nobody before that has been done.
    """
    if device.type != "cpu":
        stream = torch.get_device_module(device).current_stream(device)
        for tensor in tensors:
            tensor.record_stream(stream)


def refuse_capture(device: torch.device) -> None:
    """Copies to the device can't be captured."""
    if capturing(device):
        raise RuntimeError(
            "askew_cuda: step() in a CUDA graph capture with tensors that no step has seen where they lie now; make "
            "one step before it and keep the gradients (zero_grad(set_to_none=False)), or use backend='cuda'"
        )


class ScaleOrder(NamedTuple):
    """Scales in the order in which a weight in memory order meets them: element i has number
    (i // outer_run) % outer_count * scales + (i // run) % scales.
    """

    scale: Tensor
    run: int
    scales: int
    outer_run: int = 1
    outer_count: int = 1


def scale_order(weight: Tensor, scale: Tensor) -> ScaleOrder:
    """``csrc/torch/prepared.cpp``, set_scale()."""
    size = weight.numel()
    if scale.numel() <= 1 or size == 0:
        return ScaleOrder(scale.contiguous(), max(size, 1), 1)
    if scale.dim() != weight.dim():  # (rows, groups)
        if weight.is_contiguous():
            return ScaleOrder(scale.contiguous(), size // scale.numel(), scale.numel())
    else:
        sizes = zip(scale.shape, weight.shape, weight.stride(), strict=True)
        varying = [(stride * (n // count), count, d) for d, (count, n, stride) in enumerate(sizes) if count > 1]
        digits: list[tuple[int, int]] = []  # (run, count), innermost first; without a gap between them they are one
        for run, count, _ in sorted(varying):
            if digits and run == digits[-1][0] * digits[-1][1]:
                digits[-1] = (digits[-1][0], digits[-1][1] * count)
            else:
                digits.append((run, count))
        if len(digits) <= 2:
            outermost_first = [d for *_, d in sorted(varying, reverse=True)]
            rest = [d for d in range(scale.dim()) if d not in outermost_first]
            in_order = scale.permute(*outermost_first, *rest)
            in_order = scale if in_order.is_contiguous() else in_order.contiguous()
            return ScaleOrder(in_order, *(number for digit in digits for number in digit))
    each = torch.empty_like(weight, dtype=scale.dtype).copy_(reference.spread(scale, weight).expand(weight.shape))
    return ScaleOrder(each, 1, size)


def make_layout(lists: Lists) -> BlockMap:
    """For tensors in memory order. A block never crosses a tensor; an empty one has none."""
    refuse_capture(lists.weights[0].device)
    scales = zip(lists.weights, lists.scales, strict=True) if lists.scales else ()
    runs = [scale_order(weight, scale)[1:] for weight, scale in scales] or [(1, 1, 1, 1)] * len(lists.weights)
    sizes = torch.tensor([weight.numel() for weight in lists.weights], device="cpu")
    program = PROGRAMS["hip" if torch.version.hip and not INTERPRETED else lists.weights[0].device.type]
    blocks = (sizes + (program.block - 1)) // program.block
    owner = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32, device="cpu"), blocks)
    columns = torch.cat([sizes[:, None], torch.tensor(runs, device="cpu"), (blocks.cumsum(0) - blocks)[:, None]], 1)
    per_tensor = all(count == 1 for _, count, *_ in runs)
    return BlockMap(owner.to(lists.weights[0].device), columns, program, per_tensor, Latest(8))


def addresses_of(lists: Lists) -> Addresses:
    """The first columns of the table: addresses of weights, gradients, three states, codes, snapped weights,
    remainders, scales and growths; 0 without. Then the numbers that random bits depend on.
    """
    state = [*lists.state.values(), (), ()][:3]
    outputs = (lists.codes, lists.snapped, lists.rounding.remainders)
    every = (lists.weights, lists.grads, *state, *outputs, lists.scales, lists.growths)
    count = len(lists.weights)
    addresses = [tuple([t.data_ptr() for t in tensors]) or (0,) * count for tensors in every]
    return (*addresses, *lists.rounding.numbers(count))


def lengths_of(lists: Lists) -> tuple[int, ...]:
    """Of the lists; and whether weights must lie in logical order."""
    logical = lists.rounding.seed is not None
    return (*map(len, lists.beside_weights().values()), len(lists.scales), len(lists.growths), logical)


def lasting(lists: Lists) -> list[Tensor]:
    """All tensors but the gradients."""
    beside = lists.beside_weights()
    del beside["grads"]
    return [*lists.weights, *itertools.chain.from_iterable(beside.values()), *lists.scales, *lists.growths]


def make_table(addresses: Addresses, layout: BlockMap) -> Tensor:
    """(tensors, COLUMNS) int64, on the device. The host waits for the copy, this once, so that any stream may use
    it.
    """
    refuse_capture(layout.owner.device)
    columns = torch.tensor(addresses, device="cpu").t()
    aligned = (columns[:, :BESIDE] % 16 == 0).all(1, keepdim=True)
    return torch.cat([columns, layout.columns, aligned], 1).to(layout.owner.device)


def in_memory_order(lists: Lists) -> tuple[Lists, list[tuple[Tensor, Tensor]]]:
    """The lists with copies where tensors don't lie as their weights do, and what to write back: (original, copy)."""
    written = []

    def copied(tensor: Tensor, copy: Tensor, name: str) -> Tensor:
        copy.copy_(tensor)
        if name != "grads":
            written.append((tensor, copy))
        return copy

    def like(weight: Tensor, tensor: Tensor, name: str) -> Tensor:
        return (
            tensor
            if tensor.stride() == weight.stride()
            else copied(tensor, torch.empty_like(weight, dtype=tensor.dtype), name)
        )

    def dense(weight: Tensor) -> Tensor:
        logical = lists.rounding.seed is not None  # random bits count elements in logical order
        if weight.is_contiguous() if logical else torch.ops.aten.is_non_overlapping_and_dense(weight):
            return weight
        return copied(weight, torch.empty_like(weight, memory_format=torch.contiguous_format), "weights")

    weights = [dense(weight) for weight in lists.weights]
    beside = {
        name: [like(weight, tensor, name) for weight, tensor in zip(weights, tensors, strict=False)]
        for name, tensors in lists.beside_weights().items()
    }
    state: dict[str, Tensors] = {name: beside[name] for name in lists.state}
    scales, growths = (
        [scale_order(weight, each).scale for weight, each in zip(weights, tensors, strict=False)]
        for tensors in (lists.scales, lists.growths)
    )
    ordered = lists._replace(
        weights=weights, grads=beside["grads"], state=state, scales=scales, growths=growths, codes=beside["codes"],
        snapped=beside["snapped"], rounding=lists.rounding._replace(remainders=beside["remainders"]),
    )  # fmt: skip
    return ordered, written


def layout_of(lists: Lists) -> BlockMap | None:
    """The layout of these tensors, checked and made when it is seen first; None where they have to be brought into
    order.
    """
    beside = lists.beside_weights()
    tensors = [*lasting(lists), *lists.grads]
    lengths = (*beside, *lengths_of(lists))

    def make() -> BlockMap | None:
        if lists.weights[0].device.type not in DEVICES:
            raise ValueError(
                f"askew_cuda: weights[0] is on {lists.weights[0].device}; this Triton steps {' and '.join(DEVICES)} "
                "tensors"
            )
        ordered = in_memory_order(lists)[0]
        same = [*lasting(ordered), *ordered.grads]
        return make_layout(lists) if all(a is b for a, b in zip(tensors, same, strict=True)) else None

    return layouts.make(
        (lists.levels, lengths, tuple([(t.dtype, t.device, t.shape, t.stride()) for t in tensors])), make
    )


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
    pairs = [(1 / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count)) for count in counts]
    if len(set(counts)) == 1:
        return pairs[0]
    first, second = (
        torch.tensor(each, dtype=torch.float32, device="cpu").to(device, non_blocking=True)
        for each in zip(*pairs, strict=True)
    )
    return first, second


def device_bias_corrections(steps: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """The same where the steps lie. A device's powers may be an ulp of double away, so these one of float32."""
    count = steps.double() + 1
    return (1 / (1 - beta1**count)).float(), (1 / (1 - beta2**count).sqrt()).float()


def count_steps(steps: Tensors, infinite: float | Tensor) -> None:
    """One step more, but where AMP found an infinity: on a device that is known there alone."""
    if isinstance(infinite, float):
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


def brought_into_order(lists: Lists) -> tuple[Lists, BlockMap, Tensor, list[tuple[Tensor, Tensor]]]:
    """The lists as the kernel takes them, their layout and table, and what to write back: (original, copy)."""
    addresses = addresses_of(lists)
    for one in known:
        if one.is_of(lists, addresses):
            return lists, one.layout, one.table, []
    written: list[tuple[Tensor, Tensor]] = []
    layout = layout_of(lists)
    in_order = layout is not None
    if layout is None:
        given, (lists, written) = lists, in_memory_order(lists)
        layout = make_layout(lists._replace(scales=given.scales))
        addresses = addresses_of(lists)
    table = layout.tables.make(addresses, functools.partial(make_table, addresses, layout))
    if in_order:
        references = [weakref.ref(tensor) for tensor in lasting(lists)]
        strides = [weight.stride() for weight in lists.weights]
        known.insert(0, Known(addresses, lengths_of(lists), references, strides, lists.levels, layout, table))
        del known[8:]
    return lists, layout, table, written


def launch(
    lists: Lists, settings: Settings, rule: Rule, found_inf: float | Tensor, adamw: bool, decays: bool, nesterov: bool
) -> None:
    """One launch for all tensors, whose versions it increments. ``rule``: the rule's numbers, in the kernel's order."""
    device, dtype, quantized = lists.weights[0].device, lists.weights[0].dtype, bool(lists.levels)
    lists, layout, table, written = brought_into_order(lists)
    book, capacity = kernel_book(lists.levels, device)
    in_use([each for each in (table, layout.owner, *book) if isinstance(each, Tensor)], device)
    if capturing(device):
        captured.append((table, layout.owner, book))
    capture, rate = settings.anneal == "capture", settings.alpha if settings.recovery is None else settings.recovery
    assert rate is not None  # checked before
    exact = torch.float32 if lists.rounding.remainders else dtype  # as which a weight is as exact as it is stored
    snap = snap_radius(exact, lists.levels, settings, device) if capture and quantized else 0.0
    seed = lists.rounding.seed_argument(device)
    numbers = [
        argument(name, getattr(settings, name), default, device)
        for name, default in (("lr", 0.0), ("epsilon", 0.0), ("grad_scale", 1.0))
    ]
    pull = (float(rate), float(settings.max_step), snap)
    states = [tensors for tensors in lists.state.values() if tensors]
    constants = {
        "BLOCK": layout.program.block, "MAXIMIZE": bool(settings.maximize), "RATE_IS_ALPHA": settings.alpha is not None,
        "WEIGHT_TYPE": STORAGE[dtype], "STATE_TYPE": STORAGE[states[0][0].dtype if states else torch.float32],
        "SNAPPED_TYPE": STORAGE[lists.snapped[0].dtype if lists.snapped else None], "CODED": bool(lists.codes),
        "ROUNDING": lists.rounding.name, "ADAMW": adamw, "STATES": len(states), "DECAYS": decays, "NESTEROV": nesterov,
        "QUANTIZED": quantized, "GROWS": bool(lists.growths), "CAPACITY": capacity, "PER_TENSOR": layout.per_tensor,
        "CAPTURE": capture, "SKEW_GRADIENT": quantized and settings.skew_at == "gradient",
        "CLIP": quantized and bool(settings.clip),
    }  # fmt: skip
    if len(layout.owner):
        with on_device(device):
            step_kernel[(len(layout.owner),)](
                table, layout.owner, *numbers, found_inf, pull, book, rule, seed, num_warps=layout.program.warps,
                enable_fp_fusion=False, **constants,
            )  # fmt: skip
    for original, copy in written:
        original.copy_(copy)
    # Autograd must see that these changed: a backward pass over a graph from before the step is an error, as with
    # torch's optimizers.
    for changed in (lists.weights, lists.codes, lists.snapped, lists.rounding.remainders):
        torch.autograd.graph.increment_version([tensor for tensor in changed if not tensor.is_inference()])


def sum_up(lists: Lists, sums: Tensors, infinite: float | Tensor) -> None:
    """(E7) before the launch, by PyTorch's operations, which take memory and time that the kernel does not; scales
    learn while weights are free.
    """
    storage = Storage(lists.rounding.remainders, None, (), (), infinite)
    for i, each in enumerate(sums):
        weight = lists.weights[i]
        radial = reference.radial_sums(lists.grads[i].float(), storage.load(i, weight), lists.scales[i].shape)
        storage.write(each[:2], torch.stack(radial))


# The launch follows addresses, which a trace does not have.
outside_of_graphs: Callable[[Step], Step] = torch.compiler.disable(
    reason="the Triton backend is launched outside of torch.compile's graphs"
)


@outside_of_graphs
@torch.no_grad()
def sgd_(
    weights: Tensors, grads: Tensors, momentum_buffers: Tensors, scales: Tensors, levels: Sequence[float],
    codes: Tensors, snapped: Tensors, *, found_inf: Scalar = None, remainders: Tensors = (),
    seed: Tensor | int | None = None, streams: Sequence[int] = (), first_elements: Sequence[int] = (),
    growths: Tensors = (), sums: Tensors = (), **settings: Any,
) -> None:  # fmt: skip
    """:func:`askew_cuda.reference.sgd_` in one launch, for float32, bfloat16 and float16. Arguments are checked before
    (``checks.py``). lr, epsilon, grad_scale and found_inf on the weights' device are not read by the host.
    """
    if not weights:
        return
    s, infinite = Settings(**settings), argument("found_inf", found_inf, 0.0, weights[0].device)
    if isinstance(infinite, float) and infinite != 0:
        return
    buffers = momentum_buffers if s.momentum != 0 else []
    rounding = Rounding(remainders, seed, streams, first_elements)
    lists = Lists(
        weights, grads, {"momentum_buffers": buffers}, scales, tuple(levels), growths, codes, snapped, rounding
    )
    sum_up(lists, sums, infinite)
    rule = (float(s.momentum), 1.0 - s.dampening, float(s.weight_decay))
    launch(lists, s, rule, infinite, False, s.weight_decay != 0, bool(s.nesterov and s.momentum != 0))


@outside_of_graphs
@torch.no_grad()
def adamw_(
    weights: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, max_exp_avg_sqs: Tensors, steps: Tensors,
    scales: Tensors, levels: Sequence[float], codes: Tensors, snapped: Tensors, *, found_inf: Scalar = None,
    remainders: Tensors = (), seed: Tensor | int | None = None, streams: Sequence[int] = (),
    first_elements: Sequence[int] = (), growths: Tensors = (), sums: Tensors = (), **settings: Any,
) -> None:  # fmt: skip
    """:func:`askew_cuda.reference.adamw_` in one launch, as :func:`sgd_`. ``steps`` are all on the CPU, where a
    ``found_inf`` on a device is read by the host so that they can stand still, or all on the weights' device: then
    nothing is, and the bias corrections may differ from the reference's by a last bit.
    """
    if not weights:
        return
    device = weights[0].device
    s, infinite = Settings(**settings), argument("found_inf", found_inf, 0.0, device)
    if isinstance(infinite, Tensor) and steps[0].is_cpu:
        infinite = float(infinite)
    if isinstance(infinite, float) and infinite != 0:
        return
    state = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "max_exp_avg_sqs": max_exp_avg_sqs}
    rounding = Rounding(remainders, seed, streams, first_elements)
    lists = Lists(weights, grads, state, scales, tuple(levels), growths, codes, snapped, rounding)
    sum_up(lists, sums, infinite)
    corrections = bias_corrections(steps, s.beta1, s.beta2, device)
    moments = (float(s.beta1), 1.0 - s.beta1, float(s.beta2), 1.0 - s.beta2)
    rule = (*moments, float(s.eps), float(s.weight_decay), *corrections)
    launch(lists, s, rule, infinite, True, True, False)
    storage = Storage((), None, (), (), infinite)
    for i, each in enumerate(sums):
        square = (max_exp_avg_sqs if s.amsgrad else exp_avg_sqs)[i].float()
        storage.write(each[2], reference.second_moments(square, steps[i], s, scales[i].shape))
    count_steps(steps, infinite)
