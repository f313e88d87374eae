"""The benchmarks' own arithmetic, and that what they time does the work that they say. Nothing is timed here."""

import contextlib
import dataclasses
import gc
import json
import types
import weakref

import pytest
import torch
from torch import nn

pytest.importorskip("scipy", reason="the benchmarks' extra is not installed: pip install '.[bench]'")
pytest.importorskip("psutil", reason="the benchmarks' extra is not installed: pip install '.[bench]'")

import askew_cuda as askew
from benchmarks import machine, results
from benchmarks.speed import harness, instructions, script, section, tensors, timing_tables, workloads
from benchmarks.speed.harness import COPY, Variant
from benchmarks.speed.peers import binary_relax_eager, straight_through
from tests.cases import EXTENSION

CPU = torch.device("cpu")
needs_extension = pytest.mark.skipif(EXTENSION is None, reason="the compiled extension is not built")


def test_ratios_are_paired_and_rates_are_shares_of_the_copys():
    """By a clock that drifts: each round takes twice as long as the one before, and ratios don't feel it."""
    seconds = {"base": 2.0, "twice": 4.0, COPY: 1.0}
    calls = {name: 0 for name in seconds}

    def clock(run, count):
        name = run()
        calls[name] += 1
        return seconds[name] * 2 ** calls[name] * count

    variants = {"base": Variant(lambda: "base"), "twice": Variant(lambda: "twice", 16), COPY: Variant(lambda: COPY, 8)}
    found = {each.name: each for each in harness.compare(variants, baseline="base", rounds=5, calls=3, clock=clock)}
    assert calls == dict.fromkeys(seconds, 6)  # one round is not counted
    assert found["twice"].ratio == (2.0, 2.0, 2.0)
    assert found["twice"].interval == (2.0, 2.0)
    assert found["twice"].share == 0.5  # twice the bytes in four times the time
    assert found["twice"].seconds == (64.0, 32.0, 128.0)  # 16, 32, 64, 128, 256
    assert found["base"].share is None


def test_an_interval_holds_the_median_and_narrows_with_more_rounds():
    generator = torch.Generator().manual_seed(0)
    widths = []
    for count in (10, 1000):
        values = (1 + 0.1 * torch.rand(count, generator=generator)).tolist()
        low, high = harness.bootstrap_interval(values)
        assert min(values) <= low <= harness.quartiles(values)[0] <= high <= max(values)
        widths.append(high - low)
    assert widths[1] < widths[0]


def test_operators_are_counted():
    x = torch.ones(3)
    assert harness.launches(lambda: x.add_(1).mul_(2), CPU) == 2


def test_the_peak_of_a_call_is_seen():
    size = 2**26  # the C library takes so much from the system, and gives it back

    def run():
        torch.ones(size // 4).mul_(2)

    before = harness.held_memory(CPU)
    assert 0.9 * size < harness.peak_memory(run, CPU) - before < 1.5 * size


@needs_extension
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_the_variants_of_a_rule_do_the_same_step(rule):
    moved = []
    for make in (lambda t: t.torch_fused(), lambda t: t.torch_foreach(), lambda t: t.ours("cpu", levels=())):
        operands = workloads.Tensors(rule, 1000, torch.float64, CPU)
        before = operands.weight.clone()
        make(operands).run()
        assert not torch.equal(operands.weight, before)
        moved.append(operands.weight)
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(moved[0], moved[2], rtol=0, atol=1e-6)


@needs_extension
def test_bytes_are_counted():
    operands = workloads.Tensors("sgd", 4096, torch.float32, CPU)
    assert operands.copy().bytes == operands.negation().bytes == 20 * 4096
    assert operands.torch_fused().bytes == 20 * 4096
    assert operands.ours("cpu", codes=True, snapped=torch.bfloat16).bytes == 23 * 4096 + 4
    assert operands.ours("cpu", granularity=128).bytes == 20 * 4096 + 4 * 32
    assert workloads.Tensors("adamw", 4096, torch.bfloat16, CPU).ours("cpu").bytes == 14 * 4096 + 4


def test_binary_relax_ends_on_levels_and_begins_at_the_latent_weight():
    weight = torch.linspace(-0.203, 0.2, 101)
    latent, buffer = binary_relax_eager.first_state(weight)
    settings = {"lr": 0.0, "momentum": 0.9}
    binary_relax_eager.step(weight, torch.ones(101), latent, buffer, 0.02, strength=0.0, **settings)
    assert torch.equal(weight, latent)
    binary_relax_eager.step(weight, torch.ones(101), latent, buffer, 0.02, strength=1e9, **settings)
    levels = torch.tensor(askew.Codebook.uniform(4).levels) * 0.02
    torch.testing.assert_close(weight, levels[(latent[:, None] - levels).abs().argmin(1)], rtol=0, atol=1e-6)


def test_straight_through_moves_the_latent_weight_by_the_gradient_of_the_rounded_one():
    weight = nn.Parameter(torch.tensor([0.013, -0.05]))
    weight.grad = torch.tensor([1.0, 2.0])
    straight_through.make_step([weight], 0.02, torch.optim.SGD([weight], lr=0.01))()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.003, -0.07]))


