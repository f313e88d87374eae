"""total_steps: an optimizer that anneals itself, from the first step through checkpoints to the last one."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import askew_cuda as askew
from askew_cuda import hints, plan, schedule
from askew_cuda.schedule import epsilon_of, half_width_of, settling_steps

RULES = {
    "sgd": (askew.AskewSGD, {"lr": 0.1, "momentum": 0.9}),
    "dampening": (askew.AskewSGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "adamw": (askew.AskewAdamW, {"lr": 0.02}),
}
rules = pytest.mark.parametrize("rule", RULES)


def made(rule: str = "sgd", quantizers: tuple = ("2bit", None), **more):
    """An optimizer of a weight of 2x2 for each quantizer, with gradients of one."""
    ours, keywords = RULES[rule]
    groups = []
    for k, quantizer in enumerate(quantizers):
        weight = nn.Parameter(torch.tensor([[0.3, -0.7], [0.9, 0.1]]))
        weight.grad = torch.ones_like(weight)
        groups.append({"params": [(f"w{k}", weight)], "quantizer": quantizer})
    return ours(groups, **{"pretrained": True, **keywords, **more})


def steps(optimizer, number: int):
    for _ in range(number):
        optimizer.step()
    return optimizer


def r(optimizer, group: int = 0) -> float:
    return half_width_of(float(optimizer.param_groups[group]["epsilon"]))


def counts(optimizer) -> list[int]:
    return [group["steps_done"] for group in optimizer.param_groups]


# One line anneals


@rules
def test_the_quadratic_by_hand(rule):
    optimizer, seen = made(rule, total_steps=10, hold=0.2, end=0.6), []
    for _ in range(11):
        seen.append(r(optimizer))
        if len(seen) <= 10:
            optimizer.step()
    assert seen == pytest.approx([1, 1, 1, 0.5625, 0.25, 0.0625, 0, 0, 0, 0, 0], abs=1e-12)
    assert counts(optimizer) == [10, 10]
    assert optimizer.param_groups[1]["epsilon"] == 1.0  # not quantized


@rules
@pytest.mark.parametrize("shape", ["quadratic", "geometric", lambda progress: 1 - progress])
def test_it_is_what_anneal_does(rule, shape):
    own, other = made(rule, total_steps=60, shape=shape), made(rule)
    anneal = askew.Anneal(other, total_steps=60, shape=shape)
    for _ in range(60):
        assert own.param_groups[0]["epsilon"] == other.param_groups[0]["epsilon"]
        steps(own, 1), steps(other, 1), anneal.step()
    for mine, theirs in zip(own.param_groups, other.param_groups, strict=True):
        assert torch.equal(mine["params"][0], theirs["params"][0])


def test_a_tensor_is_filled_in_place_and_every_group_has_its_own():
    optimizer = made(quantizers=("ternary", "4bit"), epsilon=torch.tensor(1.0), total_steps=1000)
    epsilons = [group["epsilon"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["steps_done"] = 499
    steps(optimizer, 1)
    assert [group["epsilon"] is epsilon for group, epsilon in zip(optimizer.param_groups, epsilons, strict=True)]
    z = 0.5 / 0.95
    assert [float(each) for each in epsilons] == pytest.approx([epsilon_of((1 - z) ** 2), 1.0])


def test_the_next_state_is_known_before_the_step():
    optimizer = made(total_steps=10, hold=0.2, end=0.6)
    group = optimizer.param_groups[0]
    for count in range(10):
        wanted = schedule.next_state(group)
        assert (group["steps_done"], wanted[0]) == (count, count + 1)
        steps(optimizer, 1)
        assert (group["steps_done"], group["epsilon"]) == wanted
    assert schedule.next_state(made().param_groups[0]) is None


def test_without_total_steps_nothing_is_counted():
    optimizer = steps(made(epsilon=0.5), 3)
    assert counts(optimizer) == [0, 0]
    assert optimizer.param_groups[0]["epsilon"] == 0.5


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"total_steps": 0}, ValueError, "total_steps = 0; at least 1"),
        ({"total_steps": 1.5}, TypeError, "total_steps = 1.5; a whole number is needed"),
        ({"total_steps": True}, TypeError, "total_steps = True; a whole number"),
        ({"total_steps": "all"}, TypeError, "total_steps = 'all'"),
        ({"total_steps": 9, "steps_done": -1}, ValueError, "steps_done = -1; .* at least 0"),
        ({"total_steps": 9, "steps_done": None}, TypeError, "steps_done = None"),
        ({"total_steps": 9, "hold": 1.5}, ValueError, r"hold = 1.5; .* \[0, 1\]"),
        ({"total_steps": 9, "end": "late"}, TypeError, "end = 'late'; a number"),
        ({"total_steps": 9, "hold": 0.9, "end": 0.5}, ValueError, "hold = 0.9, end = 0.5; 0 <= hold < end <= 1"),
        ({"total_steps": 9, "hold": 1.0}, ValueError, "hold = 1.0, end = 0.95"),
        ({"total_steps": 9, "shape": "linear"}, ValueError, "shape = 'linear'; 'quadratic', 'geometric' or a callable"),
        ({"total_steps": 9, "shape": lambda progress: 2}, ValueError, r"shape\(0.0\) = 2.0; a half-width in \[0, 1\]"),
        ({"total_steps": 9, "epsilon": 0.3}, ValueError, "epsilon = 0.3 with total_steps = 9: after 0 steps it is 1"),
    ],
)
def test_wrong_keywords(keywords, error, message):
    with pytest.raises(error, match=message):
        made(**keywords)


def test_a_shape_that_goes_wrong_on_the_way_leaves_a_sound_optimizer():
    optimizer = steps(made(total_steps=10, shape=lambda progress: 1 if progress < 0.35 else math.nan), 3)
    with pytest.raises(ValueError, match=r"shape\(0.4\) = nan"):
        optimizer.step()
    assert counts(optimizer)[0] == 3


def test_traps_are_warned_of_at_the_line_of_the_caller():
    with pytest.warns(UserWarning, match=r"25% of the training r = .* pretrained=True") as caught:
        made(pretrained=False, total_steps=1000, hold=0.0)
    assert caught[0].filename == __file__
    optimizer = steps(made(pretrained=False, lr=1e-6, total_steps=1000), 99)
    with pytest.warns(UserWarning, match="lr = 1e-06 a weight would go about") as caught:
        steps(optimizer, 1)
    assert [each.filename for each in caught] == [__file__]
    optimizer = steps(made(total_steps=2), 2)
    with pytest.warns(UserWarning, match="has made 3 steps for total_steps = 2; the annealing has ended"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(optimizer, 3)
    assert counts(optimizer) == [6, 6]


# What counts


@rules
def test_a_skip_that_the_host_knows_of_is_not_counted(rule):
    optimizer = made(rule, total_steps=10, hold=0.0, end=1.0, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    steps(optimizer, 1)
    assert counts(optimizer) == [0, 0]
    optimizer.found_inf = torch.tensor(0.0)
    steps(optimizer, 1)
    assert counts(optimizer) == [1, 1]
    del optimizer.grad_scale, optimizer.found_inf
    for group in optimizer.param_groups:
        group["params"][0].grad.fill_(math.inf)
    for fused in (True, False):  # skipped inside of step(), and by a scaler that does not call it
        optimizer._step_supports_amp_scaling = fused
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        scaler.scale(torch.ones(1))
        scaler.step(optimizer)
    assert counts(optimizer) == [1, 1]


def test_a_skip_that_only_the_device_knows_of_is_counted(monkeypatch):
    optimizer = made(total_steps=10)
    monkeypatch.setattr(type(optimizer), "_overflowed", lambda self, wait=False: False)  # as if it lay on a device
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    steps(optimizer, 1)
    assert torch.equal(optimizer.param_groups[0]["params"][0], before)
    assert counts(optimizer) == [1, 1]


@rules
def test_a_step_that_is_not_made_is_not_counted(rule):
    optimizer = made(rule, total_steps=10)
    with optimizer.quantized(), pytest.raises(RuntimeError):
        optimizer.step()
    optimizer.zero_grad()
    steps(optimizer, 1)  # without gradients nothing moves
    assert counts(optimizer) == [0, 0]


def test_a_group_that_comes_later_takes_the_others_count():
    optimizer = steps(made(total_steps=10, hold=0.0, end=1.0), 4)
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer.add_param_group({"params": [("late", weight)], "quantizer": "ternary"})
    assert counts(optimizer) == [4, 4, 4]
    assert r(optimizer, 2) == pytest.approx(0.36)
    optimizer.add_param_group(
        {"params": [("own", nn.Parameter(torch.ones(2, 2)))], "quantizer": "2bit", "steps_done": 5}
    )
    assert r(optimizer, 3) == pytest.approx(0.25)


def test_copies_and_pickles_go_on():
    optimizer = steps(made(total_steps=10, hold=0.0, end=1.0), 4)
    for each in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        for group in each.param_groups:
            group["params"][0].grad = torch.ones(2, 2)
        steps(each, 1)
        assert counts(each) == [5, 5]
        assert r(each) == pytest.approx(0.25)


def test_capturing_a_graph_is_refused():
    optimizer = made(total_steps=10)
    with pytest.raises(
        RuntimeError, match=r"total_steps = 10: a replay counts no step; .* use Anneal, with epsilon=torch"
    ):
        plan.check_capture(optimizer.param_groups[0], None)


def test_anneal_on_an_optimizer_that_anneals_itself_is_refused():
    with pytest.raises(ValueError, match="anneals itself, total_steps = 10; leave out Anneal"):
        askew.Anneal(made(total_steps=10), total_steps=10)


# Checkpoints


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@rules
@pytest.mark.parametrize("cut", [0, 1, 3, 5, 9, 10])
@pytest.mark.parametrize("shape", ["quadratic", lambda progress: 1 - progress])
def test_a_resumed_run_is_the_run_that_was_not_cut(rule, cut, shape):
    settings = {"total_steps": 10, "hold": 0.2, "end": 0.8, "shape": shape}
    straight, first, second = (made(rule, **settings) for _ in range(3))
    steps(straight, 10), steps(first, cut)
    second.load_state_dict(through_a_file(first.state_dict()))
    with torch.no_grad():
        for a, b in zip(first.param_groups, second.param_groups, strict=True):
            b["params"][0].copy_(a["params"][0])
    assert counts(second) == [cut, cut]
    steps(second, 10 - cut)
    for a, b in zip(straight.param_groups, second.param_groups, strict=True):
        assert torch.equal(a["params"][0], b["params"][0])
        assert a["epsilon"] == b["epsilon"]


def test_loading_keeps_this_schedule_and_warns_where_the_totals_differ():
    saved = steps(made(total_steps=10, hold=0.0, end=1.0), 5).state_dict()
    optimizer = made(total_steps=20, hold=0.1, end=0.6, shape="geometric")
    with pytest.warns(
        UserWarning, match="total_steps = 10, this optimizer total_steps = 20; it goes on at step 5 of 20"
    ):
        optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert [group[key] for key in ("total_steps", "hold", "end", "shape")] == [20, 0.1, 0.6, "geometric"]
    assert (group["steps_done"], group["epsilon"]) == (5, pytest.approx(1e-6**0.3))
    assert saved["param_groups"][0]["total_steps"] == 10
    with pytest.warns(UserWarning, match="total_steps = 10, this optimizer total_steps = None; epsilon stays as it is"):
        (plain := made()).load_state_dict(saved)
    assert r(plain) == pytest.approx(0.25)


def test_a_count_that_is_none_is_refused_and_nothing_is_loaded():
    optimizer = steps(made(total_steps=10), 2)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["steps_done"] = "many"
    before = str(optimizer.state_dict())
    with pytest.raises(TypeError, match="steps_done = 'many'"):
        optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == before


def of_version_0_1_0(optimizer) -> dict:
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        for key in ("total_steps", "hold", "end", "shape", "steps_done"):
            del group[key]
    return saved


@rules
@pytest.mark.parametrize("shape", ["quadratic", "geometric", lambda progress: (1 - progress) ** 3])
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("made_steps", [421, 700, 949])
def test_a_checkpoint_without_a_count_gives_it_by_its_epsilon(rule, shape, tensor, made_steps):
    """Of two groups with other phases, both count the same; an epsilon in a tensor was rounded to float32."""
    given = {"epsilon": torch.tensor(1.0)} if tensor else {}
    old = made(rule, ("2bit", "4bit", None), **given)
    askew.Anneal(old, total_steps=1000, shape=shape).load_state_dict(
        {
            "steps_done": made_steps,
            "total_steps": 1000,
            "hold": None,
            "end": None,
            "shape": None if callable(shape) else shape,
        }
    )
    optimizer = made(rule, ("2bit", "4bit", None), total_steps=1000, shape=shape)
    optimizer.load_state_dict(of_version_0_1_0(old))
    assert counts(optimizer) == [made_steps] * 3


def test_an_epsilon_of_zero_counts_to_the_end_of_the_annealing():
    optimizer = made(total_steps=1000)
    optimizer.load_state_dict(of_version_0_1_0(made(epsilon=0.0)))
    assert counts(optimizer) == [950, 950]


def test_a_checkpoint_without_a_count_at_epsilon_one():
    """AdamW's counters say it where they lie before the annealing; else it is counted from 0, and said so."""
    fresh = {"pretrained": False, "total_steps": 1000}
    for made_steps, wanted in ((7, 7), (0, 0)):
        optimizer = made("adamw", **fresh)
        optimizer.load_state_dict(of_version_0_1_0(steps(made("adamw", pretrained=False), made_steps)))
        assert counts(optimizer) == [wanted] * 2
    saved = of_version_0_1_0(steps(made("adamw", pretrained=False), 1))
    for state in saved["state"].values():
        state["step"].fill_(5000)
    for rule, other in (("adamw", saved), ("sgd", of_version_0_1_0(steps(made(pretrained=False), 7)))):
        optimizer = made(rule, **fresh)
        with pytest.warns(UserWarning, match="does not say how many steps .* counted from 0"):
            optimizer.load_state_dict(other)
        assert (counts(optimizer), r(optimizer)) == ([0, 0], 1)


