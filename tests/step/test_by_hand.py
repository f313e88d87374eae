"""Steps that can be worked by hand, on every backend and in every dtype.

r_h is half the distance between two levels, e the distance to the nearest one, delta = |e| / r_h, t the distance to the
midpoint / r_h.
"""

import math
from typing import NamedTuple

import pytest
import torch

from tests.cases import BACKENDS, COMPILED, DTYPES, EXTENSION, Backend
from tests.compare import TOLERANCES, assert_close

BINARY, TERNARY, HALVES, UNIT = (-1.0, 1.0), (-1.0, 0.0, 1.0), (-1.5, -0.5, 0.5, 1.5), (0.0, 1.0)
UNEVEN = (-1.0, 0.0, 4.0)
QUARTER = 0.4375**2  # epsilon of r = 1/4: (r (2 - r))^2
NAN = math.nan
SGD = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
ADAMW = {"beta1": 0.5, "beta2": 0.75, "eps": 0.0, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
CONSTRAINT = {
    "anneal": "interval",
    "skew_at": "velocity",
    "recovery": 1.0,
    "alpha": None,
    "max_step": 0.5,
    "clip": False,
    "lr": 1.0,
}
on_all = pytest.mark.parametrize("name", BACKENDS)
in_all = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Row(NamedTuple):
    """A weight, the displacement that the base rule asks for, and the weight after the step."""

    w: float
    d: float
    epsilon: float
    expected: float
    levels: tuple[float, ...] = BINARY
    scale: float = 1.0
    settings: dict = {}  # noqa: RUF012  a constant


def interval(w, d, epsilon, expected, levels=BINARY, scale=1.0, **settings):
    return Row(w, d, epsilon, expected, levels, scale, settings)


def capture(w, d, epsilon, expected, levels=BINARY, scale=1.0, recovery=0.5, **settings):
    return Row(w, d, epsilon, expected, levels, scale, {"anneal": "capture", "recovery": recovery} | settings)


STEPS = {
    # (E2) at epsilon 0 and recovery 1: P = r_h/4 delta (2 - delta) / t = 1/4 * 1/2 * 3/2 / (1/2) = 3/8, below the cap
    # of 1/2
    "interval: pulled up against the gradient": interval(0.5, -0.125, 0.0, 0.875),
    "interval: pulled down against the gradient": interval(-0.5, 0.125, 0.0, -0.875),
    "interval: a smaller step the right way is raised to the pull": interval(0.5, 0.25, 0.0, 0.875),
    "interval: a larger step the right way heals, and stays": interval(0.5, 0.4375, 0.0, 0.9375),
    "interval: healing is not stopped at the level": interval(0.5, 1.0, 0.0, 1.5),
    "interval: half the recovery": interval(0.5, -0.125, 0.0, 0.6875, recovery=0.5),
    "interval: recovery 2 is not capped at 1": interval(0.5, -0.125, 0.0, 1.25, recovery=2.0, max_step=2.0),
    "interval: alpha 1, lr 1/2": interval(0.5, -0.125, 0.0, 0.6875, recovery=None, alpha=1.0, lr=0.5),
    "interval: epsilon 1 frees everything inside": interval(0.5, -0.125, 1.0, 0.375),
    "interval: feasible, delta 1/4 = r": interval(0.75, -0.125, QUARTER, 0.625),
    "interval: the midpoint keeps d": interval(0.0, 0.125, 0.0, 0.125),
    "interval: a midpoint keeps d": interval(0.5, 0.125, 0.0, 0.625, TERNARY),
    "interval: on the level, d is free": interval(1.0, -0.125, 0.0, 0.875),
    # delta 1/2, r 1/4: 1/4 * 1/4 * 5/4 * (1 + 7/16 / (3/4)) / (1/2) = 95/384
    "interval: pull towards the feasible set": interval(0.5, 0.0, QUARTER, 0.5 + 95 / 384),
    # delta 7/8, t 1/8: 1/4 * 7/8 * 9/8 / (1/8) = 63/32, capped at 1/2
    "interval: capped at max_step": interval(0.125, 0.0, 0.0, 0.625),
    "interval: capped at another max_step": interval(0.125, 0.0, 0.0, 0.1875, max_step=0.0625),
    "interval: no cap": interval(0.125, 0.0, 0.0, 0.125 + 63 / 32, max_step=math.inf),
    "interval: the cap does not hold d": interval(0.125, 2.0, 0.0, 2.125),
    # r_h = 1/2, delta 1/2, t 1/2: half of the first pull
    "interval: ternary": interval(0.25, 0.0, 0.0, 0.0625, TERNARY),
    "interval: scale 2, levels of 2 bit": interval(0.5, 0.0, 0.0, 0.875, HALVES, scale=2.0),
    "interval: scale 1/2": interval(0.25, 0.0, 0.0, 0.4375, scale=0.5),
    # gaps of 1 and 4: r_h = 2, delta 1/2, t 1/2 on the wide side, pull twice the first one
    "interval: the wide gap of uneven levels": interval(1.0, 0.0, 0.0, 0.25, UNEVEN),
    "interval: the narrow gap of uneven levels": interval(-0.25, 0.0, 0.0, -0.0625, UNEVEN),
    # delta 1/2 outside, t 3/2: 1/4 * 1/2 * 5/2 / (3/2) = 5/24
    "interval: outside, pulled back": interval(1.5, 0.0, 0.0, 1.5 - 5 / 24),
    "interval: outside, below": interval(-1.5, 0.0, 0.0, -1.5 + 5 / 24),
    # epsilon 1: r_out = 1 / (1 + sqrt 2) < 1/2, (delta - r_out) (2 + delta + r_out) = 5/4 - 1: 1/4 * 1/4 * (1 + 1 /
    # (5/4)) / (3/2)
    "interval: outside, epsilon 1 frees less": interval(1.5, 0.0, 1.0, 1.5 - 3 / 40),
    "interval: outside, feasible": interval(1.375, 0.125, 1.0, 1.5),
    # a = alpha, not lr alpha: 3/8 * 1/2 per unit of lr
    "gradient: alpha in place of lr alpha": interval(
        0.5, -0.125, 0.0, 0.59375, recovery=None, alpha=0.5, lr=0.5, skew_at="gradient"
    ),
    "gradient: feasible": interval(0.75, -0.125, QUARTER, 0.625, recovery=None, alpha=0.5, lr=0.5, skew_at="gradient"),
    # the cap is max_step r_h / lr = 2 per unit of lr, the pull 63/32 alpha
    "gradient: the cap is one of the move": interval(
        0.125, 0.0, 0.0, 0.625, recovery=None, alpha=8.0, lr=0.25, skew_at="gradient"
    ),
    "gradient: below the cap": interval(
        0.125, 0.0, 0.0, 0.125 + 63 / 128, recovery=None, alpha=1.0, lr=0.25, skew_at="gradient"
    ),
    # decay is fed in after the skew: 7/8 - 1/4 * 1/2
    "gradient: weight decay after the skew": interval(
        0.5, 0.0, 0.0, 0.75, recovery=None, alpha=1.0, lr=1.0, skew_at="gradient", weight_decay=0.25
    ),
    "velocity: weight decay before the skew": interval(0.5, 0.0, 0.0, 0.875, weight_decay=0.25),
    "capture: captured, half of the distance": capture(0.5, -0.125, 0.0, 0.75),
    "capture: captured below": capture(-0.5, 0.125, 0.0, -0.75),
    "capture: as fast as d": capture(0.5, 0.375, 0.0, 0.875),
    "capture: never past the level": capture(0.5, 2.0, 0.0, 1.0),
    "capture: never past the level, from outside": capture(1.25, -2.0, 0.0, 1.0),
    "capture: recovery 1.5 is capped at 1": capture(0.5, -0.125, 0.0, 1.0, recovery=1.5, max_step=2.0),
    "capture: lr alpha is the recovery": capture(0.5, -0.125, 0.0, 0.625, recovery=None, alpha=0.5, lr=0.5),
    "capture: on the level it stays": capture(1.0, -0.75, QUARTER, 1.0),
    "capture: on the level it stays, ternary": capture(0.0, 0.375, QUARTER, 0.0, TERNARY),
    "capture: epsilon 1 frees everything": capture(1.0, -0.75, 1.0, 0.25),
    # D = 1 - r = 3/4
    "capture: delta 11/16 is captured": capture(0.3125, -0.125, QUARTER, 0.3125 + 11 / 32),
    "capture: delta 3/4 is free": capture(0.25, -0.125, QUARTER, 0.125),
    "capture: delta 13/16 is free": capture(0.1875, 0.5, QUARTER, 0.6875),
    "capture: the wide gap of uneven levels": capture(1.0, 1.0, 0.0, 0.5, UNEVEN),  # delta 1/2
    "capture: free in the wide gap": capture(1.75, 0.25, QUARTER, 2.0, UNEVEN),  # delta 7/8
    "capture: a midpoint goes down once D = 1": capture(0.0, 0.0, 0.0, -0.5),
    "capture: a midpoint of 2 bit goes down": capture(1.0, 0.0, 0.0, 0.75, HALVES),
    "capture: a midpoint is free as long as D < 1": capture(0.0, 0.125, QUARTER, 0.125),
    "capture: capped at max_step": capture(0.5, 0.0, 0.0, 0.5625, max_step=0.0625),
    "capture: outside": capture(2.0, 0.25, 0.0, 1.5),
    "capture: far outside it is free while D < 1": capture(2.0, 0.25, QUARTER, 2.25),
    "capture: far outside, capped": capture(5.0, 0.25, 0.0, 4.5),
    "capture: the last bit of the way": capture(1 - 2**-16, 0.0, 0.0, 1.0, recovery=2**-10),
    "capture: not yet the last bit": capture(2**-14, 0.0, 0.0, 2**-15, TERNARY),
    "capture: scale 1/2, levels 0 and 1": capture(0.375, -0.125, 0.0, 0.4375, UNIT, scale=0.5),
    "clip: above": interval(0.75, 0.5, 1.0, 1.0, clip=True),
    "clip: below": interval(-0.75, -0.5, 1.0, -1.0, clip=True),
    "clip: inside it does nothing": interval(0.75, 0.125, 1.0, 0.875, clip=True),
    "clip: a weight far outside comes back": capture(5.0, 0.25, 1.0, 1.0, clip=True),
    "clip: scaled": capture(0.0, 1.0, 1.0, 0.75, HALVES, scale=0.5, clip=True),
    "clip: uneven": interval(-1.5, 0.0, 1.0, -1.0, UNEVEN, clip=True),
    "scale 0: no levels to clip to": interval(0.75, 0.5, 1.0, 1.25, scale=0.0, clip=True),
    "no levels: the base rule": interval(0.5, -2.0, 0.0, -1.5, ()),
    "no levels: nothing to clip to": capture(0.5, -2.0, 0.0, -1.5, (), clip=True),
    "lr 0 moves nothing": interval(0.5, NAN, 0.0, 0.5, lr=0.0),
    "lr 0 moves nothing into the box": capture(5.0, NAN, 0.0, 5.0, lr=0.0, clip=True),
    "lr 0 moves nothing, gradient": interval(0.5, NAN, 0.0, 0.5, recovery=None, alpha=1.0, lr=0.0, skew_at="gradient"),
    "maximize": interval(0.5, 0.25, 1.0, 0.25, maximize=True),
    "maximize: the pull stays a pull": interval(0.5, 0.125, 0.0, 0.875, maximize=True),
    "grad_scale 4": interval(0.5, 0.5, 1.0, 0.625, grad_scale=4.0),
    "weight decay": interval(0.5, -0.25, 1.0, 0.125, weight_decay=0.25),
    "nan, free": capture(0.125, NAN, QUARTER, NAN),
    "nan, captured": capture(0.5, NAN, 0.0, NAN),
    "nan, on its level": capture(1.0, NAN, 0.0, NAN),
    "nan, feasible": interval(0.5, NAN, 1.0, NAN, clip=True),
    "nan, pulled": interval(0.5, NAN, 0.0, NAN, clip=True),
    "nan, gradient": interval(0.5, NAN, 0.0, NAN, recovery=None, alpha=1.0, skew_at="gradient"),
    "nan, outside": capture(5.0, NAN, 0.0, NAN, clip=True),
    "nan, lr 0: the weight stands": capture(0.5, NAN, 0.0, 0.5, lr=0.0, clip=True),
}


def check(actual: torch.Tensor, expected: list[float], what: str) -> None:
    """Close to what was worked by hand, relative to its largest number or 1; NaN where it is NaN."""
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert actual.isnan().tolist() == wanted.isnan().tolist(), f"{what}: {actual.tolist()}, expected {expected}"
    size = max([1.0, *(abs(x) for x in expected if x == x)])
    assert_close(actual.double().nan_to_num(0.0), wanted.nan_to_num(0.0), TOLERANCES[actual.dtype] * size, what)


@in_all
@on_all
@pytest.mark.parametrize("row", STEPS.values(), ids=STEPS)
def test_one_step(row, name, dtype):
    settings = SGD | CONSTRAINT | row.settings
    g = -row.d / settings["lr"] if settings["lr"] else NAN
    weight, grad = torch.tensor([row.w] * 20, dtype=dtype), torch.tensor([g] * 20, dtype=dtype)
    scale = (
        [torch.tensor(row.scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)]
        if row.levels
        else []
    )
    BACKENDS[name].sgd_(
        [weight], [grad], [torch.zeros_like(weight)], scale, row.levels, [], [], epsilon=row.epsilon, **settings
    )
    check(weight, [row.expected] * 20, "weight")


@in_all
@on_all
@pytest.mark.parametrize(
    ("levels", "scale", "weights", "codes"),
    [
        pytest.param(
            BINARY, 1.0, [-5, -1, -0.5, 0.0, -0.0, 2**-14, 1, 5, NAN], [0, 0, 0, 0, 0, 1, 1, 1, 0], id="binary"
        ),
        pytest.param(TERNARY, 1.0, [-1.5, -0.5, -0.25, 0.0, 0.5, 0.625, NAN], [0, 0, 1, 1, 1, 2, 0], id="ternary"),
        pytest.param(HALVES, 2.0, [-2.0, -1.875, 0.0, 0.125, 2.0, 2.125], [0, 1, 1, 2, 2, 3], id="2 bit"),
        pytest.param(UNEVEN, 0.5, [-0.25, -0.125, 1.0, 1.125, math.inf, -math.inf], [0, 1, 1, 2, 2, 0], id="uneven"),
        pytest.param(
            tuple(float(k) for k in range(-128, 128)),
            1.0,
            [-200, -128, 0.5, 127, 200],
            [0, 0, 128, 255, 255],
            id="256 levels",
        ),
    ],
)
def test_codes_and_snapped_weights(levels, scale, weights, codes, name, dtype):
    """(E6), of weights that don't move: ties go to the lower level; NaN has code 0, and stays NaN."""
    weight, code, snapped = (
        torch.tensor(weights, dtype=dtype),
        torch.full((len(weights),), 9, dtype=torch.uint8),
        torch.zeros(len(weights)),
    )
    scales = [torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)]
    settings = SGD | CONSTRAINT | {"lr": 0.0, "epsilon": 0.0}
    BACKENDS[name].sgd_([weight], [torch.ones_like(weight)], [], scales, levels, [code], [snapped], **settings)
    assert code.tolist() == codes
    wanted = [NAN if math.isnan(weight) else scale * levels[k] for weight, k in zip(weights, codes, strict=True)]
    torch.testing.assert_close(snapped, torch.tensor(wanted), rtol=0, atol=0, equal_nan=True)


