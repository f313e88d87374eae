"""Anneal and paper(): what epsilon the groups get, and when."""

import itertools
import json
import math
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import askew_cuda as askew
from askew_cuda.anneal import SHAPES, default_phase, epsilon_of, half_width_of
from askew_cuda.paper import paper_epsilon

GOLDEN = json.loads((Path(__file__).parent.parent / "golden.json").read_text())


def optimizer(*quantizers: str, **keywords) -> askew.AskewSGD:
    groups = [{"params": [nn.Parameter(torch.ones(2, 2))], "quantizer": quantizer} for quantizer in quantizers]
    return askew.AskewSGD([*groups, {"params": [nn.Parameter(torch.ones(2))]}], lr=0.1, **keywords)


def widths(annealed: askew.AskewSGD, total: int, **keywords) -> list[float]:
    """r of the first group before each step and after the last."""
    anneal = askew.Anneal(annealed, total_steps=total, **keywords)
    found = [half_width_of(annealed.param_groups[0]["epsilon"])]
    for _ in range(total):
        annealed.step()
        anneal.step()
        found.append(half_width_of(annealed.param_groups[0]["epsilon"]))
    return found


def test_quadratic_by_hand():
    assert widths(optimizer("binary"), 10, hold=0.2, end=0.6) == pytest.approx(
        [1, 1, 1, 0.5625, 0.25, 0.0625, 0, 0, 0, 0, 0], abs=1e-12
    )


def test_the_other_groups_are_left_alone():
    annealed = optimizer("binary")
    widths(annealed, 4, hold=0.0, end=0.5)
    assert [group["epsilon"] for group in annealed.param_groups] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("levels", "pretrained", "phase"),
    [
        (2, False, (0.5, 0.95)),
        (3, False, (0.6, 0.95)),
        (7, False, (0.6, 0.95)),
        (7, True, (0.0, 0.95)),
        (7, "packed", (0.5, 0.95)),
        (8, False, (0.7, 0.9)),
        (256, True, (0.7, 0.9)),
    ],
)
def test_default_phases(levels, pretrained, phase):
    assert default_phase(levels, pretrained) == phase


def test_each_group_has_its_own_default_phase():
    annealed = optimizer("ternary", "4bit")
    anneal = askew.Anneal(annealed, total_steps=1000)
    for _ in range(650):
        anneal.step()
    assert annealed.param_groups[0]["epsilon"] < 1
    assert annealed.param_groups[1]["epsilon"] == 1


@given(st.floats(0, 1))
def test_epsilon_and_half_width_are_inverses(r):
    assert math.isclose(half_width_of(epsilon_of(r)), r, rel_tol=1e-7, abs_tol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fall_from_one_to_zero(shape):
    values = [SHAPES[shape](z / 100) for z in range(101)]
    assert values[0] == pytest.approx(1)
    assert values[-1] == 0
    assert all(a >= b for a, b in itertools.pairwise(values))


def test_a_callable_shape_is_followed_and_checked():
    assert widths(optimizer("binary"), 4, shape=lambda progress: 1 - progress) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    with pytest.raises(ValueError, match=r"shape\(0.0\) = 2"):
        askew.Anneal(optimizer("binary"), total_steps=4, shape=lambda progress: 2)


def test_an_epsilon_tensor_is_filled_in_place():
    epsilon = torch.ones(())
    annealed = optimizer("binary", epsilon=epsilon)
    anneal = askew.Anneal(annealed, total_steps=2, hold=0, end=1)
    anneal.step(), anneal.step()
    assert annealed.param_groups[0]["epsilon"] is epsilon
    assert epsilon == 0


def test_resuming_goes_on_where_it_was():
    first, second = optimizer("2bit"), optimizer("2bit")
    anneal = askew.Anneal(first, total_steps=10, shape="geometric")
    for _ in range(7):
        anneal.step()
    resumed = askew.Anneal(second, total_steps=99)
    resumed.load_state_dict(pickle.loads(pickle.dumps(anneal.state_dict())))
    assert second.param_groups[0]["epsilon"] == first.param_groups[0]["epsilon"]
    anneal.step(), resumed.step()
    assert second.param_groups[0]["epsilon"] == first.param_groups[0]["epsilon"]
    with pytest.raises(ValueError, match="steps_done"):
        resumed.load_state_dict({})


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"total_steps": 0}, ValueError, "total_steps = 0"),
        ({"total_steps": 1.5}, TypeError, "total_steps = 1.5"),
        ({"total_steps": 5, "hold": 0.9, "end": 0.5}, ValueError, "hold = 0.9, end = 0.5"),
        ({"total_steps": 5, "end": 1.5}, ValueError, "end = 1.5"),
        ({"total_steps": 5, "shape": "linear"}, ValueError, "shape = 'linear'"),
    ],
    ids=str,
)
def test_wrong_arguments(keywords, error, message):
    with pytest.raises(error, match=message):
        askew.Anneal(optimizer("binary"), **keywords)


