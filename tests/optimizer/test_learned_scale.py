"""Scales that learn, in the optimizers: when they begin and end, what a checkpoint carries, what must stay."""

import copy
import math
import weakref

import pytest
import torch

import askew_cuda as askew
from askew_cuda import backends

RULES = {
    "sgd": lambda params, **keywords: askew.AskewSGD(params, lr=0.1, momentum=0.9, **keywords),
    "adamw": lambda params, **keywords: askew.AskewAdamW(params, lr=0.01, **keywords),
}
QUANTIZERS = ("binary", "ternary/channel", "4bit/group8")


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)).to(dtype)


def groups(model, quantizer):
    weights = [p for p in model.parameters() if p.dim() > 1]
    return [{"params": weights, "quantizer": quantizer}, {"params": [p for p in model.parameters() if p.dim() == 1]}]


def train(model, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 16, generator=generator)
    y = 4 * torch.randn(64, 8, generator=generator)  # larger than the network can say with its first scales
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x.to(model[0].weight.dtype)) - y).square().mean().backward()
        optimizer.step()


def scales(optimizer):
    return [state["scale"].clone() for state in optimizer.state.values() if "scale" in state]


def learning(optimizer):
    """Weights whose scale learns: an infinite velocity says that it has learned."""
    return [
        p
        for p, state in optimizer.state.items()
        if "scale_velocity" in state and state["scale_velocity"].isfinite().all()
    ]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_a_scale_grows_where_the_loss_asks_for_it_and_stands_once_annealing_has_begun(rule, quantizer):
    model = network()
    optimizer = rule(groups(model, quantizer), scale_lr=0.3, total_steps=60, hold=0.5, end=0.6)
    optimizer.prepare()
    first = scales(optimizer)
    assert len(learning(optimizer)) == 2
    train(model, optimizer, 31)  # the last of them has epsilon = 1 still
    assert optimizer.param_groups[0]["epsilon"] < 1
    free = scales(optimizer)
    assert all((after > before).float().mean() > 0.6 for before, after in zip(first, free, strict=True))
    train(model, optimizer, 1)  # what the last free step has learned
    assert not learning(optimizer)
    fixed = scales(optimizer)
    assert all((state["scale_growth"] == 1).all() for state in optimizer.state.values() if "scale" in state)
    train(model, optimizer, 28)
    assert all(torch.equal(a, b) for a, b in zip(fixed, scales(optimizer), strict=True))
    assert optimizer.finalize().share_on_level == 1


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_codes_stay_while_a_scale_moves_alone(rule):
    """Where lr moves no weight but the scale's growth does, no code changes: w / s is what it was."""
    model = network()
    optimizer = rule(groups(model, "4bit/channel"), scale_lr=0.3, clip=False)
    train(model, optimizer, 3)
    weight = model[0].weight
    before = {"weight": weight.detach().clone(), "scale": optimizer.state[weight]["scale"].clone()}
    growth = optimizer.state[weight]["scale_growth"].clone()
    assert (growth != 1).all()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 1)
    torch.testing.assert_close(weight.detach(), before["weight"] * growth, rtol=0, atol=0)
    assert torch.equal(optimizer.state[weight]["scale"], before["scale"] * growth)
    assert (optimizer.state[weight]["scale_growth"] == 1).all()


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_every_way_to_make_a_step_learns_the_same(rule, quantizer):
    """Plan, kept plan and reference: the same weights and scales, bit for bit; at float64, too."""
    for dtype in (torch.float32, torch.float64):
        runs = []
        for backend in ("auto", "reference"):
            model = network(dtype)
            optimizer = rule(groups(model, quantizer), scale_lr=0.3, total_steps=20, hold=0.5, backend=backend)
            train(model, optimizer, 20)
            runs.append([p.detach().clone() for p in model.parameters()] + scales(optimizer))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_a_run_goes_on_from_a_checkpoint_as_if_nothing_had_happened(rule):
    model = network()
    keywords = {"scale_lr": 0.3, "total_steps": 40, "hold": 0.5}
    optimizer = rule(groups(model, "ternary/channel"), **keywords)
    train(model, optimizer, 10)
    other = copy.deepcopy(model)
    again = rule(groups(other, "ternary/channel"), **keywords)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, one in ((model, optimizer), (other, again)):
        train(each, one, 30, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(scales(optimizer), scales(again), strict=True))