@in_all
@on_all
def test_the_last_bit_of_the_way_is_taken_at_once(name, dtype):
    """One spacing below 1, a quarter of the distance would be rounded away; further off, a step makes just that
    quarter.
    """
    weight = torch.tensor([1 - torch.finfo(dtype).eps / 2, 1 - 2**-4], dtype=dtype)
    scales = [torch.tensor(1.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)]
    settings = SGD | CONSTRAINT | {"anneal": "capture", "recovery": 0.25, "epsilon": 0.0}
    BACKENDS[name].sgd_([weight], [torch.zeros_like(weight)], [], scales, BINARY, [], [], **settings)
    assert weight.tolist() == [1.0, 1 - 2**-4 + 2**-6]


@on_all
def test_the_code_is_that_of_the_stored_weight(name):
    """1/2 + 2^-11 is nearest to 1, and -1/2 + 2^-11 to 0; but bfloat16 stores 1/2 and -1/2: ties, which go to the lower
    level.
    """
    weight, codes = torch.tensor([0.625, -0.375], dtype=torch.bfloat16), torch.zeros(2, dtype=torch.uint8)
    grad = torch.full_like(weight, 0.125 - 2**-11)
    BACKENDS[name].sgd_(
        [weight], [grad], [], [torch.tensor(1.0)], TERNARY, [codes], [], epsilon=1.0, **SGD | CONSTRAINT
    )
    assert weight.tolist() == [0.5, -0.5]
    assert codes.tolist() == [1, 0]


