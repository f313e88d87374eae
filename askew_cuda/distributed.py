"""The little that weights on several processes need beside torch.distributed, which does the rest.

A weight that is a DTensor (fully_shard, tensor parallelism) steps on what lies here of it: a step is elementwise. Its
scale belongs to the whole weight, and lies on every rank for the weights that are there: it is a DTensor, cut along
with the dimension that it follows, so that torch.distributed.checkpoint can cut both anew. What needs a whole weight -
a scale that is estimated, a report, a packed file - gathers one weight at a time; each is looked at by one rank, which
tells the others.
"""

import functools
import gc
import hashlib
import math
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from .checks import PLAIN
from .keywords import CONSTRAINT, EXECUTION, Group
from .quantizer import ChannelDim, Quantizer

if TYPE_CHECKING:
    from .optimizer import QuantizedOptimizer

Company = tuple[Any, ...]  # process groups, one for each dimension of a mesh: the ranks that have parts of a weight


def is_sharded(tensor: object) -> bool:
    """Whether this is a DTensor. There are none while nothing has loaded torch.distributed.tensor, which takes a
    while.
    """
    if type(tensor) in PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """What lies here of a tensor; anything else as it is."""
    if not is_sharded(tensor):
        return tensor
    here = tensor._local_tensor
    return here if type(here) in PLAIN else here.wait()  # on its way still


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, plain. Of a DTensor all ranks of its mesh must call this, and each gets it, on the mesh's
    device.
    """
    if not is_sharded(tensor):
        return tensor
    short = tensor.dtype == torch.int16  # which gloo does not send
    sharded: Any = tensor.detach().to(torch.int32) if short else tensor.detach()
    gathered: Tensor = sharded.to(sharded.device_mesh.device_type).full_tensor()
    return gathered.to(tensor.dtype)


# A step of what lies here


def gradient_of(weight: Tensor) -> Tensor | None:
    """The gradient that a step takes: ``weight.grad``; where that is None, ``weight.main_grad``, in which Megatron and
    others add up what backward passes find, in float32.
    """
    grad = weight.grad
    return getattr(weight, "main_grad", None) if grad is None else grad


def local_gradient(weight: Tensor) -> Tensor | None:
    """The gradient of what lies here of a weight. One that is placed otherwise, as where tensor parallelism has left
    parts to be added up, is first placed as the weight is.
    """
    grad: Any = gradient_of(weight)
    if grad is None or not is_sharded(weight):
        return grad
    placements = weight.placements  # type: ignore[attr-defined]
    return local(grad if grad.placements == placements else grad.redistribute(placements=placements))


def here(lists: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
    """The lists of a call, of what lies here. Weights are aliases, which have gradients of their own."""
    found = {name: [local(tensor) for tensor in tensors] for name, tensors in lists.items()}
    found["weights"] = [local(each).detach() if is_sharded(each) else each for each in lists["weights"]]
    return found


class Shards:
    """The weights of a plan that are DTensors, and the aliases that the plan steps in their place."""

    def __init__(self, weights: Sequence[Tensor], aliases: Sequence[Tensor]):
        self._pairs = [pair for pair in zip(weights, aliases, strict=True) if pair[0] is not pair[1]]

    def renew(self) -> bool:
        """Gives the aliases this step's gradients. False where a weight lies elsewhere by now, or its gradient is not
        of its kind.
        """
        for weight, alias in self._pairs:
            now, grad = local(weight), local_gradient(weight)
            kind = alias.shape, alias.dtype, alias.device
            if now.data_ptr() != alias.data_ptr() or (now.shape, now.dtype, now.device) != kind:
                return False
            if grad is not None and (grad.shape, grad.dtype, grad.device) != kind:
                return False
            alias.grad = grad
        return True

    def release(self) -> None:
        """Lets go of the gradients, so that zero_grad() frees them."""
        for _, alias in self._pairs:
            alias.grad = None


def first_element(weight: Tensor) -> int:
    """The number of the first element that lies here, counted in the whole weight in logical order."""
    if not is_sharded(weight):
        return 0
    sharded: Any = weight
    cut = _cut_dims(weight)
    if not cut:
        return 0
    return _first_row(weight.shape[cut[0]], cut[0], sharded.device_mesh, tuple(sharded.placements)) * math.prod(
        weight.shape[cut[0] + 1 :]
    )


@functools.lru_cache(maxsize=1024)
def _first_row(rows: int, dim: int, mesh: Any, placements: tuple[Any, ...]) -> int:
    """The first index along a dimension that lies here; 0 where none does."""
    index = torch.arange(rows, device="cpu").reshape((1,) * dim + (rows,))
    mine = local(_cut(index, mesh, _where_cut(placements, {dim}))).flatten()
    return int(mine[0]) if len(mine) else 0


# Placing


def _dim_of(placement: Any) -> int | None:
    """The dimension that a placement cuts; None where it cuts none."""
    dim: int | None = getattr(placement, "dim", None)
    return dim


def _cut_dims(weight: Tensor) -> list[int]:
    """The dimensions that are cut, ascending."""
    sharded: Any = weight
    return sorted({dim for each in sharded.placements if (dim := _dim_of(each)) is not None})


def _where_cut(placements: Iterable[Any], dims: Container[int]) -> tuple[Any, ...]:
    """The placements where they cut these dimensions, on every rank else."""
    from torch.distributed.tensor import Replicate

    return tuple(each if _dim_of(each) in dims else Replicate() for each in placements)


def _cut(value: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    """A DTensor of a value that every rank has. Nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.detach(), mesh, placements, src_data_rank=None)


