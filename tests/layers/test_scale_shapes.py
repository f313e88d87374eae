"""A scale along any dimension: its shape, its estimation, codes, a step, checkpoints, files and packed layers."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import askew_cuda as askew
from askew_cuda import backends
from askew_cuda.look import codes, distance, snap
from askew_cuda.packed import load_packed, pack_modules, save_packed
from askew_cuda.packed.inspect import inspect
from askew_cuda.quantizer import Quantizer
from askew_cuda.reference import blocks, is_scale_shape, spread
from askew_cuda.scales import estimate
from tests.compare import assert_same_bits

# weight, channel_dim, quantizer, shape of the scale
SHAPES = [
    ((6, 4), 1, "ternary/channel", (1, 4)),
    ((6, 4), -1, "ternary/channel", (1, 4)),
    ((6, 4), 1, "ternary/group3", (2, 4)),
    ((6, 4), 0, "ternary/group2", (6, 2)),
    ((6, 4, 3, 2), 1, "ternary/channel", (1, 4, 1, 1)),
    ((6, 4, 3, 2), 1, "ternary/group2", (3, 4, 3, 2)),
    ((6, 4, 3, 2), 0, "ternary/group8", (6, 3)),
    ((6, 4, 3, 2), (0, 1), "ternary/channel", (6, 4, 1, 1)),
    ((3, 8, 4), (0, 2), "ternary/channel", (3, 1, 4)),
    ((3, 8, 4), (0, 2), "ternary/group4", (3, 2, 4)),
    ((3, 8, 4), [0, 1], "ternary/channel", (3, 8, 1)),
    ((3, 8, 4), (1, 0), "ternary/group2", (3, 8, 2)),
    ((3, 8, 4), (0, 2), "ternary", ()),
    ((6,), 5, "ternary/channel", ()),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(scale: Tensor, weight: Tensor) -> Tensor:
    """The scale of each weight, one by one: index times count, divided by size."""
    if scale.dim() != weight.dim():
        rows = scale.reshape(scale.shape[0], -1) if scale.dim() else scale.reshape(1, 1)
        flat = weight.reshape(rows.shape[0], -1)
        each = flat.shape[1] // rows.shape[1]
        return torch.stack([rows[:, j // each] for j in range(flat.shape[1])], 1).reshape(weight.shape)
    found = torch.empty_like(weight)
    for index in torch.cartesian_prod(*map(torch.arange, weight.shape)).reshape(-1, weight.dim()).tolist():
        at = [i * count // size for i, count, size in zip(index, scale.shape, weight.shape, strict=True)]
        found[tuple(index)] = scale[tuple(at)]
    return found


@pytest.mark.parametrize(("shape", "channel_dim", "spec", "wanted"), SHAPES)
def test_a_scale_has_the_weights_shape_but_for_what_it_covers(shape, channel_dim, spec, wanted):
    weight, quantizer = draw(*shape), Quantizer.parse(spec)
    quantizer.check(weight, "w", channel_dim)
    assert quantizer.scale_shape(weight, channel_dim) == wanted
    assert is_scale_shape(wanted, shape)
    scale = draw(*wanted, seed=1).abs() + 0.1
    wide = by_hand(scale, weight)
    assert_same_bits(spread(scale, weight).expand(shape), wide, "spread")
    assert_same_bits(
        spread(scale, weight.mT.contiguous().mT if len(shape) > 1 else weight).expand(shape), wide, "any layout"
    )
    # what a scale covers, in logical order: all that has its number
    numbers = torch.arange(scale.numel()).reshape(wanted)
    owner = by_hand(numbers.float(), weight).flatten()
    rows = torch.stack([weight.flatten()[owner == number] for number in range(scale.numel())])
    assert_same_bits(blocks(weight, wanted), rows, "blocks")
    levels = quantizer.codebook.levels
    for function in (codes, snap, distance):
        assert_same_bits(function(weight, scale, levels), function(weight, wide, levels), function.__name__)


@pytest.mark.parametrize(("shape", "channel_dim", "spec", "wanted"), SHAPES)
@pytest.mark.parametrize("rule", ["auto", "absmean", "absmax", "sawb", "mse"])
def test_what_a_scale_covers_is_estimated_as_a_tensor_of_its_own(shape, channel_dim, spec, wanted, rule):
    book = Quantizer.parse(spec)
    quantizer = Quantizer(book.codebook, rule, book.granularity, book.group_size)
    weight = draw(*shape)
    found = estimate(weight, quantizer, pretrained=True, name="w", channel_dim=channel_dim)
    alone = [estimate(row, Quantizer(book.codebook, rule), pretrained=True, name="w") for row in blocks(weight, wanted)]
    assert_same_bits(found, torch.stack(alone).reshape(wanted), "scale")


@pytest.mark.parametrize(
    ("scale", "weight", "good"),
    [
        ((), (6, 4), True),
        ((1,), (6, 4), True),
        ((1, 1, 1), (6, 4), True),
        ((2, 2), (6, 4), True),
        ((4, 1), (6, 4), False),
        ((6,), (6, 4), False),
        ((4,), (6, 4), False),
        ((6,), (6,), True),
        ((2, 6), (2, 3, 4), True),
        ((2, 5), (2, 3, 4), False),
        ((3, 2), (2, 3, 4), False),
        ((0, 1), (6, 4), False),
        ((7, 7), (0, 4), True),
    ],
)
def test_which_scales_belong_to_a_weight(scale, weight, good):
    assert is_scale_shape(scale, weight) is good
    if not good:
        with pytest.raises(
            ValueError, match=r"a scale of shape \(.*\) does not belong to a weight of shape \(.*\); in"
        ):
            spread(torch.ones(scale), torch.ones(weight))


@pytest.mark.parametrize("channel_dim", [2, -3, (0, 0), (0, 1), ()])
def test_dimensions_that_are_none(channel_dim):
    with pytest.raises(ValueError, match=r"channel_dim = .* of w, which has 2 dimensions; the output dimension"):
        Quantizer.parse("ternary/channel").check(torch.ones(6, 4), "w", channel_dim)


def test_groups_must_divide_the_input_dimension():
    with pytest.raises(ValueError, match=r"group_size = 4 does not divide dimension 0 of w, which has 6 weights"):
        Quantizer.parse("ternary/group4").check(torch.ones(6, 4), "w", 1)


def test_a_vector_of_scales_is_taken_for_the_channels():
    given = torch.tensor([0.5, 1.0, 2.0, 4.0])
    found = estimate(
        torch.ones(6, 4), Quantizer("ternary", given, "channel"), pretrained=False, name="w", channel_dim=1
    )
    assert_same_bits(found, given.reshape(1, 4), "scale")


@pytest.mark.parametrize(("channel_dim", "fan_in"), [(0, 4), (1, 6), ((0, 2), 8), ((0, 1), 4)])
@pytest.mark.parametrize("normalized", [True, False])
def test_a_scale_by_shape_is_that_of_the_matrix_of_one_expert(channel_dim, fan_in, normalized):
    stacked = isinstance(channel_dim, tuple)
    shape = (3, 8, 4) if stacked else (6, 4)
    one = draw(*shape)[0] if stacked else draw(*shape)
    first = one if channel_dim in (0, (0, 1)) else one.T
    default = nn.Linear(first.shape[1], first.shape[0]).weight.detach()
    wanted = estimate(default, Quantizer("binary"), pretrained=False, normalized=normalized, name="w")
    found = estimate(
        torch.zeros(shape), Quantizer("binary", granularity="channel"), pretrained=False, normalized=normalized,
        name="w", channel_dim=channel_dim, fan_in=fan_in,
    )  # fmt: skip
    assert found.numel() == first.shape[0] * (3 if stacked else 1)
    assert_same_bits(found, wanted.expand(found.shape).clone(), "scale")


def stepped(spec: str, channel_dim: object, shape: tuple[int, ...], backend: str = "reference"):
    weight = nn.Parameter(draw(*shape))
    optimizer = askew.AskewSGD(
        [{"params": [("w", weight)], "channel_dim": channel_dim}], lr=0.1, momentum=0.9, quantizer=spec,
        pretrained=True, epsilon=0.2, backend=backend,
    )  # fmt: skip
    for step in range(3):
        weight.grad = draw(*shape, seed=step)
        optimizer.step()
    return weight, optimizer


@pytest.mark.parametrize(("shape", "channel_dim", "spec", "wanted"), SHAPES)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_step_is_that_of_the_scales_one_by_one(shape, channel_dim, spec, wanted, backend):
    weight, optimizer = stepped(spec, channel_dim, shape, backend)
    scale = optimizer.state[weight]["scale"]
    assert scale.shape == wanted
    start = draw(*shape)
    wide = estimate(start, Quantizer.parse(spec), pretrained=True, name="w", channel_dim=channel_dim)
    one_each = nn.Parameter(blocks(start, wanted).clone())
    rows = Quantizer(Quantizer.parse(spec).codebook, wide.reshape(-1, 1), "channel")
    other = askew.AskewSGD(
        [one_each], lr=0.1, momentum=0.9, quantizer=rows, pretrained=True, epsilon=0.2, backend="reference"
    )
    for step in range(3):
        one_each.grad = blocks(draw(*shape, seed=step), wanted).clone()
        other.step()
    assert_same_bits(blocks(weight.detach(), wanted), one_each.detach(), "weights")
    again, fresh = stepped(spec, channel_dim, shape, backend)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_bits(fresh.state[again]["scale"], scale, "from a checkpoint")


@pytest.mark.skipif(backends.extension is None, reason="the compiled extension is not there")
@pytest.mark.parametrize("scale_shape", [(1, 4, 1), (1, 1, 6), (2, 1, 6), (2, 4, 6), (1, 4, 3), (1, 2, 2)], ids=str)
def test_the_kernels_find_every_scale_in_every_memory_order(scale_shape):
    generator = torch.Generator().manual_seed(0)
    start, grad = torch.randn(2, 2, 4, 6, generator=generator)
    scale = torch.rand(scale_shape, generator=generator) + 0.1
    settings = {
        "lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False,
        "epsilon": 0.3, "anneal": "capture", "skew_at": "velocity", "recovery": 0.5, "alpha": None, "max_step": 0.5,
        "clip": True,
    }  # fmt: skip
    for order in itertools.permutations(range(3)):
        results = []
        for backend in ("reference", "cpu"):
            weight = start.permute(order).contiguous().permute([order.index(dim) for dim in range(3)])
            backends.operators(backend).sgd_([weight], [grad], [], [scale], (-1, 0, 1), [], [], **settings)
            results.append(weight)
        assert_same_bits(*results, f"memory order {order}")


def test_a_checkpoint_of_another_dimension_is_refused():
    _, optimizer = stepped("ternary/channel", 1, (6, 4))
    _, other = stepped("ternary/channel", 0, (6, 4))
    with pytest.raises(ValueError, match=r"scale of w has shape \(1, 4\) .*\(6, 1\) is needed.*channel_dim"):
        other.load_state_dict(optimizer.state_dict())


class Holder(nn.Module):
    """A weight of any shape."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.w = weight