# Base rules, unconstrained: settings, gradients, the weight (1 before) after each step. SGD with lr 1/2;
# momentum_buffer in comments.
SGD_STEPS = {
    "plain": ({}, (1.0, 2.0), (0.5, -0.5)),
    "momentum": ({"momentum": 0.5}, (1.0, 2.0), (0.5, -0.75)),  # 1; 1/2 + 2
    "dampening": ({"momentum": 0.5, "dampening": 0.25}, (1.0, 2.0), (0.625, -0.3125)),  # 3/4; 3/8 + 3/2
    "nesterov": ({"momentum": 0.5, "nesterov": True}, (1.0, 2.0), (0.25, -1.375)),  # 1, g 3/2; 5/2, g 2 + 5/4
    "weight decay": ({"weight_decay": 0.5}, (1.0, 2.0), (0.25, -0.8125)),  # g 1 + 1/2; 2 + 1/8
    "momentum, weight decay": (
        {"momentum": 0.5, "weight_decay": 0.5},
        (1.0, 2.0),
        (0.25, -1.1875),
    ),  # 3/2; 3/4 + 2 + 1/8
    "maximize": ({"momentum": 0.5, "maximize": True}, (1.0, 2.0), (1.5, 2.75)),
    "maximize, weight decay": (
        {"weight_decay": 0.5, "maximize": True},
        (1.0, 2.0),
        (1.25, 1.9375),
    ),  # g -1 + 1/2; -2 + 5/8
    "a zero gradient goes on": ({"momentum": 0.5}, (1.0, 0.0), (0.5, 0.25)),
}
# AdamW with lr 1/2, beta1 1/2, beta2 3/4, eps 0. The first step is lr, whatever the gradient.
ADAMW_STEPS = {
    "the first step is lr": ({}, (3.0,), (0.5,)),
    "and against the gradient": ({}, (-8.0,), (1.5,)),
    "eps": ({"eps": 1.0}, (3.0,), (0.625,)),  # 3 / (3 + 1)
    # mean 1/2, -1/4, over 3/4; square 1/4, 7/16, over 7/16: directions 1 and -1/3
    "two steps": ({}, (1.0, -1.0), (0.5, 0.5 + 1 / 6)),
    "decoupled decay": ({"weight_decay": 0.25}, (3.0,), (0.375,)),  # 1/2 (1 + 1/4)
    "decay does not enter the moments": ({"weight_decay": 0.25}, (1.0, -1.0), (0.375, 0.375 + 1 / 6 - 3 / 64)),
    "maximize": ({"maximize": True, "weight_decay": 0.25}, (3.0,), (1.375,)),
    # mean 1, 1/2, over 3/4; square 1, 3/4, over 7/16
    "no amsgrad": ({}, (2.0, 0.0), (0.5, 0.5 - 0.5 * (2 / 3) / math.sqrt(12 / 7))),
    "amsgrad keeps the largest": ({"amsgrad": True}, (2.0, 0.0), (0.5, 0.5 - 0.5 * (2 / 3) / math.sqrt(16 / 7))),
}


