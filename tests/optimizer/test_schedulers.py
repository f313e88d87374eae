"""Every learning-rate scheduler of torch, momentum cycling and averaging included: what they ask for is what the step
does.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import askew_cuda as askew

STEPS = 24
MADE = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda k: 0.9**k),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda k: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, 1.0, 5),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, STEPS, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=4), schedulers.ExponentialLR(o, 0.9)], [4]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ExponentialLR(o, 0.9), schedulers.ConstantLR(o, 0.5, 4)]
    ),
    "CyclicLR": lambda o: schedulers.CyclicLR(
        o, 0.01, 0.2, 3, cycle_momentum=True, base_momentum=0.5, max_momentum=0.9
    ),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.3, STEPS + 1, base_momentum=0.5, max_momentum=0.9),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: SWALR(o, 0.02, 4),
}
PAIRS = {
    "sgd": (askew.AskewSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (askew.AskewAdamW, torch.optim.AdamW, {"lr": 0.1}),
}
rules = pytest.mark.parametrize("rule", PAIRS)


def test_the_table_has_every_scheduler():
    assert set(MADE) == {*schedulers.__all__, "SWALR"} - {"LRScheduler"}


def advance(scheduler, k: int) -> None:
    scheduler.step(1.0 + k % 3) if isinstance(scheduler, schedulers.ReduceLROnPlateau) else scheduler.step()


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in ((4, 6), (5,))]


def walk(params, optimizer, scheduler, steps: int = STEPS, start: int = 0) -> list[tuple]:
    """Steps with gradients that depend on the number of the step alone; what the group held at each."""
    seen = []
    for k in range(start, start + steps):
        for weight in params:
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        group = optimizer.param_groups[0]
        seen.append((float(group["lr"]), group.get("momentum"), group.get("betas")))
        optimizer.step()
        advance(scheduler, k)
    return seen


@rules
@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_schedule_does_what_it_does_for_torch(name, rule, tensor_lr):
    ours, torchs, keywords = PAIRS[rule]
    keywords = keywords | ({"lr": torch.tensor(0.1, dtype=torch.float64)} if tensor_lr else {})
    mine, theirs = weights(), weights()
    first, second = ours(mine, **copy.deepcopy(keywords)), torchs(theirs, foreach=False, **copy.deepcopy(keywords))
    seen = walk(mine, first, MADE[name](first))
    assert seen == walk(theirs, second, MADE[name](second))
    assert len(set(seen)) > 1
    for weight, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(weight, wanted, rtol=1e-12, atol=1e-12)


@rules
@pytest.mark.parametrize("name", MADE)
def test_a_schedule_beside_an_annealing_ends_on_the_levels(name, rule):
    ours, _, keywords = PAIRS[rule]
    params = weights()
    optimizer = ours(params, quantizer="ternary", pretrained=True, **keywords)
    scheduler, anneal = MADE[name](optimizer), askew.Anneal(optimizer, STEPS, hold=0.0, end=0.2)
    for k in range(STEPS):
        walk(params, optimizer, scheduler, 1, k)
        anneal.step()
    assert optimizer.finalize().share_on_level == 1.0


@pytest.mark.parametrize("name", MADE)
def test_a_schedule_resumes_bit_for_bit(name):
    def start():
        params = weights()
        optimizer = askew.AskewSGD(params, lr=0.1, momentum=0.9, quantizer="2bit", pretrained=True)
        return params, optimizer, MADE[name](optimizer)

    straight, optimizer, scheduler = start()
    walk(straight, optimizer, scheduler, 5)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict(), [weight.detach() for weight in straight]))
    walk(straight, optimizer, scheduler, 5, 5)
    resumed, optimizer, scheduler = start()
    with torch.no_grad():
        for weight, value in zip(resumed, saved[2], strict=True):
            weight.copy_(value)
    scheduler.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[0])
    walk(resumed, optimizer, scheduler, 5, 5)
    for weight, wanted in zip(resumed, straight, strict=True):
        assert torch.equal(weight, wanted)


@rules
def test_averages_are_of_trained_weights_and_can_be_quantized(rule):
    """An average is off the levels; quantized() and packed files are of the trained weights, which the optimizer
    holds.
    """
    ours, _, keywords = PAIRS[rule]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    averages = [AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))]
    optimizer = ours(askew.param_groups(model, {"*": "ternary"}, verbose=False), **keywords)
    data = torch.randn(16, 6)
    for _ in range(4):
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()
        for average in averages:
            average.update_parameters(model)
    for average in averages:
        update_bn([data], average)
        assert average(data).isfinite().all()
    trained = model[0].weight.detach().clone()
    with optimizer.quantized():
        assert not torch.equal(model[0].weight, trained)
        assert not torch.equal(averages[1].module[0].weight, model[0].weight)
    assert torch.equal(model[0].weight, trained)


def test_a_schedule_sees_the_steps_that_were_made():
    """torch's warning about the order of the two calls does not come up: the step is wrapped as torch wraps its own."""
    params = weights()
    optimizer = askew.AskewSGD(params, lr=0.1)
    scheduler = schedulers.StepLR(optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walk(params, optimizer, scheduler, 2)
    late = schedulers.StepLR(askew.AskewSGD(weights(), lr=0.1), 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        late.step()
