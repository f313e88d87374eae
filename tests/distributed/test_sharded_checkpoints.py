"""Checkpoints of sharded optimizers: torch.distributed.checkpoint cuts them anew for another number of ranks, and the
training goes on as if nothing had been."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

import askew_cuda as askew
from askew_cuda.distributed import whole
from tests.compare import assert_same_bits
from tests.distributed.processes import world
from tests.distributed.test_sharded import give_gradients, network, sharded

RULES = {"0.weight": "2bit/channel", "2.weight": "ternary/group3", "5.weight": "4bit", "*": None}
TOTAL = 8


def training(adamw: bool, cut: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = sharded(network()) if cut else network()
    groups = askew.param_groups(model, RULES, verbose=False)
    keywords = {"total_steps": TOTAL, "hold": 0.25, "end": 1.0}
    if adamw:
        return model, askew.AskewAdamW(groups, lr=0.02, **keywords)
    return model, askew.AskewSGD(groups, lr=0.05, momentum=0.9, **keywords)


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(model.parameters(), step)
        optimizer.step()


def saved(folder: str, adamw: bool, asynchronous: bool) -> None:
    model, optimizer = training(adamw, cut=True)
    advance(model, optimizer, range(4))
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    if asynchronous:
        dcp.async_save(state, checkpoint_id=folder).result()
    else:
        dcp.save(state, checkpoint_id=folder)


def loaded(folder: str, adamw: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = training(adamw, cut=dist.is_initialized())
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder)  # strict: what a fresh optimizer has, one whose scales have learned has
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return model, optimizer


def gone_on(folder: str, adamw: bool) -> dict[str, torch.Tensor]:
    """What the last weights are, whole."""
    model, optimizer = loaded(folder, adamw)
    assert {group["steps_done"] for group in optimizer.param_groups} == {4}
    advance(model, optimizer, range(4, TOTAL))
    return {name: whole(weight.detach()) for name, weight in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*(deprecated|TypedStorage)")
@pytest.mark.parametrize("adamw", [False, True], ids=["sgd", "adamw"])
def test_a_run_of_two_ranks_goes_on_on_one_and_on_three(adamw, tmp_path):
    world(2)(saved, str(tmp_path), adamw, adamw)
    model, optimizer = training(adamw, cut=False)
    advance(model, optimizer, range(TOTAL))
    for found in (gone_on(str(tmp_path), adamw), *world(3)(gone_on, str(tmp_path), adamw)):
        for name, weight in model.named_parameters():
            assert_same_bits(found[name], weight.detach(), name)


def full_states() -> None:
    """One state_dict that has all, and back; that of one process into shards; its own, as torch.save would have it."""
    model, optimizer = training(True, cut=True)
    advance(model, optimizer, range(4))
    plain, other = training(True, cut=False)
    advance(plain, other, range(4))
    options = StateDictOptions(full_state_dict=True, cpu_offload=False)
    full = get_optimizer_state_dict(model, optimizer, options=options)
    want = get_optimizer_state_dict(plain, other)["state"]
    assert set(full["state"]) == set(want)
    for name, kept in want.items():
        assert set(kept) == set(full["state"][name])
        for key, value in kept.items():
            assert not isinstance(full["state"][name][key], DTensor)
            assert_same_bits(full["state"][name][key], value, f"{key} of {name}")
    again = [training(True, cut=True) for _ in range(3)]
    set_optimizer_state_dict(again[0][0], again[0][1], full, options=options)
    again[1][1].load_state_dict(other.state_dict())
    again[2][1].load_state_dict(optimizer.state_dict())
    for pair in again:
        pair[0].load_state_dict(model.state_dict())
        advance(*pair, range(4, TOTAL))
    advance(plain, other, range(4, TOTAL))
    for weights in zip(plain.parameters(), *(pair[0].parameters() for pair in again), strict=True):
        for weight in weights[1:]:
            assert_same_bits(whole(weight.detach()), weights[0].detach(), "weight")
    bare, last = training(True, cut=False)
    last.load_state_dict(optimizer.state_dict())  # of shards into a whole
    bare.load_state_dict(plain.state_dict())
    for weight, before in zip(bare.parameters(), model.parameters(), strict=True):
        for key, value in optimizer.state[before].items():
            assert_same_bits(last.state[weight][key], whole(value), key)


def test_full_state_dicts_go_both_ways():
    world(2)(full_states)
