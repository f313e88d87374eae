"""What must hold whatever the numbers are. Examples are drawn alike on every run."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from askew_cuda import reference
from tests.cases import BACKENDS, CODEBOOKS, COMPILED, DTYPES
from tests.compare import assert_close, assert_same_bits

BACKEND = next(iter(COMPILED.values()), BACKENDS["reference"])  # one is enough: that they agree is shown elsewhere
LEVELS = {name: levels for name, levels in CODEBOOKS.items() if levels and len(levels) < 20}
SYMMETRIC = {name: levels for name, levels in LEVELS.items() if levels == tuple(-x for x in reversed(levels))}
N = 16  # weights of an example
PLAIN = {
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "maximize": False,
    "skew_at": "velocity",
    "clip": False,
}
examples = settings(
    derandomize=True, deadline=None, database=None, max_examples=100, suppress_health_check=list(HealthCheck)
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def numbers(low: float, high: float) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(low, high), min_size=N, max_size=N)


class Example(NamedTuple):
    """Weights among the levels of a codebook, each at the signed distance `delta` (units of r_h) from one of them."""

    levels: tuple[float, ...]
    scale: float
    level: list[int]
    delta: list[float]
    d: list[float]  # displacements asked for, in units of scale

    def weights(self, dtype: torch.dtype, delta: Tensor | None = None) -> Tensor:
        levels = torch.tensor(self.levels, dtype=torch.float64)
        which = torch.tensor(self.level)
        delta = torch.tensor(self.delta, dtype=torch.float64) if delta is None else delta
        lower, upper = (
            (which - 1).clamp(min=0),
            which.clamp(max=len(levels) - 2),
        )  # intervals on both sides; at the ends, the only one
        gap = torch.where(delta < 0, levels[lower + 1] - levels[lower], levels[upper + 1] - levels[upper])
        return (self.scale * (levels[which] + delta * gap / 2)).to(dtype)

    def sides(self) -> Tensor:
        """+1 above the level, -1 below it; at the outermost levels inwards."""
        side = torch.where(torch.tensor(self.delta) < 0, -1.0, 1.0).double()
        side[torch.tensor(self.level) == 0] = 1
        side[torch.tensor(self.level) == len(self.levels) - 1] = -1
        return side

    def inside(self) -> Tensor:
        """delta, turned into the codebook."""
        return self.sides() * torch.tensor(self.delta, dtype=torch.float64).abs()

    def step(self, w: Tensor, g: Tensor, scale: float | None = None, **given) -> Tensor:
        """The weights after one step of SGD with lr 1 (else `lr`)."""
        w, scale = w.clone(), torch.tensor(self.scale if scale is None else scale, dtype=reference.arithmetic(w.dtype))
        options = PLAIN | {"lr": 1.0, "recovery": 0.5, "alpha": None, "max_step": 0.5} | given
        BACKEND.sgd_([w], [g], [torch.zeros_like(w)], [scale], self.levels, [], [], **options)
        return w

    def gradient(self, dtype: torch.dtype) -> Tensor:
        return (-self.scale * torch.tensor(self.d, dtype=torch.float64)).to(dtype)


@st.composite
def example(draw, codebooks=LEVELS, low=-1.0, high=1.0) -> Example:
    levels = codebooks[draw(st.sampled_from(sorted(codebooks)))]
    level = draw(st.lists(st.integers(0, len(levels) - 1), min_size=N, max_size=N))
    scale = draw(st.floats(2**-7, 8.0, width=32))
    return Example(levels, scale, level, draw(numbers(low, high)), draw(numbers(-3.0, 3.0)))


half_width = st.floats(0.0, 1.0)
annealing = st.sampled_from(["capture", "interval"])


def epsilon_of(r: float) -> float:
    return (r * (2 - r)) ** 2


def place(case: Example, w: Tensor):
    """(nearest level, its distance e, r_h, whether w is outside the codebook), as the reference sees it."""
    unit = torch.tensor(case.scale, dtype=w.dtype)
    book = reference.codebook(case.levels, w)
    unit = unit * book.unit
    at = reference.locate(w, unit, book)
    outside = ((at.level == book.lowest) & (at.e > 0)) | ((at.level == book.highest) & (at.e < 0))
    return unit * at.level, at.e, at.half, outside


@dtypes
@examples
@given(case=example(), r=half_width, share=numbers(0.0, 0.999))
def test_a_feasible_weight_follows_the_base_rule(dtype, case, r, share):
    """Within r of a level. 0.999: clear of the rounding of r and delta, as long as r is not much smaller than a weight;
    then: on it.
    """
    w = case.weights(dtype, case.sides() * torch.tensor(share, dtype=torch.float64) * r)
    if r < 1e-3:
        w, *_ = place(case, w)
    g = case.gradient(dtype)
    assert_same_bits(case.step(w, g, epsilon=epsilon_of(r), anneal="interval"), w - g, "interval")


@dtypes
@examples
@given(case=example(), r=st.floats(0.001, 1.0), share=numbers(0.001, 0.999))
def test_a_weight_beyond_the_capture_radius_follows_the_base_rule(dtype, case, r, share):
    delta = case.sides() * (1 - r + r * torch.tensor(share, dtype=torch.float64))
    w, g = case.weights(dtype, delta), case.gradient(dtype)
    assert_same_bits(case.step(w, g, epsilon=epsilon_of(r), anneal="capture"), w - g, "capture")


def h_of(w: Tensor, case: Example, epsilon: float) -> Tensor:
    """(E1), as it is written: epsilon - (t^2 - 1)^2."""
    level, e, half, outside = place(case, w.detach())
    # The midpoint lies half a gap from the level: on the weight's side; of a weight outside, on the other.
    middle = level + torch.where((e < 0) ^ outside, half, -half)
    return epsilon - (((w - middle) / half) ** 2 - 1) ** 2


@examples
@given(case=example(low=-1.6, high=1.6), r=half_width, rate=st.floats(0.01, 1.0))
def test_the_pull_is_a_h_over_its_slope(case, r, rate):
    """(E2), P = a |h| / |h'| towards larger h, against autograd's derivative of (E1), in float64."""
    epsilon = epsilon_of(r)
    w = case.weights(torch.float64).requires_grad_()
    h = h_of(w, case, epsilon)
    (slope,) = torch.autograd.grad(h.sum(), w)
    w, h = w.detach(), h.detach()
    moved = case.step(w, torch.zeros_like(w), epsilon=epsilon, anneal="interval", recovery=rate, max_step=math.inf)
    # h is rounded as a sum of numbers up to (t^2 - 1)^2 < 35, t as one up to |w| / r_h, the new weight once
    half = place(case, w)[2]
    bound = 35 * 1e-14 * (1 + w.abs() / half) + 2**-52 * slope.abs() * (w.abs() + moved.abs())
    uphill = (h < 0) & (slope != 0)
    assert_close((moved - w)[uphill] * slope[uphill], -rate * h[uphill], bound[uphill], "P h' = a |h|")
    assert_same_bits(moved[~uphill & (h > 1e-12)], w[~uphill & (h > 1e-12)], "feasible")


@examples
@given(case=example(low=-0.94, high=0.94), r=st.floats(0.0, 0.99), alpha=st.floats(0.1, 10.0))
def test_a_violation_shrinks_at_the_rate_alpha(case, r, alpha):
    """To first order in lr, whatever the gradient: h(w') - h(w) >= lr alpha |h|, of violations that no step of this
    size can leap.
    """
    lr, epsilon = 1e-7, epsilon_of(r)
    w = case.weights(torch.float64, case.inside())
    before = h_of(w, case, epsilon)
    moved = case.step(
        w,
        case.gradient(torch.float64),
        epsilon=epsilon,
        anneal="interval",
        lr=lr,
        recovery=None,
        alpha=alpha,
        max_step=math.inf,
    )
    healed = (h_of(moved, case, epsilon) - before) / (lr * alpha)
    # The second order is |h'' P^2| / 2 <= (lr alpha)^2 |h| 8 / (2 * 16 t^2), with |t| >= .06 less than 1e-4 of the
    # first; h is rounded by less than 1e-14 (t carries |w| / r_h), which the division makes 1e-6.
    short = (before < -1e-4) & ~(healed >= -before * (1 - 2e-4) - 1e-6)
    assert not short.any(), (healed[short], before[short])


@dtypes
@examples
@given(case=example(low=-3.0, high=3.0), r=half_width, anneal=annealing)
def test_clipping_keeps_weights_in_the_box(dtype, case, r, anneal):
    w = case.step(case.weights(dtype), case.gradient(dtype), epsilon=epsilon_of(r), anneal=anneal, clip=True)
    scale = torch.tensor(case.scale, dtype=dtype)
    assert bool((w >= scale * case.levels[0]).all())
    assert bool((w <= scale * case.levels[-1]).all())


@dtypes
@examples
@given(case=example(), r=st.floats(0.0, 0.999), recovery=st.floats(0.01, 1.5), max_step=st.floats(0.01, 2.0))
def test_a_captured_weight_never_moves_away_nor_crosses_its_level(dtype, case, r, recovery, max_step):
    delta = case.inside() * (1 - r) * 0.999
    w = case.weights(dtype, delta)
    moved = case.step(
        w,
        case.gradient(dtype),
        epsilon=epsilon_of(r),
        anneal="capture",
        recovery=recovery,
        max_step=max_step,
        clip=True,
    )
    level, before, _, outside = place(case, w)
    after = level - moved
    assert not outside.any() or bool((before[outside].abs() < 1e-6 * case.scale).all())  # by rounding
    arrived = moved == w + (level - w)  # which may round to a neighbour of the level, on its other side
    stays = outside | ((after.abs() <= before.abs()) & (arrived | (after.sign() == before.sign())))
    assert bool(stays.all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples
@given(case=example(), recovery=st.floats(0.05, 1.0))
def test_capture_ends_exactly_on_the_levels(dtype, case, recovery):
    """From delta = 1 a share `recovery` less at each step, by half of r_h at most, until 2^-16 is left, and then the
    rest.
    """
    w = case.weights(dtype, case.inside())
    steps = 2 if recovery == 1 else math.ceil(-16 * math.log(2) / math.log1p(-recovery)) + 2
    for _ in range(steps):
        w = case.step(w, torch.zeros_like(w), epsilon=0.0, anneal="capture", recovery=recovery)
    levels = torch.tensor(case.scale) * torch.tensor(case.levels)  # in float32, and as the dtype holds them
    levels = (
        levels.to(dtype)
        if dtype != torch.float64
        else torch.tensor(case.scale, dtype=dtype) * torch.tensor(case.levels, dtype=dtype)
    )
    assert set(w.tolist()) <= set(levels.tolist())


@dtypes
@examples
@given(case=example(codebooks=SYMMETRIC, low=-1.5, high=1.5), r=half_width, anneal=annealing, clip=st.booleans())
def test_symmetric_codebooks_have_no_sign(dtype, case, r, anneal, clip):
    w, g = case.weights(dtype), case.gradient(dtype)
    _, e, half, outside = place(case, w)
    tie = ((e.abs() / half - 1).abs() < 1e-4) & ~outside  # goes down, on either side
    up = case.step(w, g, epsilon=epsilon_of(r), anneal=anneal, clip=clip)
    down = case.step(-w, -g, epsilon=epsilon_of(r), anneal=anneal, clip=clip)
    assert_same_bits(-down[~tie], up[~tie], f"{anneal}, {case.levels}")


@dtypes
@examples
@given(
    case=example(low=-1.5, high=1.5),
    r=half_width,
    anneal=annealing,
    power=st.integers(-20, 20),
    decay=st.sampled_from([0.0, 0.3]),
)
def test_powers_of_two_scale_through(dtype, case, r, anneal, power, decay):
    """Weight, scale and gradient in other units: the same step in other units, to the last bit."""
    # Smaller numbers would become subnormal on the way, and those have no last bits to keep.
    w, g = (torch.where(each.abs() < 2.0**-60, 0, each) for each in (case.weights(dtype), case.gradient(dtype)))
    factor = 2.0**power
    scale = torch.tensor(case.scale, dtype=torch.float32).item()
    options = {
        "epsilon": epsilon_of(r),
        "anneal": anneal,
        "clip": True,
        "lr": 0.3,
        "momentum": 0.9,
        "weight_decay": decay,
    }
    assert_same_bits(
        case.step(w * factor, g * factor, scale * factor, **options), case.step(w, g, scale, **options) * factor, anneal
    )


@dtypes
@examples
@given(
    case=example(low=-1.5, high=1.5),
    r=half_width,
    anneal=annealing,
    order=st.permutations(range(N)),
    cut=st.integers(0, N),
)
def test_a_weight_does_not_know_its_neighbours(dtype, case, r, anneal, order, cut):
    """Permuted weights, and a tensor in two parts, give the same bits."""
    w, g = case.weights(dtype), case.gradient(dtype)
    options = {"epsilon": epsilon_of(r), "anneal": anneal, "momentum": 0.9, "nesterov": True}
    whole = case.step(w, g, **options)
    assert_same_bits(case.step(w[order], g[order], **options), whole[order], "permuted")
    assert_same_bits(
        torch.cat([case.step(part, grad, **options) for part, grad in ((w[:cut], g[:cut]), (w[cut:], g[cut:]))]),
        whole,
        "cut",
    )
