"""(E7): the growth that a step begins with, the sums that it leaves, and what scales learn of them."""

import math

import pytest
import torch

from askew_cuda import reference, summation
from tests.cases import EXTENSION
from tests.compare import assert_same_bits

compiled = pytest.mark.skipif(EXTENSION is None, reason="ASKEW_BUILD=none: nothing is compiled")
CAPTURE = {
    "anneal": "capture", "skew_at": "velocity", "recovery": 0.5, "alpha": None, "max_step": 0.5, "clip": True,
    "maximize": False, "weight_decay": 0.0,
}  # fmt: skip
SGD = CAPTURE | {"momentum": 0.9, "dampening": 0.0, "nesterov": False}
ADAMW = CAPTURE | {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "amsgrad": False}


def by_hand(weight, grad, scale, velocity, growth, settings, second=None):
    """(E7) for a scale per tensor, in Python's numbers."""
    part = sum(float(g) * float(w) for g, w in zip(grad, weight, strict=True)) / sum(float(w) ** 2 for w in weight)
    if second is not None:
        part /= math.sqrt(sum(second) / len(second))
    kept = settings.get("momentum", settings.get("beta1"))
    v = kept * velocity + (1 - settings.get("dampening", settings.get("beta1"))) * part
    x = min(max(settings["scale_lr"] * settings["lr"] * v, -0.05), 0.05)
    return scale * growth, v, math.exp(-x)


def summed(terms):
    """(rows, columns) to (rows,), in the order that is written: lanes in the type of the terms, the rest in float64."""
    total = torch.zeros(len(terms), dtype=torch.float64)
    for chunk in terms.split(summation.CHUNK, 1):
        whole = torch.zeros_like(total)
        for block in chunk.split(summation.BLOCK, 1):
            lanes = terms.new_zeros(len(terms), 16)
            for step in block.split(16, 1):
                lanes[:, : step.shape[1]] += step
            for half in (8, 4, 2, 1):
                lanes = lanes[:, :half] + lanes[:, half:]
            whole = whole + lanes[:, 0].double()
        total = total + whole
    return total


def draw(seed=0, dtype=torch.float32, size=40):
    generator = torch.Generator().manual_seed(seed)
    weight, grad, state = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(3))
    return weight.to(dtype), grad.to(dtype), state.to(dtype)


def test_a_step_of_sgd_and_what_its_scale_learns():
    weight, grad, buffer = draw()
    before, scale, velocity, growth = weight.clone(), torch.tensor(0.7), torch.tensor(0.3), torch.tensor(1.02)
    sums = torch.zeros(2, 1, dtype=torch.float64)
    reference.sgd_(
        [weight], [grad], [buffer.clone()], [scale], (-1, 1), [], [], growths=[growth], sums=[sums], lr=0.5,
        epsilon=1.0, **SGD,
    )  # fmt: skip
    assert sums[0].item() == summed((grad * before)[None])[0].item()
    assert sums[1].item() == summed((before * before)[None])[0].item()
    moved = (before * 1.02 - 0.5 * (0.9 * buffer + grad)).clamp(-0.7 * 1.02, 0.7 * 1.02)
    torch.testing.assert_close(weight, moved)

    wanted = by_hand(before, grad, 0.7, 0.3, 1.02, SGD | {"lr": 0.5, "scale_lr": 0.1})
    numbers = {"lr": 0.5, "epsilon": 1.0, "scale_lr": 0.1, "momentum": 0.9, "dampening": 0.0}
    reference.learn_scales_([scale], [velocity], [growth], [sums], [40], **numbers)
    assert (scale.item(), velocity.item(), growth.item()) == pytest.approx(wanted, rel=2e-5)


def test_a_step_of_adamw_and_what_its_scale_learns():
    weight, grad, mean = draw(1)
    square, before = mean.square() + 0.1, weight.clone()
    scale, velocity, growth = torch.tensor(0.7), torch.tensor(-0.2), torch.tensor(1.0)
    sums, step = torch.zeros(3, 1, dtype=torch.float64), torch.tensor(4.0)
    after = 0.99 * square + 0.01 * grad.square()
    reference.adamw_(
        [weight], [grad], [mean], [square], [], [step], [scale], (-1, 0, 1), [], [], growths=[growth], sums=[sums],
        lr=0.01, epsilon=1.0, **ADAMW,
    )  # fmt: skip
    corrected = (after / (1 - 0.99**5)).tolist()
    assert sums[2].item() == pytest.approx(sum(corrected), rel=1e-6)
    assert sums[2].item() == summed(square[None])[0].item() * float(torch.tensor((1 - 0.99**5) ** -0.5)) ** 2
    wanted = by_hand(before, grad, 0.7, -0.2, 1.0, ADAMW | {"lr": 0.01, "scale_lr": 3.0}, corrected)
    numbers = {"lr": 0.01, "epsilon": 1.0, "scale_lr": 3.0, "momentum": 0.9, "dampening": 0.9}
    reference.learn_scales_([scale], [velocity], [growth], [sums], [40], **numbers)
    assert (scale.item(), velocity.item(), growth.item()) == pytest.approx(wanted, rel=1e-6)


# Each an operator with the arguments of reference.learn_scales_.
def _operator(*lists, lr, epsilon, grad_scale=None, found_inf=None, **settings):
    numbers = {"lr": lr, "epsilon": epsilon, "grad_scale": grad_scale, "found_inf": found_inf}
    numbers = {k: torch.tensor(v, dtype=torch.float64) if isinstance(v, float) else v for k, v in numbers.items()}
    torch.ops.askew_cuda.learn_scales_(*lists, **numbers, **settings)