def test_a_peer_that_fails_is_named_and_ours_may_not():
    def broken(parameters):
        raise RuntimeError("no such processor")

    parameters = lambda: [workloads.parameter(64, CPU)]  # noqa: E731
    variants, absent = workloads.build({"peer": broken}, parameters)
    assert (variants, absent) == ({}, {"peer": "no such processor"})
    with pytest.raises(RuntimeError, match="no such processor"):
        workloads.build({"AskewSGD": broken}, parameters)


def test_kinds_of_instructions():
    kinds = {
        "vmulps %zmm1,%zmm2,%zmm3": "vector",
        "vmovups (%rax),%zmm1": "memory",
        "prefetcht0 0x200(%rax)": "prefetch",
        "add $0x40,%rax": "other",
    }
    assert {text: instructions.kind(text) for text in kinds} == kinds


def test_short_and_full():
    short = script.Effort(False, CPU)
    assert (short.pick(1, 2), dataclasses.replace(short, full=True).pick(1, 2)) == (1, 2)


def test_what_was_measured_is_saved_section_by_section(monkeypatch, tmp_path):
    """A benchmark that is stopped leaves what it has found."""

    def measure(effort):
        for title in ("first", "second"):
            yield section.Section(title, {}, "base", [], memory={"base": {"peak": 1.0}})
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["tried", "--save", str(tmp_path), "--device", "cpu"])
    with pytest.raises(KeyboardInterrupt):
        script.main("tried", measure, "Nothing.")
    assert [path.name for path in tmp_path.iterdir()] == ["tried-cpu.json"]
    found = json.loads((tmp_path / "tried-cpu.json").read_text())
    assert [each["title"] for each in found["sections"]] == ["first", "second"]


def test_without_git_the_commit_is_what_we_are_told(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("ASKEW_COMMIT", "abc")
    assert machine._commit() == "abc"
    monkeypatch.delenv("ASKEW_COMMIT")
    assert machine._commit() == "unknown"


@needs_extension
def test_steps_in_two_groups_move_every_tensor():
    for make in tensors.two_groups().values():
        parameters = tensors.tiny(5, CPU)
        before = [each.detach().clone() for each in parameters]
        make(parameters)()
        assert not any(torch.equal(old, new) for old, new in zip(before, parameters, strict=True))


@needs_extension
def test_a_captured_graph_keeps_what_its_replays_read_and_write(monkeypatch):
    """By a capture that records nothing: what is looked at is who holds the weights."""
    weights = []

    def small(count, device, real=tensors.small):
        made = real(count, device)
        weights.extend(weakref.ref(each) for each in made)
        return made

    monkeypatch.setattr(tensors, "small", small)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name in ("graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    variants = tensors.graphs(2, CPU)
    gc.collect()
    assert len(weights) == 2 * len(variants)
    assert all(weight() is not None for weight in weights)
    variants.clear()
    gc.collect()
    assert all(weight() is None for weight in weights)


def test_tiny_tensors_are_shown_where_they_were_measured(monkeypatch):
    timing = {"name": "torch", "seconds": [0.001, 0.001, 0.001], "ratio": [1, 1, 1], "interval": [1, 1]}
    two_groups = {**timing, "name": "torch, 2 groups"}

    def measured(title, count, *timings):
        about = {"tensors": count, "threads": 1}
        return {"title": title, "about": about, "timings": timings, "launches": {"torch": 7}, "absent": {}}

    environment = {"processor": "a", "cores": 2, "cpu_kernel": "", "torch": "2", "commit": "0" * 40, "date": "today"}
    data = {"environment": environment, "sections": [measured(section.HOST_TIME, 1, timing)]}
    data["sections"].append(measured(section.HOST_TIME, 4, timing, two_groups))
    monkeypatch.setattr(results, "load", lambda name: data)
    table = timing_tables.tensors_table()
    assert "| torch | 1.00: 1 | 1.00: 1 | 7 |\n| torch, 2 groups | - | 1.00: 1 | - |" in table
    assert "tiny" not in table
    data["sections"].append(measured(section.HOST_TIME_TINY, 4, timing))
    assert "| tiny tensors, 1 thread | 4 | launches, 4 |" in timing_tables.tensors_table()
