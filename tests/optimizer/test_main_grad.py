"""Gradients in ``main_grad``, as Megatron adds them up: mostly float32, beside 16-bit weights."""

import pytest
import torch
from torch import Tensor, nn

import askew_cuda as askew
from askew_cuda import optimizer as module
from askew_cuda.backends import absent
from tests.optimizer.test_changes import RULES, optimizer_of, results, rules, same

TRITON = [] if absent("triton", torch.device("cpu"), torch.float32) else ["triton"]  # TRITON_INTERPRET=1
backends = pytest.mark.parametrize("backend", ["cpu", "reference", *TRITON])
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:.*did not move in the first step", "ignore:.*clipping to")
SHAPES = ((4, 6), (3,), (5, 7))


def weights_of(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(k: int) -> list[Tensor]:
    """Of step k; 16 bits don't hold them."""
    generator = torch.Generator().manual_seed(100 + k)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def put(weights: list[nn.Parameter], k: int) -> None:
    """As Megatron does: into a buffer that stays."""
    for weight, grad in zip(weights, gradients(k), strict=True):
        if not hasattr(weight, "main_grad"):
            weight.main_grad = torch.zeros(weight.shape)
        weight.main_grad.copy_(grad)


@rules
@backends
def test_a_training_with_remainders_is_that_of_float32(rule, backend):
    """bfloat16 weights and remainders are float32 weights: from float32 gradients all their bits come out, too."""
    wide, half = weights_of(torch.bfloat16), weights_of(torch.bfloat16)
    wide = [nn.Parameter(each.detach().float()) for each in wide]
    truth = optimizer_of(wide, rule, backend=backend, scale_lr=0)
    mine = optimizer_of(half, rule, backend=backend, scale_lr=0, low_precision="remainder", state_dtype=torch.float32)
    for k in range(5):
        put(half, k)
        for weight, grad in zip(wide, gradients(k), strict=True):
            weight.grad = grad
        for each in (truth, mine):
            each.param_groups[0]["epsilon"] = 1 - k / 8
            each.step()
        assert all(weight.grad is None for weight in half)
        assert same([weight.main_grad for weight in half], gradients(k))  # never written
    for weight, other in zip(half, wide, strict=True):
        assert torch.equal(askew.rounding.join(weight.detach(), mine.state[weight]["remainder"]), other)


@halves
@rules
@pytest.mark.parametrize("backend", ["cpu", *TRITON])
@pytest.mark.parametrize("low_precision", ["nearest", "remainder", "stochastic"])
@pytest.mark.parametrize("pretrained", [True, False])  # False: scales learn, where rounding lets them
def test_backends_agree(low_precision, backend, rule, dtype, pretrained):
    found = []
    for each in (backend, "reference"):
        weights = weights_of(dtype)
        keywords = {"low_precision": low_precision, "pretrained": pretrained, "outputs": ["codes"]}
        optimizer = optimizer_of(weights, rule, backend=each, **keywords)
        for k in range(4):
            put(weights, k)
            optimizer.step()
        found.append(results(optimizer, weights) + [optimizer.outputs[weight]["codes"] for weight in weights])
    assert same(*found)


@rules
@backends
def test_what_is_as_wide_as_the_weight_steps_as_its_gradient(rule, backend):
    found = []
    for name in ("grad", "main_grad"):
        weights = weights_of(torch.float32)
        optimizer = optimizer_of(weights, rule, backend=backend)
        for k in range(3):
            for weight, grad in zip(weights, gradients(k), strict=True):
                setattr(weight, name, grad)
            optimizer.step()
        found.append(results(optimizer, weights))
    assert same(*found)


@backends
def test_gradients_move_between_the_two_from_step_to_step(backend):
    """The wider ones and the others step in calls of their own; what counts is what is there now."""
    found = []
    for moves in (False, True):
        weights = weights_of(torch.bfloat16)
        optimizer = optimizer_of(weights, backend=backend)
        for k in range(8):
            for i, (weight, grad) in enumerate(zip(weights, gradients(k), strict=True)):
                grad = None if (i, k) in ((1, 2), (1, 3)) else grad.bfloat16()  # which both can hold
                there = grad is not None and moves and (k + i) // 3 % 2 == 0
                weight.grad, weight.main_grad = (None, grad.float()) if there else (grad, None)
            optimizer.step()
        found.append([weight.detach() for weight in weights])
    assert same(*found)


@pytest.mark.parametrize("backend", ["cpu", *TRITON])
def test_a_plan_is_kept(backend, monkeypatch):
    made = []
    monkeypatch.setattr(module, "Plan", lambda owner, make=module.Plan: made.append(owner) or make(owner))
    weights = weights_of(torch.bfloat16)
    optimizer = optimizer_of(weights, backend=backend)
    for k in range(4):
        put(weights, k)
        if k == 2:
            weights[0].main_grad = weights[0].main_grad.clone()
        optimizer.step()
    assert len(made) == 1


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch casts gradients to the weight's dtype")
@backends
def test_a_grad_may_be_float32_too(backend):
    found = []
    for name in ("grad", "main_grad"):
        weights = weights_of(torch.bfloat16)
        optimizer = optimizer_of(weights, backend=backend)
        for k in range(3):
            for weight, grad in zip(weights, gradients(k), strict=True):
                weight.grad_dtype = torch.float32
                setattr(weight, name, grad)
            optimizer.step()
        found.append([weight.detach() for weight in weights])
    assert same(*found)


WRONG = {
    "both": (lambda w: setattr(w, "grad", torch.ones(3).bfloat16()), ValueError, "w1 has a grad and a main_grad"),
    "another dtype": (
        lambda w: setattr(w, "main_grad", torch.ones(3).double()),
        TypeError,
        r"grads\[0\] \(w1\) is torch.float64",
    ),
    "another shape": (
        lambda w: setattr(w, "main_grad", torch.ones(4)),
        ValueError,
        r"grads\[1\] \(w1\) has shape \[4\]",
    ),
    "another device": (
        lambda w: setattr(w, "main_grad", torch.ones(3, device="meta")),
        ValueError,
        r"grads\[1\] \(w1\) is on meta but weights\[1\] is on cpu",
    ),
    "another shape, as many numbers": (
        lambda w: setattr(w, "main_grad", torch.ones(3, 1)),
        ValueError,
        r"grads\[1\] \(w1\) has shape \[3, 1\]",
    ),
    "no tensor": (lambda w: setattr(w, "main_grad", 1.0), TypeError, "main_grad of w1 is 1.0; a tensor, or None"),
}


@backends
@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_refused_by_name(wrong, when, backend):
    """In the first step, and where a plan is kept."""
    change, error, message = WRONG[wrong]
    weights = weights_of(torch.bfloat16)
    optimizer = optimizer_of(weights, backend=backend)
    for k in range(when):
        put(weights, k)
        optimizer.step()
    put(weights, when)
    before = [weight.detach().clone() for weight in weights]
    change(weights[1])
    with pytest.raises(error, match=message):
        optimizer.step()
    assert same(weights, before)


def test_float32_gradients_of_float64_weights_are_refused():
    (weight,) = (nn.Parameter(torch.ones(4, dtype=torch.float64)),)
    weight.main_grad = torch.ones(4)
    with pytest.raises(TypeError, match=r"is torch.float32 but weights\[0\] is torch.float64; the weight's dtype, or"):
        askew.AskewSGD([weight], lr=0.1).step()


def test_zero_grad_leaves_it_and_monitor_sees_it():
    """Who adds it up sets it back."""
    weights = weights_of(torch.bfloat16)
    optimizer = optimizer_of(weights)
    watch = askew.monitor(optimizer, every=1)
    put(weights, 0)
    weights[0].main_grad[0, 0] = float("nan")
    optimizer.step()
    assert watch.log()["askew/w0/non_finite_grads"] == 1
    optimizer.zero_grad()
    assert all(weight.main_grad.count_nonzero() for weight in weights)


@pytest.mark.filterwarnings("default:.*did not move in the first step")
def test_lost_steps_are_noticed():
    weights = [nn.Parameter(torch.ones(100, dtype=torch.bfloat16))]
    weights[0].main_grad = torch.full((100,), 1e-4)
    ours, keywords = RULES["sgd"]
    with pytest.warns(UserWarning, match="100% of the bfloat16 weights that have a gradient did not move"):
        ours(weights, lr=0.1, **keywords).step()
