"""16-bit weights whose small steps are kept: remainders that make float32 of them, and rounding by chance."""

import copy
import io
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import askew_cuda as askew
from askew_cuda import backends, rounding
from tests import cases
from tests.compare import assert_same_bits

HALVES = (torch.bfloat16, torch.float16)
RULES = {"sgd": (askew.AskewSGD, {"lr": 0.05, "momentum": 0.9}), "adamw": (askew.AskewAdamW, {"lr": 0.01})}
BACKENDS = ["reference", *(["cpu"] if backends.extension else [])]


def gradients(steps: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(shape, generator=generator) * 0.01).to(dtype) for _ in range(steps)]


def trained(rule: str, weight: Tensor, grads: list[Tensor], **keywords) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    kind, defaults = RULES[rule]
    parameter = nn.Parameter(weight.clone())
    optimizer = kind([parameter], **defaults, **keywords)
    anneal = askew.Anneal(optimizer, total_steps=len(grads)) if keywords.get("quantizer") else None
    for grad in grads:
        parameter.grad = grad.to(weight.dtype)
        optimizer.step()
        if anneal is not None:
            anneal.step()
    return parameter, optimizer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantizer", [None, "ternary/channel"])
@pytest.mark.parametrize("rule", RULES)
def test_with_remainders_bfloat16_trains_as_float32_does(rule, quantizer, backend):
    start, grads = (
        (torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * 0.1).bfloat16(),
        gradients(30, (6, 40), torch.bfloat16),
    )
    scale = {} if quantizer is None else {"quantizer": askew.Quantizer("ternary", scale=0.11, granularity="channel")}
    wide, _ = trained(rule, start.float(), grads, backend=backend, **scale)
    half, optimizer = trained(
        rule, start, grads, backend=backend, low_precision="remainder", state_dtype=torch.float32, **scale
    )
    assert half.dtype == torch.bfloat16
    assert_same_bits(rounding.join(half.detach(), optimizer.state[half]["remainder"]), wide.detach(), "weights")
    assert (half.float() - wide).abs().max() <= 2**-8 * wide.abs().max()


@given(st.integers(0, 2**32 - 1))
def test_a_bfloat16_and_its_remainder_are_the_float32(word):
    x = rounding.of_bits(torch.tensor([word]))
    weight, remainder = rounding.split(x, torch.bfloat16)
    assert_same_bits(rounding.join(weight, remainder), x, hex(word))
    assert x.isnan() or weight.isinf() or (weight.float() - x).abs() <= 2**-8 * x.abs() + 2.0**-133


@given(st.floats(-65000, 65000, width=32))
def test_a_float16_and_its_remainder_are_the_float32_or_close(x):
    number = torch.tensor([x])
    weight, remainder = rounding.split(number, torch.float16)
    assert_same_bits(weight, number.half(), "nearest")
    error = float((rounding.join(weight, remainder).double() - number.double()).abs())
    assert error == 0 if abs(x) >= 2**-16 else error <= 2**-40


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("x", [1.001, -0.9999, 3e-5, 1.0, -(2.0**-24), 300.1])
def test_stochastic_rounding_is_right_in_the_mean(x, dtype):
    count = 1 << 16
    random = rounding.random_bits(rounding.make_key(3, 5), torch.arange(count))
    rounded = rounding.stochastic(torch.full((count,), x), dtype, random)
    values = rounded.unique().double()
    assert len(values) <= 2
    single = float(torch.tensor(x, dtype=torch.float32))
    spread = float(values.max() - values.min()) / 2
    assert abs(float(rounded.double().mean()) - single) <= 5 * spread / math.sqrt(count)  # five standard errors at most
    assert float(values.min()) <= single <= float(values.max())


