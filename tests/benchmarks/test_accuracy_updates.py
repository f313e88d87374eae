"""The update of each peer of the accuracy table against a literal statement, its package, or brute force."""

import math

import pytest
import torch
from torch import nn

from benchmarks.accuracy.methods import ada_ste, binary_connect, binary_relax, cage, luq, parq, prox_quant
from benchmarks.accuracy.methods.latent import Grid
from benchmarks.accuracy.methods.method import WIDTHS, Base
from tests.benchmarks.regressions import SGD, STEPS, Regressions


def test_cage_pulls_late_and_by_the_learning_rate():
    """Without gradients nothing moves for 80 % of the steps; then the distance to the level shrinks.

    By the factor 1 - lr lambda ramp.
    """
    task = Regressions([0])
    run = cage.Cage().begin(
        task.quantized, [], Base("sgd", 0.1, momentum=0.0), "binary", 4.0, total_steps=10, pretrained=False
    )
    latent, scale = task.quantized[0], task.quantized[0].detach().abs().mean()
    scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1 - step / 10)
    for step in range(1, 11):
        before, level = latent.detach().clone(), scale * latent.detach().sign()
        for each in task.quantized:
            each.grad = torch.zeros_like(each)
        run.optimizer.step()
        scheduler.step()
        run.stepped()
        pull = 0.1 * (1 - (step - 1) / 10) * 4 * max(step / 10 - 0.8, 0) / 0.2
        torch.testing.assert_close(latent.detach(), before + pull * (level - before))
        assert torch.equal(latent.detach(), before) == (step <= 8)


def by_search(objective, low=-3.0, high=3.0):
    """The minimum of a function over a fine grid: (its place, the grid's distance)."""
    x = torch.linspace(low, high, 60_001, dtype=torch.float64)
    return x[objective(x).argmin()].item(), (high - low) / 60_000


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.4, 2.0])
def test_the_proximal_map_of_proxquant_is_the_minimum(strength):
    rows = torch.tensor([[-2.7, -1.2, -0.6, -0.45, 0.1, 0.55, 0.93, 1.4, 2.2]], dtype=torch.float64)
    grid, one = Grid("ternary"), torch.ones(1, 1, dtype=torch.float64)
    levels = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).unsqueeze(1)
    moved = prox_quant.proximal(rows, grid.nearest(rows, one), strength * one)
    for w, x in zip(rows[0].tolist(), moved[0].tolist(), strict=True):
        best, fine = by_search(lambda x, w=w: (x - w).square() / 2 + strength * (x - levels).abs().amin(0))
        assert x == pytest.approx(best, abs=fine)


def test_proxquant_holds_rounded_weights_while_the_rest_trains():
    task = Regressions([0])
    run = prox_quant.ProxQuant().begin(task.quantized, task.rest, SGD, "2bit", 0.1, total_steps=STEPS, pretrained=False)
    seen = []
    for _ in range(STEPS):
        run.optimizer.zero_grad()
        task.loss(run).sum().backward()
        run.optimizer.step()
        run.stepped()
        seen.append([each.detach().clone() for each in (*task.quantized, *task.rest)])
    hard = math.ceil(prox_quant.HARD * STEPS) - 1  # the step after which they are rounded
    for weight, before, after, last in zip(task.quantized, seen[hard - 1], seen[hard], seen[-1], strict=False):
        assert len(before.unique()) > 4
        assert len(after.unique()) <= 4
        assert torch.equal(after, last)
        assert torch.equal(run.weight(weight), last)
    assert not torch.equal(seen[hard][-1], seen[-1][-1])


@pytest.mark.parametrize(
    "method",
    [binary_connect.BinaryConnect(False), binary_connect.BinaryConnect(True), binary_connect.StraightThroughInOurBox()],
)
def test_latent_weights_stay_in_their_box(method):
    task = Regressions([0, 1])
    run = task.train(method, "binary", Base("sgd", 1.0))
    for latent in task.quantized:
        share = latent.detach().flatten(1).abs() / run.scale[latent]
        assert share.max().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.3, 5.0])
