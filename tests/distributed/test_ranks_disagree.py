"""What can't be stepped, and ranks that say different things: the same error on every rank, in no time."""

import re

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import askew_cuda as askew
from tests.distributed.processes import world
from tests.distributed.test_sharded import give_gradients, network, sharded

SOON = 300  # seconds, for what takes a few; a collective that one rank alone calls waits longer


def error_of(function, *arguments) -> str:
    try:
        function(*arguments)
    except (ValueError, TypeError) as error:
        return str(error)
    return "no error"


def cut(shape, placements, sizes=None, dtype=torch.float32) -> nn.Parameter:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),) if sizes is None else sizes)
    return nn.Parameter(distribute_tensor(torch.ones(shape, dtype=dtype), mesh, placements, src_data_rank=None))


def refusals() -> list[str]:
    partial = DTensor.from_local(torch.ones(2, 2), init_device_mesh("cpu", (4,)), [Partial()], run_check=False)
    strided = [_StridedShard(1, split_factor=2), Shard(1)]

    def made(weight, **keywords) -> str:
        return error_of(lambda: askew.AskewSGD([("w", weight)], lr=0.1, **keywords))

    def wrapped_late() -> str:
        layer = nn.Linear(4, 4)
        optimizer = askew.AskewSGD(layer.parameters(), lr=0.1, quantizer="ternary")
        FullyShardedDataParallel(layer, use_orig_params=True, device_id=torch.device("cpu"))
        return error_of(optimizer.step)

    def with_main_grad(weight) -> str:
        optimizer = askew.AskewSGD([("w", weight)], lr=0.1)
        weight.main_grad = torch.ones(weight.to_local().shape)
        return error_of(optimizer.step)

    half = cut((4, 8), [Shard(1)], dtype=torch.bfloat16)
    flattened = FullyShardedDataParallel(nn.Linear(4, 4), use_orig_params=True, device_id=torch.device("cpu"))
    return [
        made(cut((4, 12), [Shard(1)]), quantizer="2bit/group4"),
        made(cut((4, 20, 2), [Shard(1)]), quantizer="2bit/group2"),
        made(cut((4, 16), strided, (2, 2)), quantizer="2bit/group4"),
        made(nn.Parameter(partial), quantizer="ternary"),
        made(half, low_precision="stochastic"),
        made(next(flattened.parameters()), quantizer="ternary"),
        wrapped_late(),
        made(cut((4, 16), [Shard(1)]), quantizer="2bit/group4"),
        made(next(flattened.parameters())),
        with_main_grad(cut((4, 8), [Shard(1)], dtype=torch.bfloat16)),
    ]


def test_placements_that_are_refused():
    wanted = [
        r"group_size = 4: dimension 1 of w, of shape \(4, 12\), is cut into parts of 3 .*two ranks; cut another",
        r"group_size = 2: dimension 1 of w, of shape \(4, 20, 2\), .*two ranks",
        r"group_size = 4: dimension 1 of w, of shape \(4, 16\), is cut into parts of 4 .*two ranks",
        r"w is placed .*Partial.*still to be added up; redistribute",
        r"low_precision = 'stochastic', but w .*cut its first dimension alone, or take 'remainder'",
        r"w belongs to FullyShardedDataParallel.*fully_shard",
        r"param_groups\[0\]\['params'\]\[0\] belongs to FullyShardedDataParallel.*fully_shard",
        "^no error",
        "^no error",
        "w is a DTensor and has a main_grad; .* from grad",
    ]
    for errors in world(4)(refusals, seconds=SOON):
        for error, pattern in zip(errors, wanted, strict=True):
            assert re.search(pattern, error), error


def different(rank: int, what: str) -> dict:
    """Keywords of an optimizer that are other ones on rank 1."""
    own = {"total_steps": {"total_steps": 10 + rank}, "quantizer": {"quantizer": ("ternary", "2bit")[rank]}}
    return {"quantizer": "ternary", "lr": 0.1, "pretrained": True, **own.get(what, {})}


def disagreements() -> list[str]:
    """Each on fresh optimizers, at the first step or in prepare()."""
    rank, said = dist.get_rank(), []
    for what in ("total_steps", "quantizer", "scale", "order", "nothing"):
        model = sharded(network())
        weights = [(name, weight) for name, weight in model.named_parameters() if weight.dim() > 1]
        optimizer = askew.AskewSGD(
            weights[:: (-1 if rank else 1)] if what == "order" else weights, **different(rank, what)
        )
        if what == "scale" and rank:
            optimizer.prepare = None
            weight = weights[1][1]
            optimizer.state[weight]["scale"] = distribute_tensor(
                torch.tensor(0.5), weight.device_mesh, src_data_rank=None
            )
        give_gradients([weight for _, weight in weights], 0)
        before = [weight.to_local().clone() for _, weight in weights]
        said.append(error_of(optimizer.step))
        moved = [not torch.equal(a, weight.to_local()) for a, (_, weight) in zip(before, weights, strict=True)]
        assert any(moved) == (what == "nothing")
    return said


def test_ranks_that_disagree_say_so_together():
    wanted = [
        "total_steps of 0.weight is 11 on rank 1, but 10 on rank 0; give every rank the same",
        "quantizer of 0.weight is '2bit' on rank 1, but 'ternary' on rank 0; give all ranks the same",
        "scale of 2.weight is set (0.5; ",
        "rank 1 has weight '5.weight' where rank 0 has '0.weight', number 0 of its optimizer",
        "no error",
    ]
    for errors in world(2)(disagreements, seconds=SOON):
        for error, beginning in zip(errors, wanted, strict=True):
            assert error.startswith(beginning)


def bad_values() -> list[str]:
    """A NaN that lies on rank 1 alone; nothing but zeros."""
    said = []
    for value in (float("nan"), 0.0):
        model = sharded(network())
        weight = dict(model.named_parameters())["2.weight"]
        with torch.no_grad():
            if value == 0 or dist.get_rank() == 1:
                weight.to_local().fill_(value)
        optimizer = askew.AskewSGD([("2.weight", weight)], lr=0.1, quantizer="ternary/channel")
        for use in (optimizer.prepare, optimizer.step, optimizer.finalize):
            give_gradients([weight], 0)
            said.append(error_of(use))
        assert "scale" not in optimizer.state[weight]
    return said


def test_bad_values_are_an_error_on_every_rank():
    first, second = world(2)(bad_values, seconds=SOON)
    assert first == second
    assert all(error.startswith("2.weight holds 384 NaN") for error in first[:3])
    assert all(error.startswith("2.weight holds nothing but zeros") for error in first[3:])