BOTH = [
    pytest.param(reference.learn_scales_, id="reference"),
    *([pytest.param(_operator, id="compiled")] if EXTENSION else []),
]
NUMBERS = {"lr": 0.5, "epsilon": 1.0, "scale_lr": 0.1, "momentum": 0.9, "dampening": 0.0}


def learn(operator, sums, scale=1.0, velocity=0.0, growth=1.0, dtype=torch.float32, **changes):
    """(scale, velocity, growth) of one scale afterwards."""
    lists = [[torch.tensor(x, dtype=dtype)] for x in (scale, velocity, growth)]
    operator(*lists, [torch.tensor(sums, dtype=torch.float64).reshape(-1, 1)], [10], **NUMBERS | changes)
    return tuple(each.item() for (each,) in lists)


@pytest.mark.parametrize("operator", BOTH)
def test_what_a_scale_must_not_learn_from(operator):
    assert learn(operator, [3.0, 0.0]) == (1.0, 0.0, 1.0)  # all weights are 0
    assert learn(operator, [math.nan, 1.0]) == (1.0, 0.0, 1.0)
    assert learn(operator, [math.inf, 1.0], velocity=0.5)[1] == pytest.approx(0.45)
    assert learn(operator, [1.0, 1.0, 0.0]) == (1.0, 0.0, 1.0)  # no second moment yet
    assert learn(operator, [3.0, 1.0], scale=0.0) == (0.0, 3.0, 1.0)  # a scale of 0 has no levels
    assert learn(operator, [-1e9, 1.0])[2] == pytest.approx(math.exp(0.05), rel=2e-5)  # at most 5 % in a step
    assert learn(operator, [1e9, 1.0])[2] == pytest.approx(math.exp(-0.05), rel=2e-5)
    assert learn(operator, [3.0, 1.0], lr=0.0) == (1.0, 3.0, 1.0)
    tiny = torch.finfo(torch.float32).tiny
    assert learn(operator, [1e9, 1.0], scale=tiny)[2] == 1.0  # it would leave the normal numbers


@pytest.mark.parametrize("operator", BOTH)
def test_the_growth_of_the_step_is_taken_over(operator):
    scale, _, growth = learn(operator, [0.0, 1.0], scale=2.0, growth=1.05)
    assert (scale, growth) == (torch.tensor(2.0).mul(1.05).item(), 1.0)


@pytest.mark.parametrize("operator", BOTH)
def test_it_is_over_for_good_once_annealing_has_begun(operator):
    first = learn(operator, [3.0, 1.0], velocity=1.0, growth=1.05, epsilon=0.999)
    assert first == (torch.tensor(1.05).item(), math.inf, 1.0)
    assert learn(operator, [3.0, 1.0], scale=1.5, velocity=math.inf) == (1.5, math.inf, 1.0)  # epsilon is 1 again


@pytest.mark.parametrize("operator", BOTH)
def test_a_step_that_amp_skips_moves_nothing(operator):
    before = (1.0, 0.25, 1.05)
    after = learn(operator, [3.0, 1.0], *before, found_inf=1.0)
    assert after == tuple(torch.tensor(x).item() for x in before)
    scaled, plain = learn(operator, [3.0 * 1024, 1.0], grad_scale=1024.0), learn(operator, [3.0, 1.0])
    assert scaled == plain
    assert learn(operator, [3.0, 1.0], maximize=True)[1] == -plain[1]


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kinds", [2, 3])
def test_the_compiled_operator_equals_the_reference(dtype, kinds):
    generator, results = torch.Generator().manual_seed(kinds), []
    draws = [torch.randn(5000, generator=generator, dtype=torch.float64) for _ in range(4)]
    for operator in (reference.learn_scales_, _operator):
        scale, velocity, growth = (
            draws[0].exp().to(dtype),
            draws[1].to(dtype, copy=True),
            (draws[2] * 0.01).exp().to(dtype),
        )
        sums = torch.stack([draws[3] * 10, draws[0].exp(), draws[1].square()][:kinds])
        velocity[7], sums[0, 8], sums[1, 9] = math.inf, math.nan, 0
        operator([scale], [velocity], [growth], [sums], [77], **NUMBERS | {"scale_lr": 0.3, "grad_scale": 3.0})
        results.append((scale, velocity, growth))
    for name, one, other in zip(("scale", "velocity", "growth"), *results, strict=True):
        assert_same_bits(one, other, name)


@compiled
def test_opcheck():
    ones = [torch.ones(3) for _ in range(3)]
    sums = torch.ones(2, 3, dtype=torch.float64)
    number = torch.tensor(0.5, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.askew_cuda.learn_scales_,
        ([ones[0]], [ones[1]], [ones[2]], [sums], [4]),
        {"lr": number, "epsilon": number, "scale_lr": 0.1, "momentum": 0.9, "dampening": 0.0},
    )


@pytest.mark.parametrize("columns", [1, 15, 16, 1279, 1280, 1281, summation.CHUNK + 1, 2 * summation.CHUNK])
def test_sums_are_those_of_each_scale(columns):
    generator = torch.Generator().manual_seed(columns)
    weight, grad = (torch.randn(3, columns, generator=generator) for _ in range(2))
    weight[0, 0], grad[2, -1] = math.nan, math.inf
    radial, square = reference.radial_sums(grad, weight, (3, 1))
    weight[0, 0] = weight[2, -1] = 0  # neither counts
    grad[2, -1] = 0
    assert_same_bits(radial, summed(grad * weight), "g w")
    assert_same_bits(square, summed(weight * weight), "w^2")
    for found, terms in ((radial, grad.double() * weight.double()), (square, weight.double().square())):
        assert ((found - terms.sum(1)).abs() <= 1e-6 * terms.abs().sum(1)).all()
