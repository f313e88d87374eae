"""Reports, snapped weights and packed files of sharded weights are those of one process that holds the same."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

import askew_cuda as askew
from askew_cuda.distributed import whole
from tests.compare import assert_same_bits
from tests.distributed.processes import world
from tests.distributed.test_ranks_disagree import SOON
from tests.distributed.test_sharded import assert_same_training, data, give_gradients, network, sharded

RULES = {"0.weight": "2bit/channel", "2.weight": "ternary/group3", "5.weight": "4bit", "*": None}


def both(**keywords) -> list[tuple[nn.Module, askew.AskewSGD]]:
    """The same network, sharded and whole, half-way through its annealing."""
    pair = []
    for model in (sharded(network()), network()):
        groups = askew.param_groups(model, RULES, verbose=False, pretrained=True)
        optimizer = askew.AskewSGD(groups, lr=0.05, momentum=0.9, total_steps=8, hold=0.0, end=1.0, **keywords)
        pair.append((model, optimizer))
    return pair


def advance(pair, steps: range) -> None:
    for step in steps:
        for model, optimizer in pair:
            give_gradients(model.parameters(), step)
            optimizer.step()


def reports() -> None:
    pair = both()
    watches = [askew.monitor(optimizer, every=2) for _, optimizer in pair]
    advance(pair, range(4))
    for model, _ in pair:
        dict(model.named_parameters())["2.weight"].grad.mul_(float("nan"))
    for watch in watches:
        watch.sample()
    assert len(watches[0].history) == 3
    assert watches[0].history == watches[1].history
    for (a, codes, levels, scale), (b, *wanted) in zip(*(o.quantized_parameters() for _, o in pair), strict=True):
        assert_same_bits(whole(a.detach()), b.detach(), "weight")
        for name, got, want in zip(("codes", "levels", "scale"), (codes, levels, scale), wanted, strict=True):
            assert_same_bits(whole(got), want, name)
    found = [optimizer.finalize() for _, optimizer in pair]
    assert 0 < found[0].share_on_level < 1
    assert found[0] == found[1]
    assert_same_training(*(optimizer for _, optimizer in pair))


@pytest.mark.filterwarnings("ignore:finalize")
def test_reports_are_those_of_one_process():
    world(2)(reports)


def snapped_for_a_while() -> None:
    """The root of a model keeps what it gathered in a forward pass; snapped or not, it must be what lies in the
    weights."""
    pair = both()
    x, _ = data(0)
    advance(pair, range(3))
    outputs = []
    with torch.no_grad():
        for model, optimizer in pair:
            free = model(x).clone()
            with optimizer.quantized(), optimizer.quantized():
                snapped = model(x).clone()
            outputs.append((free, snapped, model(x).clone()))
    for got, want in zip(*outputs, strict=True):
        assert_same_bits(got, want, "output")
    assert not torch.equal(outputs[0][0], outputs[0][1])
    assert_same_training(*(optimizer for _, optimizer in pair))


def test_quantized_reaches_the_forward_pass():
    world(2)(snapped_for_a_while)


def files(folder: str) -> None:
    pair = both()
    advance(pair, range(3))
    names = [os.path.join(folder, f"{name}.safetensors") for name in ("sharded", "whole")]
    with torch.no_grad():
        pair[0][0](data(0)[0])  # the model's own parameters are the gathered ones now
    askew.save_packed(*pair[0], names[0])
    if dist.get_rank() == 0:
        askew.save_packed(*pair[1], names[1])
        with open(names[0], "rb") as one, open(names[1], "rb") as two:
            assert one.read() == two.read()
    dist.barrier()
    for cut in (True, False):
        fresh = sharded(network()) if cut else network()
        groups = askew.load_packed(names[0], fresh)
        optimizer = askew.AskewSGD(groups, lr=0.1)
        optimizer.prepare()
        for weight, other in zip(fresh.parameters(), pair[1][0].parameters(), strict=True):
            state, expected = pair[1][1].state[other], other.detach()
            if "scale" in state:
                assert_same_bits(whole(optimizer.state[weight]["scale"]), state["scale"], "scale")
                with pair[1][1].quantized():
                    expected = other.detach().clone()
            assert_same_bits(whole(weight.detach()), expected, "weight")
    with pytest.raises(ValueError, match=r"2.weight: the weight is sharded, and no rank has all of its codes"):
        askew.pack_modules(*unpackable())


def unpackable() -> tuple[nn.Module, askew.AskewSGD]:
    model = sharded(network())
    weight = dict(model.named_parameters())["2.weight"]
    return model, askew.AskewSGD([("2.weight", weight)], lr=0.1, quantizer="ternary")


def test_the_packed_file_is_that_of_one_process(tmp_path):
    world(2)(files, str(tmp_path))


def failures(folder: str) -> list[str]:
    """What rank 0 alone meets, all ranks hear of."""
    (model, optimizer), _ = both()
    give_gradients(model.parameters(), 0)
    optimizer.step()
    said = []
    for path in (os.path.join(folder, "nowhere", "model.safetensors"), os.path.join(folder, "model.safetensors")):
        try:
            askew.save_packed(model, optimizer, path)
        except (OSError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
        with torch.no_grad():
            dict(model.named_parameters())["5.weight"].to_local()[:1].fill_(float("nan"))
    try:
        optimizer.finalize()
    except ValueError as error:
        said.append(str(error))
    return [*said, *os.listdir(folder)]


def test_a_file_that_can_not_be_written_is_an_error_on_every_rank(tmp_path):
    first, second = world(2)(failures, str(tmp_path), seconds=SOON)
    assert first == second
    assert first[0].startswith("FileNotFoundError")
    assert first[1].startswith("ValueError: 5.weight holds 66 NaN weights")
    assert first[2].startswith("finalize: 5.weight holds 66 NaN")
    assert len(first) == 3
