"""torch.compile: one graph for a step, and the same one while learning rate and annealing change."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import askew_cuda as askew
from askew_cuda import backends
from tests import cases

pytestmark = [
    pytest.mark.skipif(backends.extension is None, reason="the compiled extension is not built"),
    # torch's own, from inside of its compiler
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]
RULES = {
    "momentum": (askew.AskewSGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "dampening": (askew.AskewSGD, {"momentum": 0.9, "dampening": 0.5}),
    "amsgrad": (askew.AskewAdamW, {"amsgrad": True}),
}
rules = pytest.mark.parametrize("rule", RULES)
backends = pytest.mark.parametrize("backend", ["eager", "aot_eager"])
STEPS = 8


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(rule: str, lr: float | torch.Tensor, epsilon: float | torch.Tensor):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    ours, keywords = RULES[rule]
    groups = askew.param_groups(model, {"*": "ternary/channel"}, pretrained=True, outputs=["codes"], verbose=False)
    optimizer = ours(groups, lr=lr, epsilon=epsilon, **keywords)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    return model, optimizer, schedule, askew.Anneal(optimizer, STEPS, hold=0.0, end=0.75)


def tensors() -> dict[str, torch.Tensor]:
    return {"lr": torch.tensor(0.1), "epsilon": torch.tensor(1.0)}


def train(model, optimizer, schedule, anneal, *, forward, step) -> None:
    """The training loop that a user writes."""
    for k in range(STEPS):
        optimizer.zero_grad()
        forward(model, torch.linspace(-1, 1, 12).reshape(3, 4) + k).backward()
        step(optimizer)
        schedule.step()
        anneal.step()


def loss(model, x):
    return model(x).square().sum()


def own_step(optimizer) -> None:
    """The library's step, without torch's wrapper for hooks and profiler, which breaks every graph."""
    type(optimizer).step.__wrapped__(optimizer)


def assert_same(trained, wanted) -> None:
    for weight, other in zip(trained[0].parameters(), wanted[0].parameters(), strict=True):
        assert torch.equal(weight, other)
        state, other_state = trained[1].state[weight], wanted[1].state[other]
        assert state.keys() == other_state.keys()
        assert all(torch.equal(value, other_state[key]) for key, value in state.items())


@rules
@backends
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # it counts the calls of torch's wrapper
def test_a_training_step_is_two_graphs_for_ever(rule, backend):
    """Forward, and the step; no break in either, no new one while lr and epsilon fall, and the numbers are those of
    eager mode.
    """
    eager, trained = made(rule, **tensors()), made(rule, **tensors())
    train(*eager, forward=loss, step=own_step)
    forward, step = (CompileCounterWithBackend(backend) for _ in range(2))
    compiled_forward = torch.compile(loss, backend=forward, fullgraph=True)
    compiled_step = torch.compile(own_step, backend=step, fullgraph=True)
    # the first step, which makes scales and moments, is not compiled
    steps = iter([own_step] + [compiled_step] * (STEPS - 1))
    train(*trained, forward=compiled_forward, step=lambda optimizer: next(steps)(optimizer))
    assert (forward.frame_count, step.frame_count) == (1, 1)
    assert_same(trained, eager)


@rules
def test_the_public_step_can_be_compiled_too(rule):
    """torch's wrapper runs beside the graphs; hooks work, the numbers are the same, and nothing is compiled again."""
    eager, trained = made(rule, **tensors()), made(rule, **tensors())
    train(*eager, forward=loss, step=lambda optimizer: optimizer.step())
    counter, seen = CompileCounterWithBackend("eager"), torch.zeros(())
    trained[1].prepare()  # scales are estimated outside of the compiler
    trained[1].register_step_post_hook(lambda *arguments: seen.add_(1))
    step = torch.compile(lambda optimizer: optimizer.step(), backend=counter)
    frames = []

    def count(optimizer) -> None:
        step(optimizer)
        frames.append(counter.frame_count)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(*trained, forward=loss, step=count)
    assert seen == STEPS
    assert frames[2:] == [frames[2]] * (STEPS - 2)
    assert_same(trained, eager)