def test_nothing_to_anneal():
    with pytest.raises(ValueError, match="no quantized param group"):
        askew.Anneal(optimizer(), total_steps=5)


def test_stepping_past_the_end_warns_once():
    anneal = askew.Anneal(optimizer("binary"), total_steps=1)
    anneal.step()
    with pytest.warns(UserWarning, match="called 2 times for total_steps = 1"):
        anneal.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        anneal.step()


def test_an_annealing_that_is_never_stepped_warns_once():
    annealed = optimizer("binary")
    anneal = askew.Anneal(annealed, total_steps=10, hold=0.5)
    for _ in range(5):
        annealed.step()
    with pytest.warns(UserWarning, match=r"6 steps and Anneal.step\(\) was never called"):
        annealed.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        annealed.step()
    assert anneal.steps_done == 0


def test_it_gets_along_with_other_step_hooks():
    annealed, seen = optimizer("binary"), []
    anneal = askew.Anneal(annealed, total_steps=10)
    annealed.register_step_post_hook(lambda *_: seen.append(anneal.step()))
    for _ in range(3):
        annealed.step()
    assert (len(seen), anneal.steps_done) == (3, 3)


@pytest.mark.parametrize(
    ("setting", "hold_epochs", "decay", "floor"),
    [("logistic", 50, 0.96, 0.0), ("two_moons", 20, 0.99, 0.0), ("imagenet", 100, 0.95, 16e-6)],
)
def test_the_authors_schedules(setting, hold_epochs, decay, floor):
    for row in GOLDEN["schedules"][setting]:
        wanted = min(1.0, row.get("eps", row.get("eps_normalised")))
        assert math.isclose(paper_epsilon(row["epoch"], hold_epochs, decay, floor), wanted, rel_tol=1e-12)


@pytest.mark.parametrize(("setting", "epochs"), [("binary", 100), ("4bit", 300)])
def test_paper_keywords_work_as_they_are(setting, epochs):
    keywords, anneal_keywords = askew.paper(setting)
    weight = nn.Parameter(torch.linspace(-0.9, 0.9, 64).reshape(8, 8))
    weight.grad = torch.full_like(weight, 0.01)
    annealed = askew.AskewSGD([weight], lr=0.1, momentum=0.9, pretrained=True, **keywords)
    anneal = askew.Anneal(annealed, total_steps=epochs * 2, **anneal_keywords)
    seen = []
    for _ in range(epochs * 2):
        seen.append(annealed.param_groups[0]["epsilon"])
        annealed.step()
        anneal.step()
    hold, decay, floor = (50, 0.96, 0.0) if setting == "binary" else (100, 0.95, 16e-6)
    assert seen[::2] == pytest.approx([paper_epsilon(epoch, hold, decay, floor) for epoch in range(epochs)], rel=1e-6)
    with pytest.raises(ValueError, match="'8bit'; 'binary' or '4bit'"):
        askew.paper("8bit")


