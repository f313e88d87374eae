"""DistributedDataParallel and ZeroRedundancyOptimizer: all ranks have all weights, and the same ones."""

import os
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import askew_cuda as askew
from tests.compare import assert_same_bits
from tests.distributed.processes import world
from tests.distributed.test_ranks_disagree import SOON, error_of

TOTAL = 6


BY_VALUES = {"re:.*weight": askew.Quantizer("ternary", "absmean", "channel")}  # a scale that tells weights apart


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


def optimizer_of(model: nn.Module, **keywords) -> askew.AskewSGD:
    groups = askew.param_groups(model, BY_VALUES, verbose=False)
    return askew.AskewSGD(groups, **{"lr": 0.1, "momentum": 0.9, "total_steps": TOTAL, **keywords})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, ranks, steps: int = TOTAL) -> None:
    """On the data of these ranks; gradients are their mean."""
    for step in range(steps):
        for rank in ranks:
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + rank))
            (model(x).square().mean() / len(ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module) -> list[Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def replicated(folder: str) -> None:
    rank = dist.get_rank()
    model = DistributedDataParallel(network(rank))
    optimizer = optimizer_of(model)
    optimizer.prepare()
    train(model, optimizer, [rank])
    alone = network(0)
    single = optimizer_of(alone)
    train(alone, single, [0, 1])
    for a, b in zip(values(model), values(alone), strict=True):
        assert_same_bits(a, b, "weight")
    single.load_state_dict(optimizer.state_dict())  # without the prefix
    if rank == 0:  # one rank by itself asks no other
        optimizer.finalize()
        askew.save_packed(model.module, optimizer, os.path.join(folder, "model.safetensors"))


def test_replicas_train_as_one_process(tmp_path):
    world(2)(replicated, str(tmp_path), seconds=SOON)


def prepared_too_early() -> list[str]:
    rank, said = dist.get_rank(), []
    bare = network(rank)
    optimizer = optimizer_of(bare, scale_lr=0.0)
    optimizer.prepare()
    model = DistributedDataParallel(bare)
    for _ in range(2):
        said.append(error_of(train, model, optimizer, [rank], 1))
        model.zero_grad()
    for state in optimizer.state.values():
        state.pop("scale", None)
    said.append(error_of(train, model, optimizer, [rank]))
    assert said[2] == "no error", said[2]
    scales = [state["scale"] for state in optimizer.state.values() if "scale" in state]
    for scale, wanted in zip(scales, expected(), strict=True):
        assert_same_bits(scale, wanted, "scale")
    another = DistributedDataParallel(network(0))
    return [*said, error_of(optimizer_of(another, total_steps=TOTAL + rank).prepare)]


def expected() -> list[Tensor]:
    single = optimizer_of(network(0))
    single.prepare()
    return [state["scale"] for state in single.state.values()]


def test_scales_that_were_set_before_the_wrap_are_an_error():
    first, second = world(2)(prepared_too_early, seconds=SOON)
    assert first == second
    for error in first[:2]:
        assert error.startswith("scale of 0.weight is set (")
        assert "on rank 1, but set (" in error
        assert "call prepare() after that, or remove the scale" in error
    assert first[2] == "no error"
    assert first[3].startswith(f"total_steps of module.0.weight is {TOTAL + 1} on rank 1, but {TOTAL} on rank 0")


def one_alone() -> None:
    """Processes of a group that do different things: nobody waits for anybody."""
    if dist.get_rank() == 0:
        model = network(0)
        optimizer = optimizer_of(model)
        train(model, optimizer, [0])
        with optimizer.quantized():
            pass
        optimizer.finalize()


def test_a_rank_that_trains_alone_waits_for_no_other():
    world(2)(one_alone, seconds=SOON)


def zeroed() -> tuple[nn.Module, torch.optim.Optimizer]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of torch.jit
        from torch.distributed.optim import ZeroRedundancyOptimizer
    model = network(0)
    groups = askew.param_groups(model, BY_VALUES, names=False, verbose=False)
    zero = ZeroRedundancyOptimizer(groups, askew.AskewSGD, lr=0.1, momentum=0.9, total_steps=TOTAL)
    return model, zero


def redundancy(folder: str) -> None:
    rank, ranks = dist.get_rank(), range(dist.get_world_size())
    model, zero = zeroed()
    ours = zero.optim
    assert 0 < sum(len(group["params"]) for group in ours.param_groups) < 6
    alone = network(0)
    single = optimizer_of(alone)
    watch, other = askew.monitor(ours, every=3), askew.monitor(single, every=3)
    train(model, zero, ranks, TOTAL - 2)
    train(alone, single, ranks, TOTAL - 2)
    for a, b in zip(values(model), values(alone), strict=True):
        assert_same_bits(a, b, "weight")
    for (_, got), (_, want) in zip(watch.history, other.history, strict=True):
        assert list(got.values()) == list(want.values())
    assert list(watch.history[-1][1]) == ["params[0]", "params[1]", "params[2]", "all"]
    with ours.quantized(), single.quantized():
        inside = values(model)
        for a, b in zip(inside, values(alone), strict=True):
            assert_same_bits(a, b, "snapped")
    for a, b in zip(values(model), values(alone), strict=True):
        assert_same_bits(a, b, "restored")
    reports = [ours.finalize(), single.finalize()]
    for a, b in zip(values(model), values(alone), strict=True):
        assert_same_bits(a, b, "finalized")
    assert reports[0].share_on_level == reports[1].share_on_level < 1
    assert reports[0].max_distance == reports[1].max_distance
    assert [each.numel for each in reports[0].tensors] == [each.numel for each in reports[1].tensors]
    assert error_of(askew.save_packed, model, zero, "nowhere").startswith("save_packed: in a ZeroRedundancyOptimizer")
    zero.consolidate_state_dict()
    if rank == 0:
        groups = askew.param_groups(model, BY_VALUES, names=False, verbose=False)
        plain = askew.AskewSGD(groups, lr=0.1, momentum=0.9, total_steps=TOTAL)
        plain.load_state_dict(zero.state_dict())
        names = [os.path.join(folder, f"{name}.safetensors") for name in ("zero", "single")]
        askew.save_packed(model, plain, names[0])
        askew.save_packed(alone, single, names[1])
        with open(names[0], "rb") as one, open(names[1], "rb") as two:
            assert one.read() == two.read()


def test_zero_redundancy_optimizer(tmp_path):
    """On four ranks one of them has none of the three quantized weights."""
    world(4)(redundancy, str(tmp_path), seconds=SOON)
