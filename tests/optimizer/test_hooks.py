"""Hooks: called when, with what, and what they may change."""

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import askew_cuda as askew

classes = pytest.mark.parametrize("ours", [askew.AskewSGD, askew.AskewAdamW])


def made(ours, **keywords):
    weight = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
    weight.grad = torch.ones_like(weight)
    return ours([("w", weight)], lr=0.25, quantizer="2bit", pretrained=True, **keywords), weight


@classes
def test_hooks_around_the_step_run_in_order(ours):
    optimizer, weight = made(ours)
    before, seen = weight.detach().clone(), []

    def hook(name: str, moved: bool):
        def called(which, args, kwargs) -> None:
            assert which is optimizer
            assert torch.equal(weight, before) != moved
            seen.append(name)

        return called

    handles = [
        optimizer.register_step_post_hook(hook("local post", True)),
        optimizer.register_step_pre_hook(hook("local pre", False)),
        register_optimizer_step_pre_hook(hook("global pre", False)),
        register_optimizer_step_post_hook(hook("global post", True)),
    ]
    try:
        optimizer.step()
        assert seen == ["global pre", "local pre", "local post", "global post"]
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert len(seen) == 4


@classes
def test_a_pre_hook_may_replace_the_closure(ours):
    optimizer, _ = made(ours)
    optimizer.register_step_pre_hook(lambda which, args, kwargs: ((which, lambda: 7.0), {}))
    assert optimizer.step(lambda: 3.0) == 7.0


@classes
def test_hooks_around_state_dict(ours):
    optimizer, _ = made(ours)
    optimizer.step()
    seen = []
    optimizer.register_state_dict_pre_hook(lambda which: seen.append(which))
    optimizer.register_state_dict_post_hook(lambda which, saved: {**saved, "note": "ours"})
    saved = optimizer.state_dict()
    assert seen == [optimizer]
    assert saved["note"] == "ours"
    assert "scale" in saved["state"][0]


@classes
def test_hooks_around_load_state_dict(ours):
    """A pre hook gets what is loaded, and may replace it; a post hook sees the optimizer as it then is, exempted scales
    included.
    """
    source, _ = made(ours)
    source.step()
    optimizer, weight = made(ours)
    saved, seen = source.state_dict(), []

    def add(which, given):
        seen.append("second")
        return {**given, "param_groups": [{**group, "lr": group["lr"] * 2} for group in given["param_groups"]]}

    def first(which, given):
        assert given["param_groups"][0]["lr"] == 0.25
        assert given is not saved
        seen.append("first")

    def after(which) -> None:
        seen.append("post")
        assert which.param_groups[0]["lr"] == 0.5
        assert which.state[weight]["scale"].dtype == torch.float32

    optimizer.register_load_state_dict_pre_hook(add)
    optimizer.register_load_state_dict_pre_hook(first, prepend=True)
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.register_load_state_dict_post_hook(lambda which: seen.append("before post"), prepend=True)
    optimizer.load_state_dict(saved)
    assert seen == ["first", "second", "before post", "post"]
    assert saved["param_groups"][0]["lr"] == 0.25


def test_a_pre_hook_may_rename_the_weights_of_a_checkpoint():
    source, _ = made(askew.AskewSGD, momentum=0.9)
    source.step()
    target = nn.Parameter(torch.zeros(2, 2))
    optimizer = askew.AskewSGD([("model.w", target)], lr=0.25, momentum=0.9, quantizer="2bit")

    def rename(which, given):
        renamed = [
            {**group, "param_names": [f"model.{name}" for name in group["param_names"]]}
            for group in given["param_groups"]
        ]
        return {**given, "param_groups": renamed}

    with pytest.raises(
        ValueError, match=r"model.w \(1 in all\) not in the checkpoint; w \(1 in all\) only there; .*pre_hook"
    ):
        optimizer.load_state_dict(source.state_dict())
    optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.load_state_dict(source.state_dict())
    assert torch.equal(optimizer.state[target]["momentum_buffer"], torch.ones(2, 2))