def test_a_float_run_begins_to_be_quantized_at_zero():
    optimizer = made("adamw", total_steps=1000)
    theirs = torch.optim.AdamW([(f"w{k}", nn.Parameter(torch.ones(2, 2))) for k in range(2)])
    for weight in theirs.param_groups[0]["params"]:
        weight.grad = torch.ones_like(weight)
    steps(theirs, 5)
    optimizer.load_state_dict(theirs.state_dict())
    assert (counts(optimizer), r(optimizer)) == ([0, 0], 1)


def test_a_learning_rate_finder_leaves_no_trace():
    optimizer = steps(made(total_steps=100, hold=0.0, end=1.0), 10)
    saved = copy.deepcopy(optimizer.state_dict())
    steps(optimizer, 50)
    optimizer.load_state_dict(saved)
    assert counts(optimizer) == [10, 10]
    assert r(optimizer) == pytest.approx(0.81)


def test_torchs_helpers_for_distributed_checkpoints_carry_the_count():
    models = []
    for _ in range(2):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        groups = askew.param_groups(model, {"*": "2bit"}, pretrained=True, verbose=False)
        models.append((model, askew.AskewSGD(groups, lr=0.1, momentum=0.9, total_steps=10, hold=0.0, end=1.0)))
    for _ in range(5):
        models[0][0](torch.ones(1, 4)).sum().backward()
        models[0][1].step()
    set_optimizer_state_dict(*models[1], get_optimizer_state_dict(*models[0]))
    assert counts(models[1][1]) == [5, 5]
    assert r(models[1][1]) == pytest.approx(0.25)


