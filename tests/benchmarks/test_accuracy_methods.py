"""What every method of the accuracy table has to keep to: levels, names, networks that don't mix, torch's rules."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import askew_cuda as askew
from askew_cuda.quantizer import Codebook
from benchmarks.accuracy.methods.interval import Interval
from benchmarks.accuracy.methods.latent import Grid, StraightThrough
from benchmarks.accuracy.methods.method import WIDTHS, Base, FullPrecision, Run
from benchmarks.accuracy.methods.ours import Ours
from benchmarks.accuracy.methods.registry import METHODS
from examples import digits
from tests.benchmarks.regressions import ADAMW, SGD, STEPS, Regressions

pytestmark = pytest.mark.filterwarnings("ignore:finalize")  # the authors' annealing does not end on the levels
EVERY = [pytest.param(m, width, id=f"{m.name}-{width}") for m in METHODS for width in m.widths]


def test_every_row_has_its_own_name_and_widths_and_a_paper():
    assert len({method.name for method in METHODS}) == len(METHODS)
    for method in METHODS:
        assert set(method.widths) <= set(WIDTHS)
        assert method.knobs == (None,) if not method.knob else len(set(method.knobs)) == len(method.knobs) > 1
    assert [method.name for method in METHODS if not method.widths] == ["full precision"]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(("method", "width"), EVERY)
def test_ends_on_the_levels(method, width, granularity):
    task, levels = Regressions([0, 1, 2]), torch.tensor(Codebook.named(width).levels)
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
        task = Regressions(seeds)
        run = task.train(method, width, Base("sgd", 0.2))
        found.append([run.weight(latent).detach() for latent in task.quantized])
    for a, b in zip(*found, strict=True):
        assert not torch.equal(a[0], b[0])
        assert torch.equal(a[1:], b[1:])


@pytest.mark.parametrize(
    ("method", "width"), [each for each in EVERY if not set(each.id.split()) & {"stochastic-binary", "LUQ"}]
)
def test_stacked_is_alone(method, width):
    """Without chance a network is what it would have been by itself."""
    together, alone = Regressions([3, 4]), Regressions([4])
    one, other = together.train(method, width), alone.train(method, width)
    for a, b in zip(together.quantized, alone.quantized, strict=True):
        torch.testing.assert_close(one.weight(a)[1:], other.weight(b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_straight_through_is_that_of_the_example(width):
    task, base = Regressions([5]), Base("sgd", 0.05)
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


def test_wide_matrices_of_fresh_networks_take_smaller_steps():
    def rates(method, base, pretrained):
        weights = [nn.Parameter(torch.randn(2, 3, inputs)) for inputs in (16, 64, 256)]
        knob, settings = method.knobs[0], {"total_steps": 100, "pretrained": pretrained}
        return [
            group["lr"] for group in method.begin(weights, [], base, "binary", knob, **settings).optimizer.param_groups
        ]

    sgd, whole = Base("sgd", 0.5), [0.5] * 3
    assert rates(Ours(), sgd, False) == [0.5, 0.5, 0.125]
    assert rates(Ours(), sgd, True) == rates(Ours(), Base("adamw", 0.5), False) == whole
    assert rates(Interval(), sgd, False)[0] == 0.5 == rates(Interval(), sgd, False)[-1]


@pytest.mark.parametrize("base", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize(("pretrained", "granularity"), [(False, "tensor"), (True, "channel")])
def test_ours_is_the_optimizer_on_plain_networks(base, pretrained, granularity):
    """The same gradients, given: every bit of weights, scales and biases."""
    task, name = Regressions([0, 1]), "2bit" if granularity == "tensor" else "2bit/channel"
    plain = [[nn.Parameter(each[i].detach().clone()) for each in task.quantized + task.rest] for i in range(2)]
    run = Ours().begin(
        task.quantized, task.rest, base, "2bit", None, total_steps=9, pretrained=pretrained, granularity=granularity
    )
    rule, extra = (
        (askew.AskewSGD, {"momentum": 0.9}) if base.rule == "sgd" else (askew.AskewAdamW, {"betas": base.betas})
    )
    optimizers, anneals = [], []
    for parameters in plain:
        weights = {
            "params": parameters[:2],
            "weight_decay": base.weight_decay,
            "quantizer": name,
            "pretrained": pretrained,
        }
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
    task, plain = Regressions([0, 1]), Regressions([0, 1])
    task.train(FullPrecision(), "binary", base)
    rule, extra = (
        (torch.optim.SGD, {"momentum": 0.9}) if base.rule == "sgd" else (torch.optim.AdamW, {"betas": base.betas})
    )
    groups = [
        {"params": plain.quantized, "weight_decay": base.weight_decay},
        {"params": plain.rest, "weight_decay": 0.0},
    ]
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


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_weight_decay_leaves_biases_alone(method):
    task = Regressions([0])
    width = "4bit" if "4bit" in method.widths else "binary"
    run = method.begin(task.quantized, task.rest, SGD, width, method.knobs[0], total_steps=3, pretrained=False)
    for group in run.optimizer.param_groups:
        biases = any(each is bias for each in group["params"] for bias in task.rest)
        assert group["weight_decay"] == (0 if biases else SGD.weight_decay)


def test_wrong_names_say_what_is_right():
    with pytest.raises(ValueError, match="width = '3bit'; one of binary"):
        Regressions([0]).train(StraightThrough(), "3bit")
    with pytest.raises(ValueError, match="granularity = 'group'; 'tensor' or 'channel'"):
        Regressions([0]).train(StraightThrough(), "2bit", granularity="group")
    with pytest.raises(ValueError, match="rule = 'adam'; 'sgd' or 'adamw'"):
        Regressions([0]).train(StraightThrough(), "2bit", Base("adam", 0.1))
