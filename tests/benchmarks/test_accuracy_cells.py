"""Cells of the accuracy table: what is measured, what is kept, and what is measured anew."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("psutil", reason="the benchmarks' extra is not installed: pip install '.[bench]'")
pytest.importorskip("sklearn", reason="the benchmarks' extra is not installed: pip install '.[bench]'")

from benchmarks.accuracy import cells, loop, store, tasks
from benchmarks.accuracy.loop import FULL, Plan, Setting
from benchmarks.accuracy.methods.latent import StraightThrough
from benchmarks.accuracy.methods.method import WIDTHS, Base
from benchmarks.accuracy.methods.ours import Ours
from benchmarks.accuracy.methods.registry import METHODS
from benchmarks.accuracy.score_tables import FLOAT, OURS, PEERS
from tests.benchmarks.small_tasks import small
from tests.cases import EXTENSION


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """A campaign of two seeds, the small task in place of digits-16, and what was trained by which seeds."""
    seen, real = [], loop.train_networks

    def spy(plan, setting, seeds, *, tuning, state=None):
        seen.append((plan.method.name, setting.base.lr, tuple(seeds), tuning, state is not None))
        return real(plan, setting, seeds, tuning=tuning, state=state)

    monkeypatch.setattr(loop, "train_networks", spy)
    monkeypatch.setitem(tasks.TASKS, "digits-16", small())
    return cells.Campaign(tmp_path / "cells", tmp_path / "networks", seeds=(0, 1)), seen


def test_a_cell_is_tuned_on_tuning_seeds_only_and_measured_once(watched):
    campaign, seen = watched
    plan = Plan(small(), "scratch", "ternary", StraightThrough())
    cell = cells.measure(plan, campaign)
    assert seen == [
        ("STE", 0.001, (1000, 1001), True, False),
        ("STE", 0.1, (1000, 1001), True, False),
        ("STE", 0.1, (0, 1), False, False),
    ]
    assert (cell["chosen"]["base"]["lr"], len(cell["scores"]), len(cell["tried"])) == (0.1, 2, 2)
    assert cells.measure(plan, campaign) == cell == store.read(campaign.folder)[cells.key(plan)]
    assert len(seen) == 3
    assert [each.name for each in campaign.folder.iterdir()] == ["digits-16.jsonl"]


def test_a_grid_that_grew_costs_what_is_new_and_a_new_winner_is_reported(watched):
    campaign, seen = watched
    task = small()
    cells.measure(Plan(task, "scratch", "ternary", StraightThrough()), campaign)
    del seen[:]
    wider = dataclasses.replace(task, bases=(*task.bases, Base("sgd", 1e-4)))
    plan = Plan(wider, "scratch", "ternary", StraightThrough())
    assert cells.done(plan, campaign) is None
    cell = cells.measure(plan, campaign)
    assert seen == [("STE", 1e-4, (1000, 1001), True, False)]  # it lost: what was reported stands
    assert (cell["chosen"]["base"]["lr"], len(cell["tried"])) == (0.1, 3)
    assert cells.done(plan, campaign) == cell
    del seen[:]
    more = dataclasses.replace(campaign, seeds=(0, 1, 2))
    assert cells.done(plan, more) is None
    longer = cells.measure(plan, more)
    assert seen == [("STE", 0.1, (2,), False, False)]  # seeds that came are added
    assert (longer["seeds"], longer["scores"][:2], len(longer["scores"])) == ([0, 1, 2], cell["scores"], 3)
    del seen[:]
    other = Plan(dataclasses.replace(task, bases=(task.bases[0],)), "scratch", "ternary", StraightThrough())
    narrower = cells.measure(other, campaign)
    assert seen == [("STE", 0.001, (0, 1), False, False)]  # and another winner is measured on all
    assert (narrower["chosen"]["base"]["lr"], len(narrower["tried"])) == (0.001, 1)


@pytest.mark.skipif(EXTENSION is None, reason="the compiled extension is not built")
def test_fine_tuning_starts_from_full_precision_and_ours_tries_nothing(watched):
    campaign, seen = watched
    cell = cells.measure(Plan(small(), "fine-tuned", "4bit", Ours("askew_cuda")), campaign)
    assert [each[2:4] for each in seen if each[0] == "askew_cuda"] == [((0, 1), False)] * 3
    assert [each[4] for each in seen if each[0] == "askew_cuda"] == [True] * 3
    assert sorted(cell["robustness"]) == ["0.3", "1", "3"]
    assert cell["robustness"]["1"] == cell["scores"]
    assert cell["tried"] == []
    full = store.read(campaign.folder)["digits-16", "scratch", FULL, "full precision"]
    assert full["chosen"]["base"]["lr"] == 0.1
    before = len(seen)
    cells.measure(Plan(small(), "fine-tuned", "2bit", Ours("askew_cuda")), campaign)
    assert len(seen) == before + 3  # the network to start from is kept
    plan = Plan(small(), "fine-tuned", "2bit", Ours("askew_cuda"))
    assert cells.done(plan, campaign)["origin"] == full["chosen"]
    full["chosen"]["base"]["lr"] = 0.001
    store.put(campaign.folder, full)
    assert cells.done(plan, campaign) is None  # other networks are fine-tuned now
    del seen[:]
    cells.measure(plan, campaign)
    assert seen[0][:2] == ("full precision", 0.001)
    assert cells.done(plan, campaign)["origin"] == full["chosen"]


def test_networks_to_start_from_are_found_again_by_other_processes():
    code = (
        "from benchmarks.accuracy import cells, loop, tasks; from benchmarks.accuracy.methods.method import Base; "
        "print(cells.fingerprint(tasks.TASKS['cnn'], loop.Setting(Base('sgd', {lr})), (0, 1), True))"
    )
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    here = [cells.fingerprint(tasks.TASKS["cnn"], Setting(Base("sgd", lr)), (0, 1), True) for lr in (0.1, 0.2)]
    assert run([sys.executable, "-c", code.format(lr=0.1)]).stdout.split() == here[:1]
    assert here[0] != here[1]


def test_every_cell_has_a_key_of_its_own():
    every = [cells.key(plan) for plan in cells.plans(list(tasks.TASKS), tasks.STARTS, WIDTHS, cells.names())]
    assert len(every) == len(set(every))
    for task in tasks.EVERY_TASK:
        methods = [each for each in METHODS if task.peers is None or each.name in {*task.peers, FLOAT, OURS}]
        count = sum(len(cells.widths_of(method)) for method in methods)
        assert sum(key[0] == task.name for key in every) == len(task.starts) * count
        assert set(task.peers or ()) <= set(PEERS)


def test_a_pretrained_network_is_trained_for_the_whole_budget_as_the_task_makes_it(watched, monkeypatch):
    campaign, seen = watched
    task, told = small(starts=("pretrained",)), []
    monkeypatch.setitem(tasks.TASKS, "digits-16", task)
    method = StraightThrough()
    real = method.begin
    method.begin = lambda *given, **more: told.append(more) or real(*given, **more)
    cell = cells.measure(Plan(task, "pretrained", "ternary", method), campaign)
    assert [each[4] for each in seen] == [False] * 3  # from no state of full precision
    assert (cell["origin"], cell["budget"]) == (None, task.length)
    assert {each["pretrained"] for each in told} == {True}


def test_a_cell_is_plain_json(watched):
    campaign, _ = watched
    cell = cells.measure(Plan(small(), "scratch", "binary", StraightThrough()), campaign)
    assert json.loads(json.dumps(cell)) == cell