# Short trainings


def test_steps_that_the_pull_takes_by_hand():
    """Halved 17 times, a distance of 1 is below 2^-16, and the step after that goes all the way."""
    assert settling_steps("capture", 0.5, 0.5) == 18
    assert settling_steps("capture", 1.0, math.inf) == 2
    assert settling_steps("capture", 1.0, 0.25) == 5
    assert settling_steps("capture", 0.25, 0.5) == 40  # 0.75^38 is above 2^-16, 0.75^39 below


@pytest.mark.parametrize(
    ("total", "keywords", "phase"),
    [
        (50, {}, (0.0, 32 / 50)),
        (50, {"pretrained": False}, (0.6 * (32 / 50) / 0.95, 32 / 50)),
        (100, {"hold": 0.3}, (0.3, 82 / 100)),
        (100, {"hold": 0.9}, (0.9, 0.91)),
        (100, {"end": 0.95}, (0.0, 0.95)),
        (36, {}, (0.0, 0.5)),
        (5, {}, (0.0, 0.5)),
        (1, {}, (0.0, 0.5)),
        (359, {}, (0.0, 341 / 359)),
        (360, {}, (0.0, 0.95)),
        (360, {"pretrained": False}, (0.6, 0.95)),
        (100_000, {"pretrained": "packed"}, (0.5, 0.95)),
        (50, {"recovery": None, "alpha": 1.0, "anneal": "interval"}, (0.0, 0.95)),
    ],
    ids=str,
)
def test_phases_of_short_trainings_by_hand(total, keywords, phase):
    group = made(total_steps=total, **keywords).param_groups[0]
    assert (group["hold"], group["end"]) == pytest.approx(phase, abs=1e-12)