@pytest.mark.parametrize(("shape", "channel_dim", "spec", "wanted"), SHAPES)
def test_files_keep_the_dimension(shape, channel_dim, spec, wanted, tmp_path):
    weight, optimizer = stepped(spec, channel_dim, shape)
    save_packed(Holder(weight), optimizer, tmp_path / "a")
    other = Holder(nn.Parameter(torch.zeros(shape)))
    groups = load_packed(tmp_path / "a", other)
    snapped = snap(weight, optimizer.state[weight]["scale"], Quantizer.parse(spec).codebook.levels)
    assert_same_bits(other.w.detach(), snapped, "weights")
    again = askew.AskewSGD(groups, lr=0.1)
    save_packed(other, again, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "w" in inspect(tmp_path / "a")


PACKED = [
    (nn.Linear(4, 6), torch.ones(2, 4)),
    (nn.Conv2d(4, 6, 2), torch.ones(2, 4, 3, 3)),
    (nn.Embedding(6, 4), torch.tensor([[0, 5], [3, 3]])),
]


@pytest.mark.parametrize(("layer", "given"), PACKED, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("spec", ["ternary/channel", "ternary/group2"])
def test_packed_layers_take_scales_along_the_second_dimension(layer, given, spec):
    layer = copy.deepcopy(layer)
    optimizer = askew.AskewSGD(
        [{"params": [("weight", layer.weight)], "channel_dim": 1, "quantizer": spec, "pretrained": True}]
    )
    with optimizer.quantized():
        wanted = layer(given).detach()
    assert_same_bits(pack_modules(layer, optimizer)(given).detach(), wanted, "output")
