"""What a CUDA graph may capture: a step whose replays do what a step does then. The capture is made up; no GPU."""

import pytest
import torch

import askew_cuda as askew
from askew_cuda import plan

RULES = {
    "sgd": (askew.AskewSGD, {}),
    "momentum": (askew.AskewSGD, {"momentum": 0.9}),
    "dampening": (askew.AskewSGD, {"momentum": 0.9, "dampening": 0.5}),
    "adamw": (askew.AskewAdamW, {}),
    "amsgrad": (askew.AskewAdamW, {"amsgrad": True}),
}
rules = pytest.mark.parametrize("rule", RULES)


def made(rule: str, dtype: torch.dtype = torch.float32, **more: object):
    ours, keywords = RULES[rule]
    weight = torch.nn.Parameter(torch.linspace(-0.1, 0.1, 12, dtype=dtype).reshape(4, 3))
    weight.grad = torch.full_like(weight, 0.01)
    return ours([weight], lr=0.1, **keywords, **more)


def quantized(rule: str, **more: object):
    return made(rule, quantizer="ternary", pretrained=True, **{"epsilon": torch.tensor(1.0)} | more)


def capture(optimizer, monkeypatch) -> None:
    """A step while a graph is captured; capturable can't be asked for on a CPU."""
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
    with monkeypatch.context() as patch:
        patch.setattr(plan, "is_captured", lambda weights: True)
        optimizer.step()


def refused(optimizer, monkeypatch, message: str) -> None:
    """Nothing has come to be, and nothing has moved."""
    weight = optimizer.param_groups[0]["params"][0]
    before, state = weight.detach().clone(), {key: set(kept) for key, kept in optimizer.state.items()}
    with pytest.raises(RuntimeError, match=message):
        capture(optimizer, monkeypatch)
    assert torch.equal(weight, before)
    assert {key: set(kept) for key, kept in optimizer.state.items()} == state


@rules
def test_a_capture_before_any_step_is_refused(rule, monkeypatch):
    refused(made(rule), monkeypatch, r"every replay would do it again.*Step once before the capture")


@pytest.mark.parametrize("rule", ["momentum", "dampening", "adamw", "amsgrad"])
def test_scales_alone_are_no_warm_up(rule, monkeypatch):
    optimizer = quantized(rule)
    optimizer.prepare()
    refused(optimizer, monkeypatch, r"would set up \w+: every replay")


def test_what_comes_later_is_refused_too(monkeypatch):
    optimizer = quantized("adamw")
    optimizer.step()
    optimizer.param_groups[0]["outputs"] = ["codes"]
    refused(optimizer, monkeypatch, "would set up what belongs to a weight")
    optimizer.param_groups[0] |= {"outputs": [], "amsgrad": True}
    refused(optimizer, monkeypatch, "would set up max_exp_avg_sq")


@rules
def test_after_a_step_it_is_captured(rule, monkeypatch):
    optimizer, other = quantized(rule), quantized(rule)
    for each in (optimizer, other):
        each.step()
    capture(optimizer, monkeypatch)
    other.step()
    for mine, theirs in zip(*(each.param_groups[0]["params"] for each in (optimizer, other)), strict=True):
        assert torch.equal(mine, theirs)


def test_the_plan_of_the_warm_up_is_looked_at_again(monkeypatch):
    """What an eager step may do, a graph may not."""
    optimizer = quantized("momentum", epsilon=1.0)
    optimizer.step()
    optimizer.step()
    refused(optimizer, monkeypatch, "epsilon = 1.0: the graph would never anneal")
    optimizer = quantized("adamw", epsilon=1.0, total_steps=100)
    optimizer.step()
    refused(optimizer, monkeypatch, "a replay counts no step")


@pytest.mark.parametrize("seed", [0, torch.tensor(0)], ids=["number", "elsewhere"])
def test_a_seed_of_the_host_is_refused(seed, monkeypatch):
    optimizer = made("momentum", torch.bfloat16, low_precision="stochastic", seed=seed)
    optimizer.step()
    if isinstance(seed, torch.Tensor):
        monkeypatch.setattr(optimizer, "param_groups", [optimizer.param_groups[0] | {"seed": seed.to("meta")}])
    refused(optimizer, monkeypatch, r"every replay would round by the same random bits; pass seed=torch\.tensor")


def test_a_seed_with_the_weights_is_captured_and_advanced(monkeypatch):
    optimizer = made("momentum", torch.bfloat16, low_precision="stochastic", seed=torch.tensor(0))
    optimizer.step()
    before = int(optimizer.param_groups[0]["seed"])
    capture(optimizer, monkeypatch)
    assert int(optimizer.param_groups[0]["seed"]) != before


def test_float32_weights_need_no_seed_of_the_device(monkeypatch):
    optimizer = made("momentum", low_precision="stochastic")
    optimizer.step()
    capture(optimizer, monkeypatch)