def test_a_new_scale_learns_anew():
    """One that has learned, and that is taken away while its weights are free."""
    model = network()
    optimizer = RULES["sgd"](groups(model, "ternary"), scale_lr=0.3)
    train(model, optimizer, 2)
    with pytest.warns(UserWarning, match="finalize"):
        optimizer.finalize()
    del optimizer.state[model[0].weight]["scale"]
    train(model, optimizer, 2)
    assert learning(optimizer) == [model[0].weight]


def test_a_checkpoint_whose_scales_are_fixed_keeps_them_fixed():
    model = network()
    optimizer = RULES["sgd"](groups(model, "ternary"), scale_lr=0.0)
    train(model, optimizer, 2)
    again = RULES["sgd"](groups(model, "ternary"), scale_lr=0.3)
    again.load_state_dict(optimizer.state_dict())
    before = scales(again)
    train(model, again, 3)
    assert not learning(again)
    assert all(torch.equal(a, b) for a, b in zip(before, scales(again), strict=True))


@pytest.mark.parametrize(
    ("keywords", "dtype", "learns"),
    [
        ({}, torch.float32, True),  # the default
        ({"scale_lr": 0.0}, torch.float32, False),
        ({"pretrained": True}, torch.float32, False),  # their scale is known
        ({"normalized": True}, torch.float32, False),  # their scale does not matter
        ({"normalized": True, "scale_lr": 0.1}, torch.float32, True),
        ({"pretrained": True, "scale_lr": 0.1}, torch.float32, True),
        ({"quantizer": askew.Quantizer("ternary", scale=0.1)}, torch.float32, False),  # the user's own
        ({"pretrained": "packed", "scale_lr": 0.1}, torch.float32, False),
        ({"epsilon": 0.5}, torch.float32, False),
        ({}, torch.bfloat16, False),  # rounding to nearest would lose a growth of less than 2^-8
        ({"low_precision": "remainder"}, torch.bfloat16, True),
        ({"low_precision": "stochastic"}, torch.bfloat16, True),
    ],
)
def test_which_scales_learn(keywords, dtype, learns):
    model = network(dtype)
    for prepares in (False, True):
        optimizer = RULES["sgd"]([{"params": [model[0].weight], "quantizer": "ternary", "clip": False} | keywords])
        if prepares:
            optimizer.prepare()
        train(model, optimizer, 1)
        assert bool(learning(optimizer)) == learns


def test_a_weight_whose_scale_is_fixed_steps_beside_those_that_learn():
    model = network()
    group = {"params": [model[0].weight, model[2].weight], "quantizer": "ternary", "scale_lr": 0.3}
    optimizer = RULES["sgd"]([group])
    train(model, optimizer, 2)
    fixed = optimizer.state[model[0].weight]
    del fixed["scale_velocity"], fixed["scale_growth"]
    before = scales(optimizer)
    train(model, optimizer, 3)
    after = scales(optimizer)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_annealing_by_a_tensor_ends_the_learning_in_the_state(rule):
    model = network()
    epsilon = torch.tensor(1.0)
    optimizer = rule(groups(model, "ternary"), scale_lr=0.3, epsilon=epsilon)
    train(model, optimizer, 5)
    for group in optimizer.param_groups:
        group["epsilon"].fill_(0.9)
    train(model, optimizer, 1)
    fixed = scales(optimizer)
    for group in optimizer.param_groups:
        group["epsilon"].fill_(1.0)  # it rises again, and starts nothing anew
    train(model, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(fixed, scales(optimizer), strict=True))
    assert all((state["scale_velocity"] == math.inf).all() for state in optimizer.state.values() if "scale" in state)