def like(weight: Tensor, here: Tensor) -> Tensor:
    """What was made of a weight's elements, element by element, placed as the weight is."""
    if not is_sharded(weight):
        return here
    from torch.distributed.tensor import DTensor

    sharded: Any = weight
    made = DTensor.from_local(
        here,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=weight.shape,
        stride=torch.empty(weight.shape, device="meta").stride(),
    )
    return made.to(here.device)  # offloaded weights are elsewhere than their mesh


def place_beside(value: Tensor, weight: Tensor) -> Tensor:
    """A value that goes with a weight - its scale, or what has its shape - as it lies beside it: cut where the weight
    is, along the dimensions that the value follows. Of a weight that is no DTensor, the value itself, whole.

    Args:
        value: plain and whole, the same on all ranks; or a DTensor, of the same mesh or gathered on the way.
        weight: (...).
    """
    if not is_sharded(weight):
        return whole(value).to(weight.device)
    sharded: Any = weight
    mesh, here = sharded.device_mesh, local(weight).device
    if value.dim() == weight.dim():
        follows = {dim for dim in range(weight.dim()) if value.shape[dim] > 1 or weight.shape[dim] == 1}
    else:  # one number, or (rows, groups)
        follows = {0} if value.dim() == 2 else set()
    placements = _where_cut(sharded.placements, follows)
    if is_sharded(value) and (value.device_mesh, value.placements) == (mesh, placements):  # type: ignore[attr-defined]
        return value.to(here)
    return _cut(whole(value), mesh, placements).to(here)


def everywhere(value: Tensor, weight: Tensor) -> Tensor:
    """A value that goes with a weight, and that every rank has, whole on every rank."""
    if not is_sharded(weight):
        return value
    sharded: Any = weight
    return _cut(value, sharded.device_mesh, _where_cut(sharded.placements, ())).to(local(weight).device)