def test_random_bits_are_even_and_differ_between_seeds_streams_and_elements():
    keys = [rounding.make_key(seed, stream) for seed in range(4) for stream in range(4)]
    bits = torch.stack([rounding.random_bits(key, torch.arange(1 << 14)) for key in keys])
    for k in range(32):
        assert abs(float((bits >> k & 1).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(bits.numel())
    centred = (bits.double() / 2**32 - 0.5) * math.sqrt(12)
    correlation = centred @ centred.t() / bits.shape[1] - torch.eye(len(keys))
    assert float(correlation.abs().max()) < 5 / math.sqrt(bits.shape[1])
    assert abs(float((centred[:, 1:] * centred[:, :-1]).mean())) < 5 / math.sqrt(bits.numel())


@pytest.mark.parametrize("dtype", HALVES)
def test_small_steps_are_lost_kept_by_chance_or_kept(dtype):
    """Two hundred steps of a tenth of the last place."""
    start = torch.ones(4096, dtype=dtype)
    last = float(torch.finfo(dtype).eps)
    grads = [torch.full((4096,), -last / 10, dtype=dtype)] * 200
    moved = {}
    for how in ("nearest", "stochastic", "remainder"):
        weight = nn.Parameter(start.clone())
        optimizer = askew.AskewSGD([weight], lr=1.0, low_precision=how)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if how == "nearest" else "error")
            for grad in grads:
                weight.grad = grad
                optimizer.step()
        moved[how] = float(weight.detach().double().mean() - 1)
    assert moved["nearest"] == 0
    # the gradient is rounded to the dtype, and the sum once more
    assert moved["remainder"] == pytest.approx(20 * last, rel=0.03)
    assert moved["stochastic"] == pytest.approx(20 * last, rel=0.03)


def test_lost_steps_are_told_with_figures():
    weight = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    weight.grad = torch.full_like(weight, 1e-3)
    optimizer = askew.AskewSGD([weight], lr=0.1)
    with pytest.warns(UserWarning, match=r"100% of the bfloat16 weights .* low_precision='remainder'"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # it is told once
        for keywords in ({"lr": 10.0}, {"lr": 0.0}, {"lr": 0.1, "low_precision": "stochastic"}):
            other = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
            other.grad = torch.full_like(other, 1e-3)
            askew.AskewSGD([other], **keywords).step()


def test_lost_steps_of_a_weight_are_looked_at_in_its_first_step_only():
    weights = [nn.Parameter(torch.ones(size, dtype=torch.bfloat16)) for size in (300, 100)]
    optimizer = askew.AskewSGD(weights, lr=0.1)
    weights[0].grad = torch.full_like(weights[0], 1.0)
    optimizer.step()
    weights[0].grad, weights[1].grad = torch.full_like(weights[0], 1e-6), torch.full_like(weights[1], 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def stochastic(weight: Tensor, grads: list[Tensor], threads: int = 1, seed: int = 11, **keywords) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return trained("sgd", weight, grads, low_precision="stochastic", seed=seed, **keywords)[0].detach()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", HALVES)
def test_chance_depends_on_seed_and_element_alone(dtype):
    """Not on threads, backend, memory order, or on how a weight is cut into parts."""
    start, grads = (
        torch.randn(300, 250, generator=torch.Generator().manual_seed(0)).to(dtype),
        gradients(3, (300, 250), dtype),
    )
    wanted = stochastic(start, grads)
    assert not torch.equal(wanted, stochastic(start, grads, seed=12))
    assert_same_bits(stochastic(start, grads, threads=2), wanted, "two threads")
    for backend in BACKENDS:
        assert_same_bits(stochastic(start, grads, backend=backend), wanted, backend)
    other = [grad.t().contiguous().t() for grad in grads]
    assert_same_bits(stochastic(start.t().contiguous().t(), other), wanted, "another memory order")
    kind, keywords = RULES["sgd"]
    for rows in (slice(0, 100), slice(100, 300)):
        part = nn.Parameter(start[rows].clone())
        optimizer = kind([part], **keywords, low_precision="stochastic", seed=11)
        optimizer.first_elements[part] = rows.start * 250
        for grad in grads:
            part.grad = grad[rows].clone()
            optimizer.step()
        assert_same_bits(part.detach(), wanted[rows], f"{rows}")


@pytest.mark.parametrize("how", ["remainder", "stochastic"])
@pytest.mark.parametrize("rule", RULES)
def test_a_run_resumes_bit_for_bit(rule, how):
    kind, keywords = RULES[rule]
    grads = gradients(8, (5, 7), torch.bfloat16)
    runs = []
    for cut in (None, 3):
        weight = nn.Parameter(torch.ones(5, 7, dtype=torch.bfloat16))
        optimizer = kind([weight], **keywords, low_precision=how, seed=5)
        for k, grad in enumerate(grads):
            if k == cut:
                file = io.BytesIO()
                torch.save({"optimizer": optimizer.state_dict(), "weight": weight.detach()}, file)
                file.seek(0)
                loaded = torch.load(file, weights_only=True)
                weight = nn.Parameter(loaded["weight"])
                optimizer = kind([weight], **keywords, low_precision=how)
                optimizer.load_state_dict(loaded["optimizer"])
            weight.grad = grad
            optimizer.step()
        runs.append((weight.detach(), copy.deepcopy(optimizer.state[weight])))
    assert_same_bits(runs[0][0], runs[1][0], "weights")
    if how == "remainder":
        assert runs[1][1]["remainder"].dtype == torch.int16
        assert_same_bits(runs[0][1]["remainder"], runs[1][1]["remainder"], "remainders")


def test_finalize_leaves_nothing_beside_the_level():
    start, quantizer = torch.linspace(-0.1, 0.1, 36).reshape(4, 9).bfloat16(), askew.Quantizer("binary", scale=0.1)
    weight, optimizer = trained(
        "sgd", start, gradients(20, (4, 9), torch.bfloat16), quantizer=quantizer, low_precision="remainder"
    )
    optimizer.finalize()
    assert not optimizer.state[weight]["remainder"].any()
    scale = optimizer.state[weight]["scale"].bfloat16()
    assert bool((weight.detach().abs() == scale).all())


@pytest.mark.parametrize("how", ["remainder", "stochastic"])
def test_float32_weights_of_the_same_group_are_as_ever(how):
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    optimizer = askew.AskewSGD(weights, lr=0.5, low_precision=how)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert [weight.tolist() for weight in weights] == [[0.5] * 3] * 2
    assert "remainder" not in optimizer.state[weights[0]]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"low_precision": "exact"}, "low_precision = 'exact'; 'nearest', 'remainder' or 'stochastic'"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 0.5}, "seed = 0.5"),
    ],
    ids=str,
)
def test_wrong_keywords(keywords, message):
    with pytest.raises(ValueError, match=message):
        askew.AskewSGD([nn.Parameter(torch.ones(2))], **keywords)


