"""The scale between normalisation layers, and who knows of them."""

import math

import pytest
import torch
from torch import nn

import askew_cuda as askew
from askew_cuda import scales
from askew_cuda.quantizer import Quantizer
from askew_cuda.scales import estimate
from tests.compare import assert_close, assert_same_bits


@pytest.mark.parametrize("init", ["torch", "normal(.02)", "He"])
@pytest.mark.parametrize("shape", [(48, 32), (8, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("quantizer", ["binary", "ternary/channel", "4bit"])
def test_between_normalisation_layers_the_levels_are_as_large_as_torchs_init_whatever_the_init(init, shape, quantizer):
    fan_in = math.prod(shape[1:])
    size = {"torch": 1 / math.sqrt(3 * fan_in), "normal(.02)": 0.02, "He": math.sqrt(2 / fan_in)}[init]
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(shape, generator=generator) * 2 - 1
    weight = size * (math.sqrt(3) * uniform if init == "torch" else torch.randn(shape, generator=generator))
    quantizer = Quantizer.parse(quantizer)
    found = estimate(weight, quantizer, pretrained=False, normalized=True, name="w")
    wanted = torch.full_like(found, 1 / math.sqrt(3 * fan_in) / quantizer.codebook.rms)
    assert_close(found, wanted, 1e-6 * wanted.max().item(), "scale")


@pytest.mark.parametrize(
    ("name", "between", "without"), [("binary", 1, None), ("ternary", 0.85, 1), ("2bit", 0.85, 0.85), ("4bit", 1, 1)]
)
@pytest.mark.parametrize("granularity", ["", "/channel"])
def test_trained_weights_say_it_themselves_and_without_normalisation_the_signal_must_not_fade(
    name, between, without, granularity
):
    weight, quantizer = (
        torch.randn(24, 32, generator=torch.Generator().manual_seed(1)),
        Quantizer.parse(name + granularity),
    )
    mse = estimate(weight, Quantizer(name, "mse", quantizer.granularity), pretrained=True, name="w")
    dim = 1 if granularity else None
    rms, size = weight.square().mean(dim).sqrt().reshape(mse.shape), weight.abs().mean(dim).reshape(mse.shape)
    dilution = (math.sqrt(2 / math.pi) * rms / size).clamp(min=1) if name in ("binary", "2bit") else 1.0
    for normalized, wanted in ((True, between * mse), (False, dilution * (rms if without is None else without * mse))):
        assert_close(estimate(weight, quantizer, pretrained=True, normalized=normalized, name="w"), wanted, 1e-6, name)
    asymmetric = Quantizer([0, 1])
    assert_same_bits(
        estimate(weight, asymmetric, pretrained=True, name="w"),
        scales.min_mse(weight.reshape(1, -1), asymmetric.codebook).float()[0],
        "0 1",
    )


@pytest.mark.parametrize("dead", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("name", ["binary", "ternary", "2bit"])
def test_dead_weights_take_nothing_off_the_scale(name, dead):
    """As weight decay leaves them: those of inputs that are always 0, and of units that never fire. A level at 0 takes
    them in.
    """
    live = torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    weight = torch.cat([live, torch.zeros(round(10_000 * dead / (1 - dead)))])
    without, among = (estimate(w, Quantizer(name), pretrained=True, name="w").item() for w in (live, weight))
    assert among == pytest.approx(without, rel=0.02)


def test_weights_of_one_size_keep_it():
    """They lie on two levels already: nothing fades, and there is no telling who is dead."""
    assert estimate(torch.tensor([3.0, -3.0, 3.0]), Quantizer("binary"), pretrained=True, name="w") == 3


def normalized_network(norm: nn.Module | None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), *([] if norm is None else [norm]), nn.Linear(6, 6))


@pytest.mark.parametrize("norm", [None, nn.LayerNorm(6), nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False)], ids=str)
def test_who_knows_that_a_network_is_normalised(norm):
    """param_groups looks at the modules; an optimizer by itself looks at nothing beside the weight; the keyword tells
    both.
    """
    model = normalized_network(norm)
    by_norm, by_shape = (
        1 / math.sqrt(3 * 6),
        estimate(model[0].weight, Quantizer("binary"), pretrained=False, name="w").item(),
    )
    assert abs(by_norm - by_shape) > 0.1

    def scale(groups: object, **keywords: object) -> float:
        optimizer = askew.AskewSGD(groups, lr=0.1, **keywords)
        optimizer.prepare()
        return optimizer.state[model[0].weight]["scale"].item()

    seen = norm is not None
    assert scale(askew.param_groups(model, {"*": "binary"}, verbose=False)) == pytest.approx(
        by_norm if seen else by_shape
    )
    matrices = [
        {"params": [model[0].weight], "quantizer": "binary"},
        {"params": [p for p in model.parameters() if p.dim() == 1]},
    ]
    assert scale(matrices) == pytest.approx(by_shape)
    for told in (True, False):
        groups = askew.param_groups(model, {"*": "binary"}, verbose=False, normalized=told)
        assert scale(groups) == pytest.approx(by_norm if told else by_shape)
        assert scale(matrices, normalized=told) == pytest.approx(by_norm if told else by_shape)


def test_only_a_trained_network_is_warned_that_the_first_clip_tears_it():
    """A fresh one, whose gains are 1 still, may have any init."""
    model = normalized_network(nn.LayerNorm(6))
    with torch.no_grad():
        model[0].weight.normal_(0, 5)
    # warnings are errors here
    askew.AskewSGD(askew.param_groups(model, {"0.weight": "binary"}, verbose=False), lr=0.1).prepare()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 1.5)
    with pytest.warns(UserWarning, match="pretrained=True"):
        askew.AskewSGD(askew.param_groups(model, {"0.weight": "binary"}, verbose=False), lr=0.1).prepare()


def normalized_weights(model: nn.Module, **keywords: object) -> dict[str, bool]:
    """Which quantized weights are said to lie between normalisation layers."""
    groups = askew.param_groups(model, {"*": "binary"}, verbose=False, **keywords)
    return {name: group["normalized"] for group in groups if group["quantizer"] for name, _ in group["params"]}


def test_the_end_of_a_network_is_not_between_norms():
    """What it says depends on the scale there, which is that of a network without norms, and learns."""
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6))
    assert normalized_weights(model) == {"0.weight": True, "2.weight": True, "4.weight": False}
    optimizer = askew.AskewSGD(askew.param_groups(model, {"*": "binary"}, verbose=False), lr=0.1)
    optimizer.prepare()
    inner, end = optimizer.state[model[2].weight], optimizer.state[model[4].weight]
    assert end["scale"].item() == pytest.approx(
        estimate(model[4].weight, Quantizer("binary"), pretrained=False, name="w").item()
    )
    assert inner["scale"].item() == pytest.approx(1 / math.sqrt(3 * 6))
    assert "scale_growth" in end
    assert "scale_growth" not in inner
    assert all(normalized_weights(model[:4]).values())  # a norm follows the last layer
    assert all(normalized_weights(model, pretrained=True).values())  # the weights tell their scale
    assert all(normalized_weights(model, normalized=True).values())  # as told
    assert not any(normalized_weights(model, normalized=False).values())
    model[4].weight = model[0].weight  # tied: it lies before a norm, too
    assert all(normalized_weights(model).values())