@in_all
@on_all
@pytest.mark.parametrize("levels", [(), TERNARY], ids=["none", "unconstrained"])
@pytest.mark.parametrize(("settings", "gradients", "expected"), SGD_STEPS.values(), ids=SGD_STEPS)
def test_sgd(settings, gradients, expected, levels, name, dtype):
    walk(BACKENDS[name], "sgd_", dtype, levels, 1, SGD | settings, gradients, expected)


@in_all
@on_all
@pytest.mark.parametrize("levels", [(), TERNARY], ids=["none", "unconstrained"])
@pytest.mark.parametrize(("settings", "gradients", "expected"), ADAMW_STEPS.values(), ids=ADAMW_STEPS)
def test_adamw(settings, gradients, expected, levels, name, dtype):
    walk(BACKENDS[name], "adamw_", dtype, levels, 2, ADAMW | settings, gradients, expected)


def walk(
    backend: Backend, rule: str, dtype: torch.dtype, levels, states: int, settings: dict, gradients, expected
) -> None:
    """Checks each step of seven weights that start at 1; with epsilon 1 and capture no weight is constrained."""
    weight, steps = torch.ones(7, dtype=dtype), [torch.tensor(0.0)]
    state = [[torch.zeros_like(weight)] for _ in range(states)]
    if rule == "adamw_":
        state += [[torch.zeros_like(weight)] if settings["amsgrad"] else [], steps]
    scales = [torch.tensor(1.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)] if levels else []
    settings = CONSTRAINT | {"anneal": "capture", "lr": 0.5, "epsilon": 1.0} | settings
    for count, (g, wanted) in enumerate(zip(gradients, expected, strict=True)):
        getattr(backend, rule)([weight], [torch.full_like(weight, g)], *state, scales, levels, [], [], **settings)
        check(weight, [wanted] * 7, f"weight after step {count + 1}")
    assert steps[0] == (len(gradients) if rule == "adamw_" else 0)


def test_every_capability_is_among_the_backends():
    assert [f"cpu-{name}" for name in EXTENSION.cpu_capabilities()] == list(COMPILED) if EXTENSION else not COMPILED
