"""Where the tensors of a call lie: the table on the device that says so, and the map which tensor each program's block
is in. Both are kept: the map is made anew only for other layouts, the table where tensors lie elsewhere.
"""

import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from .. import reference
from .kernel import step_kernel

Tensors = Sequence[Tensor]
Addresses = tuple[tuple[int, ...], ...]
Made = TypeVar("Made")
GRADS = 1  # column of the table that holds addresses of gradients
BESIDE = 8  # columns of the table that hold addresses of weights and what lies beside them
INTERPRETED = not isinstance(step_kernel, triton.JITFunction)
DEVICES = ("cpu",) if INTERPRETED else ("cuda", "xpu")


class Program(NamedTuple):
    """Its weights, and the warps that share them."""

    block: int
    warps: int


# 4 weights per thread: 16 bytes of float32. A warp has 32 threads; on AMD's data-center GPUs 64, on Intel's 16.
PROGRAMS = {"cuda": Program(512, 4), "hip": Program(1024, 4), "xpu": Program(512, 8), "cpu": Program(512, 4)}


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


layouts: Latest[BlockMap | None] = Latest(64)


def capturing(device: torch.device) -> bool:
    """Whether launches are being captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


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


def places(tensors: Tensors) -> tuple[int, ...]:
    """Their addresses."""
    return tuple(map(Tensor.data_ptr, tensors))


def addresses_of(lists: Lists) -> Addresses:
    """The first columns of the table: addresses of weights, gradients, three states, codes, snapped weights,
    remainders, scales and growths; 0 without. Then the numbers that random bits depend on.
    """
    state = [*lists.state.values(), (), ()][:3]
    outputs = (lists.codes, lists.snapped, lists.rounding.remainders)
    every = (lists.weights, lists.grads, *state, *outputs, lists.scales, lists.growths)
    count = len(lists.weights)
    addresses = [places(tensors) or (0,) * count for tensors in every]
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


def make_table(columns: Tensor, layout: BlockMap) -> Tensor:
    """(tensors, COLUMNS) int64, on the device, from the addresses. The host waits for the copy, this once, so that any
    stream may use it.
    """
    refuse_capture(layout.owner.device)
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


class Located:
    """The tensors of a call in memory order, and the table that says where they lie."""

    def __init__(self, lists: Lists):
        layout = layout_of(lists)
        self.in_order, self.written = layout is not None, list[tuple[Tensor, Tensor]]()  # original, copy
        if layout is None:
            given, (lists, self.written) = lists, in_memory_order(lists)
            layout = make_layout(lists._replace(scales=given.scales))
        self.lists, self.layout, self.addresses = lists, layout, addresses_of(lists)
        self.grad_dtype = lists.grads[0].dtype
        if self.in_order:
            self.lists = lists._replace(grads=())  # the caller has them, as long as they are needed
        self.columns = torch.tensor(self.addresses, device="cpu").t().contiguous()
        self.table = self._table()
        # Autograd must see that these changed: a backward pass over a graph from before the step is an error, as with
        # torch's optimizers.
        changed = itertools.chain(lists.weights, lists.codes, lists.snapped, lists.rounding.remainders)
        self.changed = [tensor for tensor in changed if not tensor.is_inference()]

    def _table(self) -> Tensor:
        return self.layout.tables.make(self.addresses, functools.partial(make_table, self.columns, self.layout))

    def follow(self, grads: Tensors) -> None:
        """To other gradients that lie like those before."""
        now = places(grads)
        if now != self.addresses[GRADS]:
            self.addresses = (*self.addresses[:GRADS], now, *self.addresses[GRADS + 1 :])
            self.columns[:, GRADS] = torch.tensor(now, device="cpu")
            self.table = self._table()