def check_placed(weight: Tensor, name: str, group: Group, quantizer: Quantizer | None) -> None:
    """Raises ValueError where a weight is cut in a way in which it can't be stepped as its group says; the same on all
    ranks.
    """
    if quantizer is not None and getattr(weight, "_fsdp_flattened", False):
        raise ValueError(
            f"{name} belongs to FullyShardedDataParallel, which flattens weights and cuts them anywhere, so that no "
            "scale is theirs; take torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    if not is_sharded(weight):
        return
    sharded: Any = weight
    if any(each.is_partial() for each in sharded.placements):
        raise ValueError(
            f"{name} is placed {sharded.placements}, parts that are still to be added up; redistribute() it before the "
            "optimizer takes it"
        )
    if quantizer is not None:
        _check_groups(weight, name, quantizer, group["channel_dim"])
    cut = _cut_dims(weight)
    run = len(cut) < 2 and math.prod(weight.shape[: min(cut, default=0)]) <= 1
    if group["low_precision"] == "stochastic" and weight.dtype.itemsize == 2 and not run:
        raise ValueError(
            f"low_precision = 'stochastic', but {name} of shape {tuple(weight.shape)} is placed {sharded.placements}: "
            "random bits are counted through the whole weight, of which a rank needs one run; cut its first dimension "
            "alone, or take 'remainder'"
        )


def _check_groups(weight: Tensor, name: str, quantizer: Quantizer, channel_dim: ChannelDim) -> None:
    """Whether all weights of a scale's group lie on one rank."""
    sharded: Any = weight
    shape = quantizer.scale_shape(weight, channel_dim)
    for dim in _cut_dims(weight) if quantizer.granularity == "group" and math.prod(shape) > 1 else ():
        scales, size = shape[dim] if len(shape) == weight.dim() else 0, weight.shape[dim]
        if scales in (1, size) or (dim == 0 and len(shape) != weight.dim()):
            continue
        pieces = [sharded.device_mesh.size(i) for i, each in enumerate(sharded.placements) if _dim_of(each) == dim]
        part = -(-size // pieces[0])
        if len(pieces) > 1 or not scales or (part < size and part % (size // scales)):
            raise ValueError(
                f"group_size = {quantizer.group_size}: dimension {dim} of {name}, of shape {tuple(weight.shape)}, is "
                f"cut into parts of {part // math.prod(pieces[1:])} ({sharded.placements}), and a group would lie on "
                "two ranks; cut another dimension, take a group_size that divides the parts, or granularity 'channel'"
            )


# Ranks that know the same


def company_of(weight: Tensor, replicas: Company = ()) -> Company:
    """The ranks that have parts of a weight; of a plain one those that have the same. () where that is this one
    alone.
    """
    if not is_sharded(weight):
        return replicas
    mesh = weight.device_mesh  # type: ignore[attr-defined]
    return tuple(mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1)


def exchange(value: Any, company: Company) -> list[Any]:
    """What each rank of the company says, in one order on all of them. Plain values and tensors on the CPU."""
    values = [value]
    for group in company:
        found: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(found, values, group=group)
        values = [each for part in found for each in part]
    return values


class Outcome(NamedTuple):
    """What a job has found on one rank, or why it has not."""

    value: Any
    error: Exception | None


def _try(job: Callable[..., Any], *arguments: Any) -> Outcome:
    try:
        value = job(*arguments)
        return Outcome(value.cpu() if isinstance(value, Tensor) else value, None)
    except Exception as error:
        return Outcome(None, error)


def each_whole(items: Sequence[Sequence[Tensor]], job: Callable[..., Any], replicas: Company = ()) -> list[Any]:
    """``job(i, *tensors)`` of the tensors of each item, whole: by one rank of the first tensor's company, which tells
    the others. So a rank works on its share of the weights, holds at most two of them whole at a time, and all know the
    same. Where a weight lies on this rank alone, simply the job.

    Args:
        items: a weight, and what goes with it. job: returns a tensor, which comes back on the CPU, or plain values.
        replicas: the ranks that have the same plain weights, and share the work on them.

    Raises: what a job raises, on all ranks of its company.
    """
    companies = [company_of(item[0], replicas) for item in items]
    results: list[Any] = [None] * len(items)
    for company in dict.fromkeys(companies):
        mine = [i for i, each in enumerate(companies) if each == company]
        if not company:
            for i in mine:
                results[i] = job(i, *map(whole, items[i]))
            continue
        ranks = exchange(torch.distributed.get_rank(), company)
        here = ranks.index(torch.distributed.get_rank())
        for first in range(0, len(mine), len(ranks)):
            turn = mine[first : first + len(ranks)]
            taken: list[Tensor] = []
            for k, i in enumerate(turn):
                gathered = [whole(tensor) for tensor in items[i]]
                taken = gathered if k == here else taken
                del gathered
            said = _try(job, turn[here], *taken) if here < len(turn) else Outcome(None, None)
            del taken
            for i, outcome in zip(turn, exchange(said, company), strict=False):
                if outcome.error is not None:
                    raise outcome.error
                results[i] = outcome.value
    return results


def by_first_rank(tensors: Iterable[Tensor], pieces: Iterator[Any], work: Callable[[Iterator[Any]], None]) -> None:
    """``work(pieces)``, where making a piece takes all ranks that have parts of the tensors: on the first of them,
    while the others make each piece and drop it. Where no tensor is sharded, simply the work.

    Raises: what the work raises, on all ranks, once they have all pieces behind them.
    """
    sharded: list[Any] = [tensor for tensor in tensors if is_sharded(tensor)]
    if not sharded:
        work(pieces)
        return
    company = company_of(max(sharded, key=lambda tensor: tensor.device_mesh.size()))
    first = exchange(torch.distributed.get_rank(), company)[0] == torch.distributed.get_rank()
    done = _try(work, pieces) if first else Outcome(None, None)
    for _ in pieces:
        pass
    for outcome in exchange(done, company):
        if outcome.error is not None:
            raise outcome.error


# Words beside a weight that ranks must agree on: all that a group says, but for how a machine computes.
_SAID = (*(key for key in CONSTRAINT if key not in EXECUTION), "lr", "weight_decay")


def agree(optimizer: "QuantizedOptimizer", stepping: bool) -> None:
    """Whether all ranks that step the same weights say the same of them, and have the same scales; asked before the
    first step, and after a checkpoint was loaded, when all ranks must come here. Learns which ranks they are: until the
    first step the weights may still be wrapped.

    Raises:
        ValueError: on all ranks, with the first rank and weight that differ, both values, and the remedy.
    """
    distributed = torch.distributed
    if optimizer._agreed or not (distributed.is_available() and distributed.is_initialized()):
        return
    if distributed.get_world_size() > 1 and zero_around(optimizer) is None:  # whose ranks have weights of their own
        optimizer._company = _replicas(optimizer)
        rows: dict[Company, list[tuple[str, dict[str, str]]]] = {}
        for group in optimizer.param_groups:
            words = {key: _said(group.get(key)) for key in _SAID}
            for name, weight in optimizer._named(group):
                check_placed(weight, name, group, optimizer._quantizer(group))
                about = {"shape": str(tuple(weight.shape)), **words, "scale": _said_scale(optimizer._scale(weight))}
                rows.setdefault(company_of(weight, optimizer._company), []).append((name, about))
        for company, mine in rows.items():
            digest = hashlib.sha256(repr(mine).encode()).digest()
            if len(set(exchange(digest, company))) > 1:  # what they say in full is for a message
                _compare(exchange((distributed.get_rank(), mine), company))
    optimizer._agreed = stepping


def _said(value: Any) -> str:
    """A value in short, another one for every other value."""
    if isinstance(value, Tensor):
        value = value.tolist()
    text = "callable" if callable(value) else repr(value)
    return text if len(text) <= 200 else f"{text[:100]} .. ({hashlib.sha256(text.encode()).hexdigest()[:12]})"


def _said_scale(scale: Tensor | None) -> str:
    if scale is None:
        return "not set"
    if is_sharded(scale) and _cut_dims(scale):
        return "set"
    raw = local(scale).detach().cpu().contiguous().reshape(-1)
    first = f"{raw[0].item():.6g}" if len(raw) else "empty"
    return f"set ({first}; {hashlib.sha256(bytes(raw.view(torch.uint8).tolist())).hexdigest()[:12]})"


_REMEDIES = {
    "scale": (
        "where weights became the same after their scale was set, as in DistributedDataParallel(..), call prepare() "
        "after that, or remove the scale, del optimizer.state[weight]['scale'], on every rank; a checkpoint is loaded "
        "by all ranks"
    ),
    "steps_done": "load the same checkpoint on every rank",
    "total_steps": "give every rank the same; where loaders differ in length, the least of them",
}


def _compare(said: list[tuple[int, list[tuple[str, dict[str, str]]]]]) -> None:
    """Raises ValueError unless all ranks say the same."""
    first, theirs = said[0]
    for rank, rows in said[1:]:
        names, others = ([name for name, _ in each] for each in (theirs, rows))
        if names != others:
            k = next((k for k, (a, b) in enumerate(zip(names, others, strict=False)) if a != b), None)
            k = min(len(names), len(others)) if k is None else k
            a, b = (repr(each[k]) if k < len(each) else "none" for each in (names, others))
            raise ValueError(
                f"rank {rank} has weight {b} where rank {first} has {a}, number {k} of its optimizer; give all ranks "
                "the same weights in the same order"
            )
        for (name, wanted), (_, about) in zip(theirs, rows, strict=True):
            key = next((key for key in wanted if wanted[key] != about[key]), None)
            if key is not None:
                raise ValueError(
                    f"{key} of {name} is {about[key]} on rank {rank}, but {wanted[key]} on rank {first}; "
                    + _REMEDIES.get(key, "give all ranks the same")
                )


def _holders(kind: type, holds: Callable[[Any], bool]) -> list[Any]:
    """The living objects of a kind that hold something. Neither a weight nor an optimizer knows who has wrapped it; the
    garbage collector does.
    """
    return [each for each in gc.get_objects() if issubclass(type(each), kind) and holds(each)]


def _replicas(optimizer: "QuantizedOptimizer") -> Company:
    """The ranks that DistributedDataParallel keeps the optimizer's weights the same on; () without it."""
    from torch.nn.parallel import DistributedDataParallel

    mine = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    found = _holders(
        DistributedDataParallel, lambda wrapper: any(id(weight) in mine for weight in wrapper.module.parameters())
    )
    return (found[0].process_group,) if found and found[0].process_group.size() > 1 else ()


def zero_around(optimizer: Any) -> Any:
    """The ZeroRedundancyOptimizer that has this optimizer step its share of the weights, or None."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return None
    found = _holders(module.ZeroRedundancyOptimizer, lambda zero: getattr(zero, "optim", None) is optimizer)
    return found[0] if found else None


def all_rows(rows: list[tuple[str, Tensor, Any]], optimizer: "QuantizedOptimizer") -> list[tuple[str, Any]]:
    """What there is to say of an optimizer's weights, from (name, weight, what) to (name, what). Under
    ZeroRedundancyOptimizer that of all ranks, whose weights are others, in the order in which it has them; it knows no
    names, and they are called params[0], params[1], ..
    """
    zero = zero_around(optimizer)
    if zero is None:
        return [(name, what) for name, _, what in rows]
    mine = [(zero._param_to_index[weight], what) for _, weight, what in rows]
    found = [row for part in exchange(mine, (zero.process_group,)) for row in part]
    return [(f"params[{i}]", what) for i, what in sorted(found, key=lambda row: row[0])]


def tell(optimizer: "QuantizedOptimizer") -> None:
    """After weights were written outside of a step: whoever has copies of them gets new ones. fully_shard keeps the
    gathered weights of its root after a forward pass; under ZeroRedundancyOptimizer the other ranks have all of them.
    """
    if any(is_sharded(weight) for group in optimizer.param_groups for weight in group["params"]):
        module = sys.modules.get("torch.distributed.fsdp")
        for each in _holders(module.FSDPModule, lambda _: True) if module is not None else ():
            each.reshard()
    zero = zero_around(optimizer)
    if zero is not None:
        zero._sync_params()


def _sharing_ranks(weight: Tensor, scale: Tensor) -> Company:
    """The ranks that have weights of the same scale: those along the dimensions of the mesh that cut the weight and not
    its scale.
    """
    if not is_sharded(weight):
        return ()
    sharded, beside = cast(Any, weight), cast(Any, scale)
    pairs = enumerate(zip(sharded.placements, beside.placements, strict=True))
    mesh = sharded.device_mesh
    return tuple(mesh.get_group(dim) for dim, (cut, kept) in pairs if cut != kept and mesh.size(dim) > 1)


def is_joint(weights: Sequence[Tensor], scales: Sequence[Tensor]) -> bool:
    """Whether a scale has weights on several ranks."""
    return any(
        [is_sharded(weight) and _sharing_ranks(weight, scale) for weight, scale in zip(weights, scales, strict=True)]
    )


def sum_over_ranks_(sums: Sequence[Tensor], weights: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
    """Sums over the weights of each scale that lie here become sums over all of them: over the ranks that share the
    scale, in the order of ranks, so that all of them get the same bits. One collective for all weights of a mesh.

    Args:
        sums: for each weight a float64 tensor that ends in a number per scale that lies here. Mutated.
        weights, scales: DTensors and theirs; sums of plain ones stay as they are.
    """
    shared: dict[Company, list[Tensor]] = {}
    for each, weight, scale in zip(sums, weights, scales, strict=True):
        if company := _sharing_ranks(weight, scale):
            shared.setdefault(company, []).append(each)
    for company, members in shared.items():
        total = torch.cat([each.reshape(-1) for each in members])
        for group in company:
            parts = [torch.empty_like(total) for _ in range(group.size())]
            torch.distributed.all_gather(parts, total, group=group)
            total = functools.reduce(torch.add, parts)
        for each, part in zip(members, total.split([each.numel() for each in members]), strict=True):
            each.copy_(part.reshape(each.shape))