def test_a_nan_costs_its_own_weight_alone():
    model = network()
    optimizer = RULES["sgd"](groups(model, "ternary"), scale_lr=0.3)
    train(model, optimizer, 2)
    weight = model[0].weight
    weight.grad[3, 4] = math.nan
    optimizer.step()
    optimizer.step()
    assert weight.isnan().sum() == 1
    assert weight[3, 4].isnan()
    state = optimizer.state[weight]
    assert all(state[key].isfinite().all() for key in ("scale", "scale_velocity", "scale_growth"))


def test_a_step_that_amp_skips_moves_no_scale():
    model = network()
    optimizer = RULES["sgd"](groups(model, "ternary"), scale_lr=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 16)).square().mean()).backward()
        if step == 2:
            model[0].weight.grad[0, 0] = math.inf
        before = copy.deepcopy(optimizer.state[model[0].weight])
        scaler.step(optimizer)
        scaler.update()
        after = optimizer.state[model[0].weight]
        moved = not before or not all(torch.equal(before[key], after[key]) for key in before)
        assert moved == (step != 2)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_a_compiled_step_learns_what_an_eager_one_does(rule):
    runs = []
    for compiles in (False, True):
        torch.compiler.reset()
        model = network()
        optimizer = rule(groups(model, "ternary/channel"), scale_lr=0.3, epsilon=torch.tensor(1.0))
        optimizer.prepare()
        step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager") if compiles else optimizer.step
        for seed in range(3):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            model(torch.randn(4, 16)).square().mean().backward()
            step()
        runs.append([p.detach().clone() for p in model.parameters()] + scales(optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_finalize_ends_the_learning():
    model = network()
    optimizer = RULES["sgd"](groups(model, "ternary"), scale_lr=0.3)
    train(model, optimizer, 2)
    with pytest.warns(UserWarning, match="finalize"):
        optimizer.finalize()
    assert not learning(optimizer)
    fixed, keys = scales(optimizer), {key for state in optimizer.state.values() for key in state}
    train(model, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(fixed, scales(optimizer), strict=True))
    assert {"scale", "scale_velocity", "scale_growth"} <= keys  # a checkpoint is that of a fresh optimizer


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan, "fast", True])
def test_a_scale_lr_that_is_none(value):
    with pytest.raises((ValueError, TypeError), match="scale_lr"):
        RULES["sgd"](groups(network(), "ternary"), scale_lr=value)


def test_the_extension_and_the_reference_refuse_sums_that_do_not_fit():
    settings = {"lr": 0.1, "weight_decay": 0.0, "maximize": False, "momentum": 0.0, "dampening": 0.0, "nesterov": False}
    settings |= {"epsilon": 1.0, "anneal": "capture", "skew_at": "velocity", "recovery": 0.5, "alpha": None}
    settings |= {"max_step": 0.5, "clip": True}
    weight, scale = torch.ones(4), torch.tensor(1.0)
    for growths, sums in (
        ([torch.ones(2)], [torch.zeros(2, 1, dtype=torch.float64)]),
        ([torch.tensor(1.0)], [torch.zeros(3, 1, dtype=torch.float64)]),
        ([torch.tensor(1.0)], [torch.zeros(2, 1)]),
        ([torch.tensor(1.0)], []),
    ):
        for name in ("reference", *(["cpu"] if backends.extension else [])):
            with pytest.raises((ValueError, TypeError), match=r"growths|sums"):
                backends.operators(name).sgd_(
                    [weight], [torch.ones(4)], [], [scale], (-1, 1), [], [], growths=growths, sums=sums, **settings
                )


@pytest.mark.parametrize("channel_dim", [0, 1])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_zero_grad_frees_the_gradients(rule, channel_dim):
    """A step keeps none of them, whether its plan is new or kept, and wherever a scale's weights lie."""
    numpy = pytest.importorskip("numpy")  # whose arrays tell when the memory of their tensor is let go
    model = network()
    optimizer = rule(groups(model, "ternary/channel"), channel_dim=channel_dim)
    for _ in range(3):
        arrays = []
        for each in model.parameters():
            array = numpy.ones(each.shape, numpy.float32)
            each.grad = torch.from_numpy(array)
            arrays.append(weakref.ref(array))
            del array
        optimizer.step()
        optimizer.zero_grad()
        assert not [array for array in arrays if array() is not None]