def trained(total, quantizer, rule="sgd", dtype=torch.float32, **keywords):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)).to(dtype)
    groups = askew.param_groups(model, {"*": quantizer}, verbose=False, **keywords)
    optimizer = (
        askew.AskewSGD(groups, lr=0.3, momentum=0.9, total_steps=total)
        if rule == "sgd"
        else askew.AskewAdamW(groups, lr=0.02, total_steps=total)
    )
    x, y = torch.randn(32, 32, dtype=dtype), torch.randn(32, 32, dtype=dtype)
    for _ in range(total):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("total", [36, 50, 100, 300])
@pytest.mark.parametrize("quantizer", ["ternary", "2bit", "4bit"])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:.*did not move in the first step")
@pytest.mark.filterwarnings("ignore:annealing. at lr")
def test_short_trainings_end_on_their_levels(total, quantizer, rule, dtype):
    report = trained(total, quantizer, rule, dtype).finalize()
    assert (report.share_on_level, report.max_distance) == (1.0, 0.0)


# finalize() says what it has to move


@pytest.mark.parametrize("total", [50, 400])
def test_a_well_annealed_interval_run_is_silent(total):
    report = trained(total, "ternary", anneal="interval").finalize()
    assert 0 < report.max_distance < 1 / 64


@pytest.mark.parametrize("quantizer", ["ternary", "4bit"])
@pytest.mark.filterwarnings("ignore:annealing. at lr")
def test_a_run_that_is_rounded_by_chance_is_silent(quantizer):
    """Its weights stand on one of the two numbers around their level, for ever."""
    optimizer = trained(300, quantizer, dtype=torch.bfloat16, low_precision="stochastic")
    assert optimizer.finalize().share_on_level < 1


