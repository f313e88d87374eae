"""Which way a call takes: straight to the kernel with plain tensors, through torch's dispatcher where something listens
there.
"""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from askew_cuda import backends

LEVELS = [-1.0, 0.0, 1.0]
SETTINGS = {
    "lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False,
    "epsilon": 0.5,
    "anneal": "capture", "skew_at": "velocity", "recovery": 0.5, "alpha": None, "max_step": 0.5, "clip": True,
}  # fmt: skip
pytestmark = pytest.mark.skipif(backends.extension is None, reason="the compiled extension is not built")


def lists() -> list[list]:
    generator = torch.Generator().manual_seed(0)
    tensors = [[torch.randn(5, 7, generator=generator)] for _ in range(3)]
    return [*tensors, [torch.tensor(0.5)], LEVELS, [], []]


def test_both_ways_give_the_same_bits():
    direct, dispatched = lists(), lists()
    backends.operators("cpu").sgd_(*direct, **SETTINGS)
    scalars = {key: torch.tensor(SETTINGS[key], dtype=torch.float64) for key in ("lr", "epsilon")}
    torch.ops.askew_cuda.sgd_(*dispatched, [], [], [], **{**SETTINGS, **scalars})
    assert torch.equal(direct[0][0], dispatched[0][0])
    assert torch.equal(direct[2][0], dispatched[2][0])
    assert not torch.equal(direct[0][0], lists()[0][0])


def test_fake_tensors_go_through_the_dispatcher():
    with FakeTensorMode() as mode:
        fake = [
            [mode.from_tensor(tensor) for tensor in each] if each and each is not LEVELS else each for each in lists()
        ]
        backends.operators("cpu").sgd_(*fake, **SETTINGS)  # the kernel would crash on them: they have no memory
        with pytest.raises(ValueError, match=r"grads\[0\] is on meta but weights\[0\] is on cpu"):
            backends.operators("cpu").sgd_(fake[0], [fake[1][0].to("meta")], *fake[2:], **SETTINGS)


def test_the_operator_can_be_compiled_into_a_graph():
    sgd_ = backends.operators("cpu").sgd_

    def step(weight, grad, buffer, scale):
        sgd_([weight], [grad], [buffer], [scale], LEVELS, [], [], **SETTINGS)
        return weight * 2

    (weight,), (grad,), (buffer,), (scale,), *_ = lists()
    expected = weight.clone()
    sgd_([expected], [grad], [buffer.clone()], [scale], LEVELS, [], [], **SETTINGS)
    doubled = torch.compile(step, backend="aot_eager", fullgraph=True)(weight, grad, buffer, scale)
    assert torch.equal(weight, expected)
    assert torch.equal(doubled, expected * 2)


def test_a_profiler_sees_the_operator():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        backends.operators("cpu").sgd_(*lists(), **SETTINGS)
    assert "askew_cuda::sgd_" in {event.name for event in profile.events()}


def test_errors_keep_their_types():
    wrong = lists()
    wrong[3] = [torch.ones(3)]
    with pytest.raises(ValueError, match=r"scales\[0\] has shape \[3\]"):
        backends.operators("cpu").sgd_(*wrong, **SETTINGS)
    wrong = lists()
    wrong[1] = [wrong[1][0].double()]
    with pytest.raises(TypeError, match=r"grads\[0\] is torch.float64"):
        backends.operators("cpu").sgd_(*wrong, **SETTINGS)