def annealing(rule: str, numbers: dict[str, object], **more: object):
    """A model and its optimizer, which anneals itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    ours, keywords = RULES[rule]
    groups = askew.param_groups(model, {"*": "ternary/channel"}, pretrained=True, verbose=False)
    return model, ours(groups, **numbers, **keywords, **more, total_steps=20, hold=0.3, end=0.8)


def backward(model, optimizer, k: int) -> None:
    optimizer.zero_grad()
    loss(model, torch.linspace(-1, 1, 12).reshape(3, 4) + k % 5).backward()


@rules
def test_a_compiled_step_anneals_itself(rule):
    """Where epsilon is a tensor the graph counts and fills it: one graph before, one in and one after the annealing."""

    eager, trained = annealing(rule, tensors()), annealing(rule, tensors())
    counter, new = CompileCounterWithBackend("eager"), []
    compiled = torch.compile(own_step, backend=counter, fullgraph=True)
    for k in range(20):
        for each in (eager, trained):
            backward(*each, k)
        before = counter.frame_count
        own_step(eager[1])
        (compiled if k else own_step)(trained[1])
        new += [k] * (counter.frame_count - before)
        assert trained[1].param_groups[0]["epsilon"] == eager[1].param_groups[0]["epsilon"]
    assert len(new) <= 4  # one more, before the compiler takes the count as a symbol
    assert [group["steps_done"] for group in trained[1].param_groups] == [20, 20]
    assert_same(trained, eager)


@rules
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_first_step_can_be_compiled_too(rule, kernels):
    """Moments come to be in the graph, and stay; scales have to be there before."""
    trained = []
    for compiler in (lambda step: step, functools.partial(torch.compile, backend="eager", fullgraph=True)):
        model, optimizer = annealing(rule, tensors(), backend=kernels)
        optimizer.prepare()
        step = compiler(own_step)
        for k in range(3):
            backward(model, optimizer, k)
            step(optimizer)
        trained.append((model, optimizer))
    assert_same(*trained)


@pytest.mark.parametrize("numbers", [{}, {"lr": 0.1, "epsilon": 1.0}], ids=["tensors", "floats"])
@rules
def test_the_public_step_anneals_itself_when_compiled(rule, numbers):
    trained = []
    for compiler in (lambda step: step, functools.partial(torch.compile, backend="eager")):
        model, optimizer = annealing(rule, numbers or tensors())
        optimizer.prepare()
        step = compiler(lambda optimizer: optimizer.step())
        for k in range(20):
            backward(model, optimizer, k)
            step(optimizer)
        trained.append((model, optimizer))
    assert_same(*trained)
    for each in zip(*(optimizer.param_groups for _, optimizer in trained), strict=True):
        assert [group["steps_done"] for group in each] == [20, 20]
        assert each[0]["epsilon"] == each[1]["epsilon"]
    assert trained[0][1].param_groups[0]["epsilon"] == 0


@pytest.mark.parametrize("other", ["reference", "triton"])
def test_another_backend_elsewhere_does_not_compile_the_step_again(other, monkeypatch):
    if other == "triton":
        copies = pytest.importorskip("tests.gpu.triton_copies", reason="triton is not installed")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(askew.backends, "_choose", askew.backends._choose.__wrapped__)  # without its cache
        monkeypatch.setattr("askew_cuda.triton.launch", copies.load(interpreted=True), raising=False)
    model, optimizer = made("momentum", **tensors())[:2]
    counter, frames = CompileCounterWithBackend("eager"), []
    step = torch.compile(own_step, backend=counter, fullgraph=True)
    for k in range(6):
        backward(model, optimizer, k)
        (step if k else own_step)(optimizer)
        frames.append(counter.frame_count)
        weight = torch.nn.Parameter(torch.linspace(-0.1, 0.1, 32).reshape(8, 4))
        weight.grad = torch.ones_like(weight)
        for momentum in (0.0, 0.9):
            askew.AskewSGD(
                [weight], lr=0.1, momentum=momentum, quantizer="ternary", pretrained=True, backend=other
            ).step()
    assert frames == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("rule", ["sgd_", "adamw_"])
@backends
def test_the_operator_alone(rule, backend):
    counter = CompileCounterWithBackend(backend)
    operator = getattr(torch.ops.askew_cuda, rule).default
    rest = cases.RULES["momentum" if rule == "sgd_" else "adamw"] | cases.ANNEALINGS["capture"] | {"clip": True}

    def call(weights, grads, states, steps, scales, codes, lr, epsilon) -> None:
        lists = [states[0]] if rule == "sgd_" else [*states, [], steps]
        operator(
            weights, grads, *lists, scales, [-1.0, 0.0, 1.0], codes, [], [], [], [], lr=lr, epsilon=epsilon, **rest
        )

    generator = torch.Generator().manual_seed(0)
    values = [[torch.randn(3, 5, generator=generator) for _ in range(2)] for _ in range(2)]
    lists = (*values, [[torch.zeros(3, 5) for _ in range(2)] for _ in range(2)], [torch.zeros(()) for _ in range(2)])
    lists = (*lists, [torch.ones(()) for _ in range(2)], [torch.zeros(3, 5, dtype=torch.uint8) for _ in range(2)])
    other = copy.deepcopy(lists)
    made_once = torch.compile(call, backend=counter, fullgraph=True)
    for k in range(5):
        numbers = (torch.tensor(0.1 / (k + 1)), torch.tensor(1.0 - k / 5))
        made_once(*lists, *numbers)
        call(*other, *numbers)
    assert counter.frame_count == 1
    assert str(lists) == str(other)