@pytest.mark.skipif(backends.extension is None, reason="ASKEW_BUILD=none: nothing is compiled")
def test_the_operator_refuses_what_does_not_go_together():
    settings = cases.RULES["sgd"] | cases.ANNEALINGS["capture"] | {"lr": 0.1, "epsilon": 1.0, "clip": True}
    half, remainder = torch.ones(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int16)
    wrong = [
        (torch.ones(3), {"remainders": [remainder]}, ValueError, "remainders and seed are for bfloat16 and float16"),
        (torch.ones(3), {"seed": 1}, ValueError, "remainders and seed are for bfloat16 and float16"),
        (half, {"remainders": [remainder], "seed": 1}, ValueError, "remainders or a seed, not both"),
        (
            half,
            {"remainders": [remainder.int()]},
            TypeError,
            r"remainders\[0\] is torch.int32; remainders are torch.int16",
        ),
        (half, {"remainders": [remainder[:2]]}, ValueError, r"remainders\[0\] has shape \[2\]"),
        (half, {"seed": torch.tensor(1.0)}, TypeError, "seed is .*; one int64 number is needed"),
        (half, {"seed": 1, "streams": [1, 2]}, ValueError, "streams has 2 entries for 1 weights"),
    ]
    for weight, more, error, message in wrong:
        with pytest.raises(error, match=message):
            backends.operators("cpu").sgd_([weight], [torch.ones_like(weight)], [], [], [], [], [], **settings, **more)
        assert weight.tolist() == [1.0] * 3
