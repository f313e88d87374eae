"""Warnings where a measured trap is entered, and silence where not."""

import warnings

import pytest
import torch
from torch import nn

import askew_cuda as askew
from askew_cuda import hints


def trained(
    rule: type, lr: float, steps: int, quantizer: str = "binary", total: int = 100, grad: float = 1.0, **keywords
):
    """An optimizer of one 2x4 weight at scale 0.5 after steps on a constant gradient, each followed by
    Anneal.step().
    """
    weight = nn.Parameter(torch.zeros(2, 4))
    group = {"params": [weight], "quantizer": askew.Quantizer(quantizer, scale=0.5), **keywords}
    optimizer = rule([group], lr=lr)
    anneal = askew.Anneal(optimizer, total_steps=total)
    for _ in range(steps):
        weight.grad = torch.full_like(weight, grad)
        optimizer.step()
        anneal.step()
    return optimizer


@pytest.mark.parametrize(("quantizer", "half"), [("binary", 1.0), ("ternary", 0.5), ("2bit", 0.5)])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_reach_of_sgd_by_hand(quantizer, half, momentum):
    optimizer = trained(askew.AskewSGD, 1e-3, 20, quantizer, total=1000, grad=3.0, momentum=momentum)
    velocity = 3 / (1 - momentum)  # lr * velocity per step, of scale * half
    assert hints.reach(optimizer, optimizer.param_groups[0], 7) == pytest.approx(
        7 * 1e-3 * velocity / (0.5 * half), rel=1e-4
    )


def test_the_reach_of_adamw_by_hand_does_not_depend_on_the_gradient():
    for grad in (0.1, 10.0):
        optimizer = trained(askew.AskewAdamW, 1e-3, 5, total=1000, grad=grad)
        assert hints.reach(optimizer, optimizer.param_groups[0], 100) == pytest.approx(100 * 1e-3 / 0.5, rel=1e-4)


def test_of_a_large_weight_the_first_rows_are_looked_at():
    weight = nn.Parameter(torch.zeros(100, 10_000))
    optimizer = askew.AskewSGD([weight], lr=1e-3, quantizer=askew.Quantizer("binary", scale=0.5))
    weight.grad = torch.ones_like(weight)
    weight.grad[6:] = 9  # six rows are 60,000 weights, seven would be more than are looked at
    optimizer.step()
    assert hints.reach(optimizer, optimizer.param_groups[0], 100) == pytest.approx(100 * 1e-3 / 0.5, rel=1e-4)


def test_the_reach_of_weights_that_were_never_stepped_is_unknown():
    optimizer = trained(askew.AskewSGD, 0.1, 0)
    assert hints.reach(optimizer, optimizer.param_groups[0], 7) is None


@pytest.mark.parametrize("rule", [askew.AskewSGD, askew.AskewAdamW])
def test_steps_that_are_too_small_warn_once_at_a_tenth_of_the_training(rule):
    trained(rule, 5e-3, 9)
    with pytest.warns(UserWarning, match="lr = 0.005 a weight would go about 0.9 times") as caught:
        trained(rule, 5e-3, 30)
    assert len(caught) == 1


@pytest.mark.parametrize("rule", [askew.AskewSGD, askew.AskewAdamW])
@pytest.mark.parametrize(
    "keywords",
    [
        {"lr": 0.05},
        {"lr": 5e-3, "pretrained": True},
        {"lr": 5e-3, "pretrained": "packed"},
        {"lr": 5e-3, "anneal": "interval"},
        {"lr": 5e-3, "total": 99},
    ],
)
def test_steps_that_are_large_enough_and_what_was_not_measured_are_silent(rule, keywords):
    trained(rule, steps=50, **keywords)


def test_annealing_a_fresh_network_early_warns():
    with pytest.warns(UserWarning, match=r"25% of the training r = .* pretrained=True"):
        askew.Anneal(trained(askew.AskewSGD, 0.1, 0), total_steps=1000, hold=0.0)
    with pytest.warns(UserWarning, match="r = 0.50"):
        askew.Anneal(
            trained(askew.AskewSGD, 0.1, 0),
            total_steps=1000,
            shape=lambda progress: 1 - 2 * progress if progress < 0.5 else 0,
        )
    for keywords, steps in (({"pretrained": True}, 1000), ({"anneal": "interval"}, 1000), ({}, 99)):
        askew.Anneal(trained(askew.AskewSGD, 0.1, 0, **keywords), total_steps=steps, hold=0.0)
    askew.Anneal(trained(askew.AskewSGD, 0.1, 0), total_steps=1000, hold=hints.EARLY)


def test_the_warnings_point_at_the_caller():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        askew.Anneal(trained(askew.AskewSGD, 0.1, 0), total_steps=1000, hold=0.0)
        trained(askew.AskewSGD, 5e-3, 10)
    assert [each.filename for each in caught] == [__file__, __file__]
