"""Weights that are DTensors step as one process steps them whole, bit for bit, however they are cut."""

import itertools
import math
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

import askew_cuda as askew
from askew_cuda.distributed import local, sum_over_ranks_, whole
from tests.compare import assert_close, assert_same_bits
from tests.distributed.processes import world


def network(dtype=torch.float32) -> nn.Sequential:
    """Rows that don't go into the number of ranks, fewer rows than ranks, a convolution, a gain of one dimension."""
    torch.manual_seed(1)
    layers = [
        nn.Conv2d(2, 6, 3, bias=False),
        nn.Flatten(),
        nn.Linear(24, 33, bias=False),
        nn.LayerNorm(33, bias=False),
        nn.ReLU(),
        nn.Linear(33, 3),
    ]
    return nn.Sequential(*layers).to(dtype)


def sharded(model: nn.Module, mesh=None, **keywords) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    for layer in model:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh, **keywords)
    return fully_shard(model, mesh=mesh, **keywords)


def draw(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.dtype)


def give_gradients(weights, step: int) -> None:
    """The same to a weight whole or in parts."""
    for i, weight in enumerate(weights):
        value = draw(weight, 100 * step + i)
        if isinstance(weight, DTensor):
            value = distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)
        weight.grad = value


def assert_same(tensor: Tensor, wanted: Tensor, what: str) -> None:
    """What lies here of a tensor, which may be a DTensor, is what should lie here of the one that is wanted."""
    assert tensor.shape == wanted.shape
    if isinstance(tensor, DTensor):
        wanted = distribute_tensor(wanted, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
        tensor = tensor.to_local()
    assert_same_bits(tensor.detach(), wanted.detach(), what)


def assert_same_training(first, second) -> None:
    """Weights, states and outputs of two optimizers, the first of which may be sharded."""
    for a, b in zip(*([w for g in each.param_groups for w in g["params"]] for each in (first, second)), strict=True):
        assert_same(a, b, "weight")
        for key, value in second.state[b].items():
            assert_same(first.state[a][key], value, key)
        for key, value in second.outputs.get(b, {}).items():
            assert_same(first.outputs[a][key], value, key)


# Given and estimated scales, every granularity, both rules, 16-bit weights in every way, outputs.
SETTINGS = {
    "per tensor": ("ternary", {"scale_lr": 0.0}),  # one that learns: below
    "per channel": ("4bit/channel", {"anneal": "interval", "outputs": ("codes", "snapped")}),
    "per group": ("2bit/group3", {"outputs": ("codes",), "pretrained": True}),
    "given": (askew.Quantizer("binary", scale=0.1), {}),
    "stochastic": ("ternary/channel", {"low_precision": "stochastic", "dtype": torch.bfloat16}),
    "remainder": ("nf4/channel", {"low_precision": "remainder", "dtype": torch.bfloat16}),
}
TOTAL = 5


def optimizer_of(model, name: str):
    spec, keywords = SETTINGS[name]
    keywords = {key: value for key, value in keywords.items() if key != "dtype"}
    groups = askew.param_groups(model, {"re:.*(0|2|5).weight": spec}, verbose=False, **keywords)
    if name in ("per channel", "remainder"):
        return askew.AskewAdamW(groups, lr=0.02, amsgrad=name == "per channel", total_steps=TOTAL)
    return askew.AskewSGD(groups, lr=0.05, momentum=0.9, dampening=0.1, total_steps=TOTAL)


def steps_as_one(name: str) -> None:
    dtype = SETTINGS[name][1].get("dtype", torch.float32)
    models = [sharded(network(dtype)), network(dtype)]
    pair = [optimizer_of(model, name) for model in models]
    for step in range(TOTAL):
        for model, optimizer in zip(models, pair, strict=True):
            give_gradients(model.parameters(), step)
            plan = optimizer._plan
            optimizer.step()
            if step > 3:  # when scales have learned
                assert optimizer._plan is plan is not None
    assert_same_training(*pair)
    assert pair[0].param_groups[0]["epsilon"] == 0.0


@pytest.mark.parametrize("name", SETTINGS)
def test_shards_step_as_the_whole_weight(name):
    world(2)(steps_as_one, name)


def learned() -> None:
    """Sums of float64 numbers in another order than that of one process: scales may differ by a last place or two."""
    models = [sharded(network()), network()]
    pair = []
    for model in models:
        groups = askew.param_groups(model, {"2.weight": "ternary", "5.weight": "ternary/channel"}, verbose=False)
        pair.append(askew.AskewSGD(groups, lr=0.05, momentum=0.9, scale_lr=0.5))
    starts = [None, None]
    for step in range(6):
        for i, (model, optimizer) in enumerate(zip(models, pair, strict=True)):
            give_gradients(model.parameters(), step)
            optimizer.step()
            if step == 0:
                starts[i] = whole(optimizer.state[dict(model.named_parameters())["2.weight"]]["scale"]).clone()
    assert_same_bits(starts[0], starts[1], "first scale")
    for name, bound in (("2.weight", 1e-5), ("5.weight", 0.0)):
        weights = [dict(model.named_parameters())[name] for model in models]
        for key in ("scale", "scale_velocity", "scale_growth"):
            states = [whole(optimizer.state[each][key]) for optimizer, each in zip(pair, weights, strict=True)]
            assert_close(states[0], states[1], bound, f"{key} of {name}")
            told = [torch.empty_like(states[0]) for _ in range(dist.get_world_size())]
            dist.all_gather(told, local(pair[0].state[weights[0]][key]) if name == "2.weight" else states[0])
            assert all(torch.equal(each, told[0]) for each in told)
        assert_close(whole(weights[0].detach()), weights[1].detach(), bound, name)
    assert not torch.equal(starts[0], whole(pair[0].state[dict(models[0].named_parameters())["2.weight"]]["scale"]))


def test_a_scale_that_learns_from_several_ranks():
    world(2)(learned)


@pytest.mark.parametrize("name", ["per channel", "stochastic"])
def test_ranks_that_have_nothing_of_a_weight(name):
    world(4)(steps_as_one, name)


def data(rank: int, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(8, 2, 4, 4, generator=generator).to(dtype), torch.randint(0, 3, (8,), generator=generator)


def lose(model: nn.Module, rank: int) -> Tensor:
    x, y = data(rank)
    return nn.functional.cross_entropy(model(x).clone(), y)


def trained_with_fsdp(clip: bool) -> None:
    """Forward, backward, accumulation and clipping by torch; a rank has its own data. One process has all of it."""
    models = [sharded(network()), network()]
    pair = [askew.AskewAdamW(askew.param_groups(m, {"*": "2bit/channel"}, verbose=False), lr=0.02) for m in models]
    ranks = range(dist.get_world_size())
    for _ in range(3):
        for turn in (0, 10):
            lose(models[0], turn + dist.get_rank()).backward()
            for rank in ranks:
                (lose(models[1], turn + rank) / len(ranks)).backward()
        if clip:
            for model in models:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(whole(a.detach()), b.detach(), 1e-5, "weight")
        scales = [each.state[weight].get("scale") for each, weight in zip(pair, (a, b), strict=True)]
        assert (scales[0] is None) == (scales[1] is None)
        if scales[1] is not None:
            assert_close(whole(scales[0]), scales[1], 1e-6, "scale")


@pytest.mark.parametrize("clip", [False, True], ids=["accumulated", "clipped"])
def test_a_training_with_fully_shard(clip):
    """Sums of gradients over ranks are in another order than those of one process."""
    world(2)(trained_with_fsdp, clip)


def other_policies() -> None:
    policies = {
        "mixed": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "kept": {"reshard_after_forward": False},
    }
    for policy in policies.values():
        model = sharded(network(), **policy)
        optimizer = askew.AskewSGD(askew.param_groups(model, {"*": "ternary/channel"}, verbose=False), lr=0.1)
        for _ in range(3):
            before = [weight.detach().clone() for weight in model.parameters()]
            lose(model, dist.get_rank()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            assert all(a.device == b.device for a, b in zip(before, model.parameters(), strict=True))
            assert not any(torch.equal(whole(a), whole(b)) for a, b in zip(before, model.parameters(), strict=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights on their way
            optimizer.finalize()
        for weight, codes, levels, scale in optimizer.quantized_parameters():
            assert_same_bits(whole(weight.detach()), whole(scale * levels[codes.long()]), "finalized")
            assert len(whole(codes).unique()) == 3


def test_policies_of_fully_shard():
    world(2)(other_policies)


def scaled(fused: bool | None) -> None:
    """An infinity on one rank alone: no rank steps, and the next step is made again."""
    model = sharded(network())
    groups = askew.param_groups(model, {"*": "ternary/channel"}, verbose=False)
    optimizer, scaler = askew.AskewAdamW(groups, lr=0.02, fused=fused), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    values = [[whole(weight.detach()).clone() for weight in model.parameters()]]
    for step in range(4):
        scaler.scale(lose(model, dist.get_rank())).backward()
        if step == 2 and dist.get_rank() == 1:
            next(model.parameters()).grad.to_local().fill_(math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        values.append([whole(weight.detach()).clone() for weight in model.parameters()])
    moved = [[not torch.equal(a, b) for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(values)]
    assert [all(each) for each in moved] == [True, True, False, True]
    assert not any(moved[2])
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("fused", [None, True])
def test_gradient_scaling(fused):
    world(2)(scaled, fused)


def compiled() -> None:
    models = [sharded(network()), network()]
    pair = [optimizer_of(model, "per tensor") for model in models]
    steps = [torch.compile(pair[0].step, backend="eager", fullgraph=True), pair[1].step]
    for optimizer in pair:
        optimizer.prepare()
    for step in range(2):
        for model, make in zip(models, steps, strict=True):
            give_gradients(model.parameters(), step)
            make()
    assert_same_training(*pair)


def test_a_compiled_step():
    world(2)(compiled)


def placed_otherwise() -> None:
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    ways = [
        (flat, [Shard(1)], "ternary"),
        (flat, [Shard(1)], "2bit/channel"),
        (flat, [Shard(1)], "2bit/group2"),
        (flat, [Replicate()], "2bit/group2"),
        (square, [Replicate(), Shard(0)], "ternary/channel"),  # HSDP
        (square, [Shard(0), Shard(1)], "4bit/group4"),
        (square, [_StridedShard(0, split_factor=2), Shard(0)], "2bit/channel"),  # FSDP of tensor parallel rows
        (square, [Shard(1), Shard(0)], "2bit/channel"),
    ]
    value = draw(torch.empty(12, 16), 5)
    pair = []
    for spread in (True, False):
        weights = [distribute_tensor(value, mesh, p, src_data_rank=None) if spread else value for mesh, p, _ in ways]
        weights = [nn.Parameter(each.clone()) for each in weights]
        groups = [{"params": [w], "quantizer": spec} for w, (*_, spec) in zip(weights, ways, strict=True)]
        pair.append(askew.AskewSGD(groups, lr=0.05, momentum=0.9, total_steps=4, pretrained=True))
    for step in range(4):
        for optimizer in pair:
            give_gradients([group["params"][0] for group in optimizer.param_groups], step)
            optimizer.step()
    assert_same_training(*pair)
    reports = [optimizer.finalize() for optimizer in pair]
    assert reports[0] == reports[1]


def test_other_placements():
    """Tensor parallel, replicated, in two dimensions."""
    world(4)(placed_otherwise)


def partial_gradients() -> None:
    """Tensor parallelism leaves parts of the gradient of a replicated weight, to be added up."""
    mesh = init_device_mesh("cpu", (2,))
    pair = []
    for spread in (True, False):
        weight = nn.Parameter(torch.ones(2, 2))
        if spread:
            weight = nn.Parameter(distribute_tensor(torch.ones(2, 2), mesh, [Replicate()], src_data_rank=None))
        pair.append(askew.AskewSGD([weight], lr=0.5, quantizer=askew.Quantizer("binary", scale=2.0)))
        for _ in range(3):
            grad = torch.ones(2, 2) / 4
            weight.grad = DTensor.from_local(grad, mesh, [Partial()], run_check=False) if spread else 2 * grad
            pair[-1].step()
    assert_same_training(*pair)


def test_gradients_that_are_still_to_be_added_up():
    world(2)(partial_gradients)


def memory() -> None:
    model = sharded(network())
    optimizer = optimizer_of(model, "per tensor")
    for step in range(3):
        give_gradients(model.parameters(), step)
        optimizer.step()
    aliases = [weight for part in optimizer._plan.parts for weight in part.call.lists["weights"]]
    assert aliases
    assert all(alias.grad is None for alias in aliases)
    for weight, alias in zip([w for p in optimizer._plan.parts for w in p.batch.weights], aliases, strict=True):
        assert weight.to_local().data_ptr() == alias.data_ptr()
    moved = next(iter(model.parameters()))
    before, plan = whole(moved.detach()).clone(), optimizer._plan
    moved._local_tensor = moved._local_tensor.clone()  # as to_empty() and offloading do
    give_gradients([moved], 7)
    optimizer.step()
    assert optimizer._plan is not plan
    assert not torch.equal(whole(moved.detach()), before)


def test_gradients_are_let_go_and_weights_followed():
    world(2)(memory)


def collectives(use) -> tuple[int, int]:
    """How often a whole weight or scale was gathered, and what else there was to tell."""
    with CommDebugMode() as counted:
        use()
    gathered, told = (
        sum(count for what, count in counted.get_comm_counts().items() if ("functional" in str(what)) == functional)
        for functional in (True, False)
    )
    return gathered, told


def counts(folder: str) -> None:
    """docs/distributed.md has these."""
    model = sharded(network())
    optimizer = askew.AskewSGD(askew.param_groups(model, {"*": "ternary/channel"}, verbose=False), lr=0.1, momentum=0.9)
    tensors, all_tensors, ranks = 3, len(list(model.parameters())), dist.get_world_size()
    turns = -(-tensors // ranks)
    assert collectives(optimizer.prepare) == (tensors, 2 + 2 * turns + 2)
    for step in range(3):
        give_gradients(model.parameters(), step)
        assert collectives(optimizer.step) == (0, 0 if step else 2)
    watch = askew.monitor(optimizer, every=100)
    assert collectives(watch.sample) == (3 * tensors, 2 * turns + 2)
    optimizer.zero_grad()
    assert collectives(watch.sample) == (2 * tensors, 2 * turns + 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert collectives(optimizer.finalize) == (2 * tensors, 2 * turns + 2)
    saved = collectives(lambda: askew.save_packed(model, optimizer, os.path.join(folder, "m.safetensors")))
    assert saved == (all_tensors + tensors, 4)


def test_what_is_sent_is_what_the_documentation_says(tmp_path):
    world(2)(counts, str(tmp_path))


def sums() -> None:
    """Float64 numbers whose sum depends on the order."""
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2, 2))
    parts = [torch.tensor([1.0 + k, 2.0**60 * (-1) ** k], dtype=torch.float64) for k in range(4)]
    weight = torch.ones(4, 4)
    cut = [
        distribute_tensor(weight, mesh, p, src_data_rank=None) for p in ([Shard(0), Shard(1)], [Shard(0), Replicate()])
    ]
    everywhere = [Replicate(), Replicate()]
    scales = [distribute_tensor(torch.ones(2), mesh, everywhere, src_data_rank=None) for _ in cut]
    both, rows, plain = (parts[rank].clone() for _ in range(3))
    sum_over_ranks_([both, rows, plain], [*cut, weight], [*scales, torch.ones(2)])
    columns = [parts[0] + parts[2], parts[1] + parts[3]]
    assert torch.equal(both, columns[0] + columns[1])
    assert torch.equal(rows, columns[rank % 2])
    assert torch.equal(plain, parts[rank])


def test_sums_over_ranks_are_in_one_order():
    world(4)(sums)