def test_the_relaxed_weight_is_the_minimum(strength):
    for w, level in ((0.3, 1.0), (-1.7, -1.0), (0.9, 1.0)):
        relaxed = binary_relax.relax_(
            torch.tensor([level], dtype=torch.float64), torch.tensor([w], dtype=torch.float64), strength
        )
        best, fine = by_search(lambda x, w=w, level=level: (x - w).square() + strength * (x - level).square())
        assert relaxed.item() == pytest.approx(best, abs=fine)


def test_schedules():
    assert binary_relax.strength_at(0, 10.0) == 1
    assert binary_relax.strength_at(0.4, 100.0) == pytest.approx(10)
    assert binary_relax.strength_at(0.4, "linear") == pytest.approx(1)
    assert binary_relax.strength_at(0.8, "linear") == math.inf
    assert parq.inverse_slope(0, 10.0) == 1
    assert parq.inverse_slope(0.425, 10.0) == pytest.approx(0.5)
    assert parq.inverse_slope(0.85, 10.0) == 0


@pytest.mark.parametrize("steepness", [10.0, 50.0])
@pytest.mark.parametrize("width", WIDTHS)
def test_parq_is_the_packages(width, steepness):
    optim = pytest.importorskip(
        "torchao.prototype.parq.optim", reason="torchao is not installed: pip install --no-deps torchao"
    )
    from torchao.prototype.parq.quant import LSBQuantizer, UnifQuantizer

    task, theirs = Regressions([0, 1]), Regressions([0, 1]).quantized
    bits = {"binary": 1, "ternary": 0, "2bit": 2, "4bit": 4}[width]
    base = torch.optim.SGD([{"params": theirs, "quant_bits": bits}], lr=0.05, momentum=0.9)
    quantizer = LSBQuantizer() if width == "ternary" else UnifQuantizer()
    annealing = optim.ProxPARQ(anneal_start=0, anneal_end=round(parq.HARD * STEPS), steepness=steepness)
    package = optim.QuantOptimizer(base, quantizer, annealing, quant_period=1, quant_per_channel=True)
    run = parq.Parq().begin(
        task.quantized, [], Base("sgd", 0.05), width, steepness, total_steps=STEPS, pretrained=False
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        for ours, other in zip(task.quantized, theirs, strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator)
            other.grad = ours.grad.clone()
        run.optimizer.step()
        run.stepped()
        package.step()
        for ours, other in zip(task.quantized, theirs, strict=True):
            torch.testing.assert_close(run.weight(ours), other, rtol=1e-4, atol=2e-5, check_stride=False)


def test_adaste_by_hand_and_at_its_limits():
    theta = torch.tensor([-3.0, -0.5, 0.2, 1.5])
    assert torch.equal(ada_ste.forward(theta, 100.0), theta.sign())  # beta alpha = 1
    assert torch.equal(ada_ste.forward(theta, 0.0), theta.clamp(-1, 1))
    torch.testing.assert_close(ada_ste.forward(theta, 99.999), theta.sign(), atol=1e-4, rtol=0)
    assert ada_ste.forward(torch.tensor([0.2]), 1.0).item() == pytest.approx((0.2 + 1.01) / 2)
    inwards, outwards = theta.sign(), -theta.sign()  # gradients: descent goes against them
    assert ada_ste.slope(theta, outwards, 100.0).tolist() == [0, 0, 0, 0]
    assert ada_ste.slope(theta, inwards, 100.0).tolist() == pytest.approx([1 / 3, 0.5, 0.5, 0.5])
    assert ada_ste.slope(theta, outwards, 1.0).tolist() == [0, 0.5, 0.5, 0]  # flat beyond 1 - beta alpha = .99
    assert ada_ste.slope(theta, inwards, 1.0).tolist() == pytest.approx([0.5, 0.5, 0.5, 0.5])
    assert ada_ste.slope(theta, inwards, 0.2).tolist() == pytest.approx([1.402 / (1.2 * 3), 0, 0.5, 0.5])
    assert ada_ste.slope(torch.tensor([0.3]), torch.tensor([1.0]), 0.2).item() == pytest.approx(
        (0.404 - 0.3) / (1.2 * 0.3)
    )
    assert ada_ste.slope(torch.tensor([9.0]), torch.tensor([1.0]), 99.999).item() == pytest.approx(2 / 9, rel=1e-4)


def test_adaste_multiplies_the_gradient():
    task = Regressions([0])
    run = ada_ste.AdaSte().begin(
        task.quantized, task.rest, Base("sgd", 1.0, momentum=0.0), "binary", 2.0, total_steps=10, pretrained=False
    )
    before = task.quantized[0].detach().clone()
    grad = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    for each in task.quantized:
        each.grad = torch.zeros_like(each)
    task.quantized[0].grad = grad.clone()
    run.optimizer.step()
    scale = 2 * before.abs().mean()
    assert torch.equal(run.weight(task.quantized[0]).sign(), before.sign())
    torch.testing.assert_close(
        task.quantized[0].detach(), before - 0.1 * ada_ste.slope(before / scale, grad, 1.0) * grad
    )


def within_chance(draws: torch.Tensor, wanted: torch.Tensor) -> None:
    """The mean of draws (n, ..) is the wanted one within 5 standard errors, element by element."""
    draws = draws.double()
    error = (draws.mean(0) - wanted).abs()
    bound = 5 * draws.std(0) / len(draws) ** 0.5 + 1e-6 * wanted.abs()  # the last: of float32
    assert not (error > bound).any()


def test_gradients_of_luq_are_unbiased_powers_of_two():
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(2, 40, generator=generator) * torch.tensor([[1e-3], [10.0]])
    grad[0, :5] = torch.tensor([1e-6, -1e-6, 0.0, 3e-6, 1e-5])  # some below the smallest size
    draws = torch.stack([luq.quantize_gradient(grad, torch.rand(grad.shape, generator=generator)) for _ in range(4000)])
    within_chance(draws, grad)
    size = draws.abs() / grad.abs().amax(1, keepdim=True)
    assert set(size.unique().tolist()) <= {0.0, *(2.0**-k for k in range(8))}
    assert set(size[:, 0, [0, 1, 3]].unique().tolist()) == {0.0, 2.0**-7}  # what is below the smallest size
    assert (draws[0].sign() * grad.sign() >= 0).all()
    assert torch.equal(luq.quantize_gradient(torch.zeros(2, 3), torch.rand(2, 3)), torch.zeros(2, 3))


def test_activations_of_luq_by_hand():
    x = torch.tensor([[0.0, 1.0, 2.0, 30.0], [-5.0, -4.0, 3.0, 4.0]])
    found = luq.quantize_activation(x)
    for row, out, low, high in zip(x, found, (0, -8), (15, 7), strict=True):
        clip = 12.68 * row.square().mean().sqrt() - 12.80 * row.abs().mean()
        clip = clip if clip > 0 else row.abs().max()
        step = 2 * clip / 15
        torch.testing.assert_close(out, step * (row / step).round().clamp(low, high))
    y = torch.randn(2, 5, requires_grad=True)
    run = luq.Luq().begin([], [nn.Parameter(torch.zeros(2, 1))], SGD, "4bit", None, total_steps=1, pretrained=False)
    run.input(y).sum().backward()
    assert torch.equal(y.grad, torch.ones(2, 5))  # straight through
    assert torch.equal(run.output(y), y)


def test_stochastic_binaryconnect_is_unbiased():
    task = Regressions([0])
    run = binary_connect.BinaryConnect(stochastic=True).begin(
        task.quantized, task.rest, SGD, "binary", 2.0, total_steps=1, pretrained=False
    )
    latent = task.quantized[0]
    scale = run.scale[latent]
    draws = []
    for _ in range(4000):
        run.stepped()  # a step that moves nothing: a new draw
        draws.append(run.weight(latent).detach().clone())
    assert set(draws[0].abs().unique().tolist()) == {scale.item()}
    assert not (latent.abs() > scale).any()
    within_chance(torch.stack(draws), latent.detach())
    run.finish()
    assert torch.equal(run.weight(latent), torch.where(latent > 0, scale, -scale))