def test_a_run_that_was_cut_short_of_its_levels_is_warned_of():
    optimizer = trained(400, "ternary")
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].mul_(1 + 1 / 32)
    with pytest.warns(
        UserWarning, match=r"finalize: [0-9.]+% .* by up to 0.06.* most in 0.weight \([0-9.]+%, by up to 0.06"
    ):
        optimizer.finalize()
    assert optimizer.finalize().share_on_level == 1


def test_a_layer_that_was_frozen_on_the_way_is_warned_of_by_name():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    optimizer = askew.AskewSGD(askew.param_groups(model, {"*": "ternary"}, verbose=False), lr=0.1, total_steps=60)
    for k in range(60):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(torch.ones(1, 16)), torch.ones(1, 16)).backward()
        if k > 20:
            model[0].weight.grad = None
        optimizer.step()
    with pytest.warns(
        UserWarning, match=r"most in 0.weight \([0-9.]+%, by up to [0-9.]+\). Nothing has to move when"
    ) as caught:
        report = optimizer.finalize()
    assert caught[0].filename == __file__
    assert report.tensors[1].share_on_level == 1


def test_the_best_model_that_was_loaded_at_the_end_is_warned_of():
    optimizer = trained(60, "ternary")
    with torch.no_grad():
        for weight in optimizer.param_groups[0]["params"]:
            weight.copy_(torch.linspace(-0.3, 0.3, weight.numel()).reshape(weight.shape))  # weights of mid-training
    assert optimizer.param_groups[0]["epsilon"] == 0
    with pytest.warns(UserWarning, match="an earlier checkpoint"):
        optimizer.finalize()


def test_a_warning_that_is_an_error_moves_nothing():
    optimizer = made(epsilon=0.0)
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="finalize"):
            optimizer.finalize()
    assert torch.equal(optimizer.param_groups[0]["params"][0], before)


def test_weights_on_their_levels_are_silent_whatever_epsilon_is():
    optimizer = made(quantizers=(askew.Quantizer("ternary", scale=1.0),), epsilon=0.7)
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].copy_(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
    assert optimizer.finalize().share_on_level == 1


def test_the_hints_are_those_of_the_first_tenth():
    assert hints.SOON < 1 / 5  # where an optimizer that anneals itself looks for them
