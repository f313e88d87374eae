"""The methods of the accuracy table: each update against a literal statement, the package or brute force; networks don't mix."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import askew_cuda as askew
from askew_cuda.quantizer import Codebook
from benchmarks.peers import ada_ste, binary_connect, binary_relax, cage, luq, parq, prox_quant
from benchmarks.peers.methods import WIDTHS, Base, FullPrecision, Grid, Method, Ours, Run, StraightThrough
from benchmarks.peers.registry import METHODS
from examples import digits

SGD, ADAMW = Base("sgd", 0.05, weight_decay=1e-3), Base("adamw", 0.01, weight_decay=0.1, betas=(0.9, 0.95))
STEPS = 20
pytestmark = pytest.mark.filterwarnings("ignore:finalize")  # the authors' annealing does not end on the levels
EVERY = [pytest.param(m, width, id=f"{m.name}-{width}") for m in METHODS for width in m.widths]


class Task:
    """S small regressions with one hidden layer, weights stacked; network i is that of seed ``seeds[i]``."""

    def __init__(self, seeds: list[int]):
        drawn = []
        for seed in seeds:
            torch.manual_seed(seed)
            one, two = nn.Linear(6, 8), nn.Linear(8, 4)
            drawn.append((one.weight, two.weight, one.bias, two.bias, torch.randn(16, 6), torch.randn(16, 4)))
        *parameters, self.x, self.y = (torch.stack([tensor.detach() for tensor in each]) for each in zip(*drawn, strict=True))
        parameters = [nn.Parameter(each) for each in parameters]
        self.quantized, self.rest = parameters[:2], parameters[2:]

    def loss(self, run):
        x = self.x
        for k, (weight, bias) in enumerate(zip(self.quantized, self.rest, strict=True)):
            x = torch.baddbmm(bias.unsqueeze(1), run.input(x), run.weight(weight).transpose(1, 2))
            x = run.output(x)
            x = x.relu() if k == 0 else x
        return (x - self.y).square().mean((1, 2))

    def train(self, method: Method, width: str, base=SGD, knob=None, steps=STEPS, pretrained=False, granularity="tensor"):
        knob = method.knobs[-1] if knob is None else knob
        settings = {"total_steps": steps, "pretrained": pretrained, "granularity": granularity}
        run = method.start(self.quantized, self.rest, base, width, knob, **settings)
        for _ in range(steps):
            run.optimizer.zero_grad()
            self.loss(run).sum().backward()
            run.optimizer.step()
            run.stepped()
        run.finish()
        return run


def test_every_row_has_its_own_name_and_widths_and_a_paper():
    assert len({method.name for method in METHODS}) == len(METHODS)
    for method in METHODS:
        assert set(method.widths) <= set(WIDTHS)
        assert method.knobs == (None,) if not method.knob else len(set(method.knobs)) == len(method.knobs) > 1
    assert [method.name for method in METHODS if not method.widths] == ["full precision"]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(("method", "width"), EVERY)
def test_ends_on_the_levels(method, width, granularity):
    task, levels = Task([0, 1, 2]), torch.tensor(Codebook.named(width).levels)
    run = task.train(method, width, Base("sgd", 0.2), granularity=granularity)
    for latent in task.quantized:
        weight = run.weight(latent)
        assert weight.shape == latent.shape
        for row in weight.detach().reshape(3 if granularity == "tensor" else 3 * latent.shape[1], -1):
            found = row.unique()
            tried = found.abs().max() / levels[levels > 0]  # one of these is the scale
            away = (found.unsqueeze(1) - tried * levels[:, None, None]).abs().amin(0).amax(0)
            assert away.min() <= 1e-5 * found.abs().max()
        assert len(weight[0].unique()) > 1
    assert task.loss(run).isfinite().all()


@pytest.mark.parametrize(("method", "width"), [*EVERY, pytest.param(FullPrecision(), "binary", id="full precision")])
def test_networks_do_not_mix(method, width):
    """The first network is another one; the others come out bit for bit the same."""
    found = []
    for seeds in ([0, 1, 2], [7, 1, 2]):
        task = Task(seeds)
        run = task.train(method, width, Base("sgd", 0.2))
        found.append([run.weight(latent).detach() for latent in task.quantized])
    for a, b in zip(*found, strict=True):
        assert not torch.equal(a[0], b[0])
        assert torch.equal(a[1:], b[1:])


@pytest.mark.parametrize(("method", "width"), [each for each in EVERY if not set(each.id.split()) & {"stochastic-binary", "LUQ"}])
def test_stacked_is_alone(method, width):
    """Without chance a network is what it would have been by itself."""
    together, alone = Task([3, 4]), Task([4])
    one, other = together.train(method, width), alone.train(method, width)
    for a, b in zip(together.quantized, alone.quantized, strict=True):
        torch.testing.assert_close(one.weight(a)[1:], other.weight(b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_straight_through_is_that_of_the_example(width):
    task, base = Task([5]), Base("sgd", 0.05)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        for layer, weight, bias in zip((network[0], network[2]), task.quantized, task.rest, strict=True):
            layer.weight.copy_(weight[0])
            layer.bias.copy_(bias[0])
    for layer in (network[0], network[2]):
        plain = digits.StraightThrough(askew.Quantizer.parse(width), layer.weight)
        parametrize.register_parametrization(layer, "weight", plain)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (network(task.x[0]) - task.y[0]).square().mean().backward()
        optimizer.step()
    task.train(StraightThrough(), width, base)
    latent = network[0].parametrizations.weight.original
    torch.testing.assert_close(task.quantized[0][0], latent, rtol=1e-4, atol=1e-5)


def test_cage_pulls_late_and_by_the_learning_rate():
    """Without gradients: nothing moves for 80 % of the steps, then the distance to the level shrinks by 1 - lr lambda ramp."""
    task = Task([0])
    run = cage.Cage().start(task.quantized, [], Base("sgd", 0.1, momentum=0.0), "binary", 4.0, total_steps=10, pretrained=False)
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


@pytest.mark.parametrize("base", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize(("pretrained", "granularity"), [(False, "tensor"), (True, "channel")])
def test_ours_is_the_optimizer_on_plain_networks(base, pretrained, granularity):
    """The same gradients, given: every bit of weights, scales and biases."""
    task, name = Task([0, 1]), "2bit" if granularity == "tensor" else "2bit/channel"
    plain = [[nn.Parameter(each[i].detach().clone()) for each in task.quantized + task.rest] for i in range(2)]
    run = Ours().start(task.quantized, task.rest, base, "2bit", None, total_steps=9, pretrained=pretrained, granularity=granularity)
    rule, extra = (askew.AskewSGD, {"momentum": 0.9}) if base.rule == "sgd" else (askew.AskewAdamW, {"betas": base.betas})
    optimizers, anneals = [], []
    for parameters in plain:
        weights = {"params": parameters[:2], "weight_decay": base.weight_decay, "quantizer": name, "pretrained": pretrained}
        optimizers.append(rule([weights, {"params": parameters[2:], "weight_decay": 0.0}], lr=base.lr, **extra))
        anneals.append(askew.Anneal(optimizers[-1], total_steps=9))
    generator = torch.Generator().manual_seed(0)
    for _ in range(9):
        run.optimizer.zero_grad()
        grads = [torch.randn(each.shape, generator=generator) for each in task.quantized + task.rest]
        sum((each * grad).sum() for each, grad in zip(task.quantized + task.rest, grads, strict=True)).backward()
        run.optimizer.step()
        run.stepped()
        for i, (optimizer, anneal) in enumerate(zip(optimizers, anneals, strict=True)):
            for each, grad in zip(plain[i], grads, strict=True):
                each.grad = grad[i].clone()
            optimizer.step()
            anneal.step()
    run.finish()
    for i, optimizer in enumerate(optimizers):
        optimizer.finalize()
        for each, alone in zip(task.quantized + task.rest, plain[i], strict=True):
            assert torch.equal(each[i], alone)
        for stacked, alone in zip(task.quantized, plain[i], strict=False):
            assert torch.equal(run.optimizer.state[run.parts[stacked][i]]["scale"], optimizer.state[alone]["scale"])


@pytest.mark.parametrize("base", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_full_precision_is_torchs_optimizer(base):
    task, plain = Task([0, 1]), Task([0, 1])
    task.train(FullPrecision(), "binary", base)
    rule, extra = (torch.optim.SGD, {"momentum": 0.9}) if base.rule == "sgd" else (torch.optim.AdamW, {"betas": base.betas})
    groups = [{"params": plain.quantized, "weight_decay": base.weight_decay}, {"params": plain.rest, "weight_decay": 0.0}]
    optimizer, as_it_is = rule(groups, lr=base.lr, **extra), Run(None)
    for _ in range(STEPS):
        optimizer.zero_grad()
        plain.loss(as_it_is).sum().backward()
        optimizer.step()
    for a, b in zip(task.quantized + task.rest, plain.quantized + plain.rest, strict=True):
        torch.testing.assert_close(a, b)


def test_levels_and_scales_by_hand():
    grid, rows = Grid("2bit"), torch.tensor([[-9.0, -2.1, -2.0, 0.0, 1.9, 7.0]])
    assert grid.nearest(rows, torch.tensor([[2.0]])).tolist() == [[-3, -3, -3, -1, 1, 3]]  # ties go down
    assert Grid("ternary").nearest(rows, torch.tensor([[4.0]])).tolist() == [[-4, -4, -4, 0, 0, 4]]
    level, scale = Grid("ternary").refit(rows, torch.tensor([[4.0]]))
    assert level.tolist() == [[-1, -1, -1, 0, 0, 1]]
    assert scale.item() == pytest.approx((9 + 2.1 + 2 + 7) / 4)
    _, scale = Grid("binary").refit(rows, torch.tensor([[1.0]]))
    assert scale.item() == pytest.approx(22 / 6)
    _, kept = Grid("ternary").refit(torch.zeros(1, 3), torch.tensor([[0.25]]))
    assert kept.item() == 0.25


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
    task = Task([0])
    run = prox_quant.ProxQuant().start(task.quantized, task.rest, SGD, "2bit", 0.1, total_steps=STEPS, pretrained=False)
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
    "method", [binary_connect.BinaryConnect(False), binary_connect.BinaryConnect(True), binary_connect.StraightThroughInOurBox()]
)
def test_latent_weights_stay_in_their_box(method):
    task = Task([0, 1])
    run = task.train(method, "binary", Base("sgd", 1.0))
    for latent in task.quantized:
        share = latent.detach().flatten(1).abs() / run.scale[latent]
        assert share.max().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.3, 5.0])
def test_the_relaxed_weight_is_the_minimum(strength):
    for w, level in ((0.3, 1.0), (-1.7, -1.0), (0.9, 1.0)):
        relaxed = binary_relax.relax_(torch.tensor([level], dtype=torch.float64), torch.tensor([w], dtype=torch.float64), strength)
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
    optim = pytest.importorskip("torchao.prototype.parq.optim", reason="torchao is not installed: pip install --no-deps torchao")
    from torchao.prototype.parq.quant import LSBQuantizer, UnifQuantizer

    task, theirs = Task([0, 1]), Task([0, 1]).quantized
    bits = {"binary": 1, "ternary": 0, "2bit": 2, "4bit": 4}[width]
    base = torch.optim.SGD([{"params": theirs, "quant_bits": bits}], lr=0.05, momentum=0.9)
    quantizer = LSBQuantizer() if width == "ternary" else UnifQuantizer()
    annealing = optim.ProxPARQ(anneal_start=0, anneal_end=round(parq.HARD * STEPS), steepness=steepness)
    package = optim.QuantOptimizer(base, quantizer, annealing, quant_period=1, quant_per_channel=True)
    run = parq.Parq().start(task.quantized, [], Base("sgd", 0.05), width, steepness, total_steps=STEPS, pretrained=False)
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
    assert ada_ste.slope(torch.tensor([0.3]), torch.tensor([1.0]), 0.2).item() == pytest.approx((0.404 - 0.3) / (1.2 * 0.3))
    assert ada_ste.slope(torch.tensor([9.0]), torch.tensor([1.0]), 99.999).item() == pytest.approx(2 / 9, rel=1e-4)


def test_adaste_multiplies_the_gradient():
    task = Task([0])
    run = ada_ste.AdaSte().start(task.quantized, task.rest, Base("sgd", 1.0, momentum=0.0), "binary", 2.0, total_steps=10, pretrained=False)
    before = task.quantized[0].detach().clone()
    grad = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    for each in task.quantized:
        each.grad = torch.zeros_like(each)
    task.quantized[0].grad = grad.clone()
    run.optimizer.step()
    scale = 2 * before.abs().mean()
    assert torch.equal(run.weight(task.quantized[0]).sign(), before.sign())
    torch.testing.assert_close(task.quantized[0].detach(), before - 0.1 * ada_ste.slope(before / scale, grad, 1.0) * grad)


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
    run = luq.Luq().start([], [nn.Parameter(torch.zeros(2, 1))], SGD, "4bit", None, total_steps=1, pretrained=False)
    run.input(y).sum().backward()
    assert torch.equal(y.grad, torch.ones(2, 5))  # straight through
    assert torch.equal(run.output(y), y)


def test_stochastic_binaryconnect_is_unbiased():
    task = Task([0])
    run = binary_connect.BinaryConnect(stochastic=True).start(
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


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_weight_decay_leaves_biases_alone(method):
    task = Task([0])
    width = "4bit" if "4bit" in method.widths else "binary"
    run = method.start(task.quantized, task.rest, SGD, width, method.knobs[0], total_steps=3, pretrained=False)
    for group in run.optimizer.param_groups:
        biases = any(each is bias for each in group["params"] for bias in task.rest)
        assert group["weight_decay"] == (0 if biases else SGD.weight_decay)


def test_wrong_names_say_what_is_right():
    with pytest.raises(ValueError, match="width = '3bit'; one of binary"):
        Task([0]).train(StraightThrough(), "3bit")
    with pytest.raises(ValueError, match="granularity = 'group'; 'tensor' or 'channel'"):
        Task([0]).train(StraightThrough(), "2bit", granularity="group")
    with pytest.raises(ValueError, match="rule = 'adam'; 'sgd' or 'adamw'"):
        Task([0]).train(StraightThrough(), "2bit", Base("adam", 0.1))