# On optimizers that have begun already, and on wrappers of them


def wide(epsilon: float | torch.Tensor = 1.0, *quantizers: str) -> askew.AskewSGD:
    """An optimizer of two groups, whose phases differ."""
    annealed = optimizer(*(quantizers or ("ternary", "4bit")), pretrained=False)
    for group in annealed.param_groups:
        group["params"][0].grad = torch.zeros_like(group["params"][0])
        group["epsilon"] = epsilon if group["quantizer"] else 1.0
    return annealed


@pytest.mark.parametrize("shape", [*SHAPES, lambda progress: min(1.0, 1.5 - progress) ** 3])
@pytest.mark.parametrize("made", [1, 620, 800, 940])
def test_it_goes_on_from_where_the_optimizer_is(shape, made):
    first, second = wide(), wide()
    anneal = askew.Anneal(first, total_steps=1000, shape=shape)
    for _ in range(made):
        anneal.step()
    second.load_state_dict(first.state_dict())
    again = askew.Anneal(second, total_steps=1000, shape=shape)
    assert again.steps_done == (made if made > 600 else 0)  # while epsilon is 1, nothing tells the step
    for a, b in zip(first.param_groups, second.param_groups, strict=True):
        assert a["epsilon"] == b["epsilon"]


def test_a_half_annealed_optimizer_is_not_set_back_to_1():
    annealed = wide(0.3, "2bit")
    anneal = askew.Anneal(annealed, total_steps=1000)
    z = 1 - half_width_of(0.3) ** 0.5
    assert anneal.steps_done == math.ceil(1000 * (0.6 + 0.35 * z))
    assert annealed.param_groups[0]["epsilon"] == pytest.approx(0.3, rel=0.02)


def test_an_annealing_that_is_over_is_said_to_be():
    with pytest.warns(UserWarning, match=r"epsilon is 0 already: .* set group\['epsilon'\] = 1.0"):
        anneal = askew.Anneal(wide(0.0), total_steps=1000)
    assert anneal.steps_done == 950


def test_a_checkpoint_that_is_loaded_afterwards_is_followed():
    """Unless its epsilon says no more than the count does: in the hold it is 1 at every step."""
    annealed = wide(1.0, "2bit")
    anneal = askew.Anneal(annealed, total_steps=1000)
    for _ in range(800):
        anneal.step()
    saved, epsilon = annealed.state_dict(), annealed.param_groups[0]["epsilon"]
    fresh = wide(1.0, "2bit")
    other = askew.Anneal(fresh, total_steps=1000)
    other.step()
    fresh.load_state_dict(saved)
    assert (other.steps_done, fresh.param_groups[0]["epsilon"]) == (800, epsilon)
    other.step()
    assert fresh.param_groups[0]["epsilon"] < epsilon
    held = wide(1.0, "2bit")
    third = askew.Anneal(held, total_steps=1000)
    for _ in range(300):
        third.step()
    held.load_state_dict(held.state_dict())
    assert third.steps_done == 300


def test_a_learning_rate_finder_is_not_an_annealing_that_was_forgotten():
    annealed = wide(1.0, "binary")
    anneal = askew.Anneal(annealed, total_steps=200, hold=0.5)
    saved = annealed.state_dict()
    for _ in range(100):
        annealed.step()
    annealed.load_state_dict(saved)
    for _ in range(100):
        annealed.step()
    with pytest.warns(UserWarning, match=r"101 steps and Anneal.step\(\) was never called"):
        annealed.step()
    assert anneal.steps_done == 0


def test_short_trainings_end_their_annealing_earlier():
    annealed = wide(1.0, "binary")
    anneal = askew.Anneal(annealed, total_steps=50)
    for _ in range(32):
        anneal.step()
    assert annealed.param_groups[0]["epsilon"] == 0.0


