"""Faults: what goes wrong leaves the state from before, or the one from after, never one between."""

import copy
import itertools
import math
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import askew_cuda as askew
from askew_cuda import optimizer

LIBRARY = str(Path(optimizer.__file__).parent)
RULES = {
    "sgd": (askew.AskewSGD, {"lr": 0.1}),
    "dampening": (askew.AskewSGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "amsgrad": (askew.AskewAdamW, {"lr": 0.02, "amsgrad": True}),
}
rules = pytest.mark.parametrize("rule", RULES)


def made(rule: str, rounds: tuple[str, Any] = ("nearest", 0), **more):
    """Two groups and two dtypes make three calls of the operator. The same numbers each time. rounds: low_precision and
    seed of the first group, for b.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(2, 3, generator=generator)) for _ in range(3)]
    weights[1] = nn.Parameter(weights[1].detach().bfloat16())
    ours, keywords = RULES[rule]
    groups = [
        {
            "params": [("a", weights[0]), ("b", weights[1])],
            "quantizer": "ternary/channel",
            "outputs": ["codes", "snapped"],
            "low_precision": rounds[0],
            "seed": copy.deepcopy(rounds[1]),
        },
        {"params": [("c", weights[2])], "quantizer": None},
    ]
    return ours(groups, pretrained=True, **keywords, **more), weights


def fill(weights, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)


def everything(optimizer, weights) -> list:
    """An exact copy of all values. Buffers for outputs are no part of the state."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return (value.dtype, value.tolist())
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value

    return plain(
        [
            weights,
            optimizer.state_dict(),
            [weight in optimizer._stepped for weight in weights],
            optimizer._quantized_depth,
        ]
    )


@rules
@pytest.mark.parametrize("anneal", ["capture", "interval"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("first", "many"), [(True, False), (True, True), (False, False), (False, True)])
def test_bad_gradients_stay_with_their_weights(rule, anneal, bad, first, many):
    """One or many, in the first step or later: all other weights and moments go on as if nothing had happened."""
    (clean, weights), (hit, others) = made(rule, anneal=anneal, epsilon=0.3), made(rule, anneal=anneal, epsilon=0.3)
    spoilt = torch.tensor([[True, False, many], [False, many, False]])
    for k in range(4):
        fill(weights, k), fill(others, k)
        if k == (0 if first else 2):
            for weight in others:
                weight.grad[spoilt] = bad
        clean.step(), hit.step()
    for weight, other in zip(weights, others, strict=True):
        assert torch.equal(weight[~spoilt], other[~spoilt])
        assert other[~spoilt].isfinite().all()
        for key, value in clean.state[weight].items():
            kept = hit.state[other][key]
            assert (
                torch.equal(value[~spoilt], kept[~spoilt]) if value.shape == weight.shape else torch.equal(value, kept)
            )
        if math.isnan(bad):
            assert other[spoilt].isnan().all()


def stepped(rule, backend, done, **more):
    optimizer, weights = made(rule, backend=backend, **more)
    for k in range(done):
        fill(weights, k)
        optimizer.step()
    fill(weights, done)
    if "total_steps" not in more:
        for group in optimizer.param_groups:
            group["epsilon"] = 0.0
    return optimizer, weights


pytestmark = pytest.mark.filterwarnings("ignore:finalize")  # these runs are not annealed to their end

LATER = stepped("dampening", "auto", 2)[0].state_dict()


def snap_for_a_while(optimizer) -> None:
    with optimizer.quantized():
        pass


ACTIONS = {
    "step": lambda optimizer: optimizer.step(),
    "quantized": snap_for_a_while,
    "finalize": lambda optimizer: optimizer.finalize(),
    "prepare": lambda optimizer: optimizer.prepare(),
    "load": lambda optimizer: optimizer.load_state_dict(LATER),
}


class Counted(TorchDispatchMode):
    """Notes every operation of torch by name, and the one with a given number finds no memory. What writes into memory
    that is there already needs none.
    """

    def __init__(self, fails: int = -1):
        super().__init__()
        self.fails, self.names = fails, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.names.append(str(func) + (" checks" if kwargs.get("found_inf") is not None else ""))
        if len(self.names) == self.fails and not self.names[-1].startswith(("aten.copy_", "askew_cuda.")):
            raise torch.OutOfMemoryError(f"no memory for {func}")
        return func(*args, **kwargs)


def is_call(name: str) -> bool:
    return name.startswith(("askew_cuda.sgd_", "askew_cuda.adamw_")) and not name.endswith("checks")


@pytest.mark.parametrize(
    ("name", "rule", "done"),
    [
        *(("step", rule, done) for rule in RULES for done in (0, 2)),
        *((name, "dampening", 0) for name in ("quantized", "finalize", "prepare", "load")),
    ],
)
def test_no_memory_at_any_point(name, rule, done):
    """Every operation fails once: nothing has happened, and the next attempt does all of it."""
    action = ACTIONS[name]
    optimizer, weights = stepped(rule, "auto", done)
    action(optimizer)
    whole, failures = everything(optimizer, weights), 0
    for fails in itertools.count(1):
        optimizer, weights = stepped(rule, "auto", done)
        before, counted = everything(optimizer, weights), Counted(fails)
        try:
            with counted:
                action(optimizer)
        except torch.OutOfMemoryError:
            failures += 1
            if everything(optimizer, weights) != whole:  # torch's profiler has an operation after the step
                assert everything(optimizer, weights) == before
                action(optimizer)
        assert everything(optimizer, weights) == whole
        if len(counted.names) < fails:
            break
    assert failures > 3


@rules
@pytest.mark.parametrize("done", [0, 2])
def test_nothing_is_allocated_and_nothing_checked_between_the_first_call_and_the_last(rule, done):
    optimizer, weights = made(rule)
    for k in range(done + 1):
        fill(weights, k)
        counted = Counted()
        with counted:
            optimizer.step()
    calls = [i for i, name in enumerate(counted.names) if is_call(name)]
    assert calls == list(range(calls[0], calls[0] + 3))


def wrong_scale(optimizer, weights) -> None:
    optimizer.state[weights[0]]["scale"] = torch.ones(3, 1)


def wrong_momentum(optimizer, weights) -> None:
    optimizer.param_groups[1]["weight_decay"] = "much"


@rules
@pytest.mark.parametrize("change", [wrong_scale, wrong_momentum])
def test_what_a_call_refuses_stops_all_calls(rule, change):
    """A setting or a scale that the user changed, in one of several groups: found before the first weight moves."""
    optimizer, weights = made(rule)
    fill(weights, 0)
    optimizer.step()
    change(optimizer, weights)
    before = everything(optimizer, weights)
    with pytest.raises((ValueError, TypeError)):
        optimizer.step()
    assert everything(optimizer, weights) == before


class Interrupt:
    """Ctrl-C at the n-th line that Python executes in the library."""

    def __init__(self, at: int):
        self.at, self.line = at, 0

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(LIBRARY):
            return None
        if event == "line":
            self.line += 1
            if self.line == self.at:
                signal.raise_signal(signal.SIGINT)
        return self

    def __enter__(self):
        sys.settrace(self)

    def __exit__(self, *exception) -> None:
        sys.settrace(None)


def interrupted(action, at: int) -> bool:
    """Whether Ctrl-C came while the action ran; it must not be swallowed. On return nothing holds on to its frames."""
    interrupt = Interrupt(at)
    try:
        with interrupt:
            action()
    except KeyboardInterrupt:
        return True
    assert interrupt.line < at, "Ctrl-C was swallowed"
    return False


@pytest.fixture
def ctrl_c_raises():
    """As in a terminal. A shell starts what runs in its background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


untraced = pytest.mark.skipif(
    sys.gettrace() is not None, reason="a debugger or coverage traces this run; the test needs sys.settrace"
)


@untraced
@pytest.mark.parametrize(
    ("name", "backend", "done"),
    [
        *(("step", "auto", 0), ("step", "auto", 2), ("step", "reference", 1), ("prepare", "auto", 0)),
        *(("load", "auto", 0), ("quantized", "auto", 1), ("finalize", "auto", 0)),
    ],
)
def test_ctrl_c_at_any_line(name, backend, done, ctrl_c_raises):
    """Before or after, never between; and the next attempt does all of it."""
    everywhere(ACTIONS[name], lambda: stepped("dampening", backend, done), 5 if backend == "reference" else 1)


COUNTED = {
    "numbers": {"rounds": ("stochastic", 7)},
    "tensors": {"rounds": ("stochastic", torch.tensor(7)), "epsilon": torch.tensor(1.0)},
    "remainders": {"rounds": ("remainder", 0)},
}


@untraced
@pytest.mark.parametrize("rule", ["sgd", "amsgrad"])
@pytest.mark.parametrize("counted", COUNTED)
@pytest.mark.parametrize(("backend", "done", "every"), [("auto", 0, 11), ("auto", 2, 1), ("reference", 1, 37)])
@pytest.mark.filterwarnings("ignore:.*did not move in the first step")
def test_ctrl_c_leaves_no_count_behind(rule, counted, backend, done, every, ctrl_c_raises):
    """Counts, epsilon and seeds belong to the step: where a plan is kept, where it is new, and without any."""

    def start():
        return stepped(rule, backend, done, total_steps=9, hold=0.0, **copy.deepcopy(COUNTED[counted]))

    optimizer, _ = start()
    assert (optimizer._plan is not None) == (backend == "auto" and done > 0)
    everywhere(ACTIONS["step"], start, every)


def everywhere(action, start, every: int) -> None:
    """Interrupts an action at every such line: nothing has happened, or all of it."""
    optimizer, weights = start()
    states = [everything(optimizer, weights)]
    action(optimizer)
    states.append(everything(optimizer, weights))
    counts = [[group["steps_done"] for group in state[1]["param_groups"]] for state in states]
    assert counts[0] == counts[1] or [count + 1 for count in counts[0]] == counts[1]
    seen = set()
    for at in itertools.count(1, every):
        optimizer, weights = start()
        if not interrupted(lambda optimizer=optimizer: action(optimizer), at):
            break
        state = everything(optimizer, weights)
        for i, wanted in enumerate(states):
            if state == wanted:
                seen.add(i)
                break
        else:
            pytest.fail(f"between, at line event {at}")
        action(optimizer)
    assert seen == ({0, 1} if states[0] != states[1] else {0})
    assert at > 20