class Wrapper(torch.optim.Optimizer):
    """As accelerate's: the groups are those of the optimizer inside."""

    def __init__(self, inner: torch.optim.Optimizer):
        self.optimizer = inner

    @property
    def param_groups(self):
        return self.optimizer.param_groups


class Sharding(torch.optim.Optimizer):
    """As ZeRO: groups of its own, which it copies to those inside before a step and back after it."""

    def __init__(self, inner: torch.optim.Optimizer):
        super().__init__([dict(group) for group in inner.param_groups], {})
        self.optim = inner

    def step(self, closure=None):
        for mine, theirs in zip(self.param_groups, self.optim.param_groups, strict=True):
            theirs.update({key: value for key, value in mine.items() if key != "params"})
        self.optim.step()
        for mine, theirs in zip(self.param_groups, self.optim.param_groups, strict=True):
            mine.update({key: value for key, value in theirs.items() if key != "params"})


@pytest.mark.parametrize("wrap", [Wrapper, Sharding, lambda inner: Wrapper(Sharding(inner))])
def test_wrappers_are_taken(wrap):
    inner = wide(1.0, "2bit")
    wrapped = wrap(inner)
    anneal = askew.Anneal(wrapped, total_steps=10, hold=0.0, end=1.0)
    for k in range(10):
        assert inner.param_groups[0]["epsilon"] == pytest.approx(epsilon_of((1 - k / 10) ** 2))
        unwrapped = wrapped.optimizer if isinstance(wrapped, Wrapper) else wrapped
        unwrapped.step()
        anneal.step()
    assert anneal.optimizer is wrapped
    assert inner.param_groups[0]["epsilon"] == 0.0


def test_an_optimizer_that_anneals_itself_does_so_inside_of_a_wrapper():
    inner = wide(1.0, "2bit")
    for group in inner.param_groups:
        group.update(total_steps=10, hold=0.0, end=1.0)
    wrapped = Sharding(inner)
    for _ in range(5):
        wrapped.step()
    assert [group["steps_done"] for group in (*inner.param_groups, *wrapped.param_groups)] == [5] * 4
    assert half_width_of(wrapped.param_groups[0]["epsilon"]) == pytest.approx(0.25)


@pytest.mark.parametrize("wrap", [Wrapper, Sharding])
def test_the_monitor_and_packing_take_wrappers(wrap, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    inner = askew.AskewSGD(askew.param_groups(model, {"*": "ternary"}, verbose=False), lr=0.1)
    wrapped = wrap(inner)
    watch = askew.monitor(wrapped, every=1)
    model(torch.ones(1, 4)).sum().backward()
    inner.step()
    assert watch.steps == 1
    askew.save_packed(model, wrapped, tmp_path / "model.safetensors")
    packed = askew.pack_modules(model, wrapped)
    fresh = nn.Sequential(nn.Linear(4, 4))
    askew.load_packed(tmp_path / "model.safetensors", fresh)
    assert torch.equal(packed[0].weight, fresh[0].weight)


def test_paper_keywords_go_to_an_optimizer_that_anneals_itself():
    keywords, annealing = askew.paper("binary", epochs=10, hold_epochs=4, decay=0.5)
    weight = nn.Parameter(torch.linspace(-0.9, 0.9, 64).reshape(8, 8))
    weight.grad = torch.full_like(weight, 0.01)
    annealed, seen = askew.AskewSGD([weight], lr=0.1, pretrained=True, **keywords, **annealing, total_steps=20), []
    for _ in range(20):
        seen.append(annealed.param_groups[0]["epsilon"])
        annealed.step()
    assert seen[::2] == pytest.approx([paper_epsilon(epoch, 4, 0.5) for epoch in range(10)])
    assert annealed.state_dict()["param_groups"][0]["shape"] == "callable"
