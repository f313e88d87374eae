"""Packed layers: outputs of the snapped model to the last bit, from codes and scales alone."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import askew_cuda as askew
from askew_cuda.packed import load_packed, save_packed
from askew_cuda.packed.modules import PACKED, PackedConv2d, PackedEmbedding, PackedLinear, pack_modules


class Net(nn.Module):
    """An embedding, convolutions of several kinds and linear layers."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.embed = nn.Embedding(11, 27, padding_idx=0, dtype=dtype)
        self.conv = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect", dtype=dtype),
            nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2, bias=False, dtype=dtype),
        )
        self.head = nn.Linear(16, 5, dtype=dtype)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        """(n, 3) indices to (n, 5)."""
        image = self.embed(index).reshape(-1, 3, 9, 3)[:, :, :6].repeat(1, 1, 1, 2)[:, :, :4, :4] * 1.7
        return self.head(self.conv(image).flatten(1))


INDEX = torch.tensor([[0, 3, 10], [4, 4, 1], [2, 9, 8]])
RULES = {"embed.weight": "int4", "conv.0.weight": "ternary", "conv.1.weight": "nf4", "head.weight": "binary"}


def trained(granularity: str = "channel", dtype: torch.dtype = torch.float32, seed: int = 0, change=lambda model: None):
    """A network off its levels, its optimizer, and a copy with the snapped weights."""
    torch.manual_seed(seed)
    model = Net(dtype)
    change(model)
    rules = {
        name: f"{book}/{granularity if name != 'head.weight' else granularity.replace('9', '8')}"
        for name, book in RULES.items()
    }
    optimizer = askew.AskewSGD(askew.param_groups(model, rules, verbose=False, pretrained=True), lr=0.1)
    optimizer.prepare()
    with optimizer.quantized():
        snapped = copy.deepcopy(model)
    return model, optimizer, snapped


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group9"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ternary", ["1.6bit", "2bit"])
def test_outputs_are_those_of_the_snapped_model(granularity, dtype, ternary):
    model, optimizer, snapped = trained(granularity, dtype)
    wrong = model(INDEX)
    packed = pack_modules(model, optimizer, ternary=ternary)
    assert packed is model
    assert [type(layer) for layer in (model.embed, *model.conv, model.head)] == [
        PackedEmbedding,
        PackedConv2d,
        PackedConv2d,
        PackedLinear,
    ]
    assert torch.equal(packed(INDEX), snapped(INDEX))
    assert not torch.equal(wrong, snapped(INDEX))
    for layer, plain in zip(
        (model.embed, *model.conv, model.head), (snapped.embed, *snapped.conv, snapped.head), strict=True
    ):
        assert torch.equal(layer.weight, plain.weight)
        with pytest.raises(KeyError, match="weight"):
            layer.weight = nn.Parameter(plain.weight)  # would be shadowed


LAYERS = [
    (nn.Linear(6, 4), [(3, 6)]),
    (nn.Bilinear(3, 2, 4), [(5, 3), (5, 2)]),
    (nn.Conv1d(6, 4, 3, groups=2), [(2, 6, 7)]),
    (nn.Conv2d(6, 4, 3, padding="same", padding_mode="circular"), [(2, 6, 7, 5)]),
    (nn.Conv3d(6, 4, 2, dilation=2, bias=False), [(2, 6, 4, 4, 4)]),
    (nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1), [(2, 6, 7)]),
    (nn.ConvTranspose2d(6, 4, 3, groups=2), [(2, 6, 7, 5)]),
    (nn.ConvTranspose3d(6, 6, 3, groups=6), [(2, 6, 3, 3, 3)]),
]


@pytest.mark.parametrize(("layer", "shapes"), LAYERS, ids=lambda each: str(each) if isinstance(each, nn.Module) else "")
@pytest.mark.parametrize("spec", ["binary", "ternary/channel", "4bit/group3"])
def test_every_kind_of_layer_computes_what_the_snapped_one_does(layer, shapes, spec):
    model = copy.deepcopy(layer)
    groups = askew.param_groups(model, {"weight": spec}, verbose=False, pretrained=True)
    optimizer = askew.AskewSGD(groups, lr=0.1)
    optimizer.prepare()
    given = [torch.randn(shape) for shape in shapes]
    with optimizer.quantized(), torch.no_grad():
        wanted = model(*given)
    assert not torch.equal(model(*given), wanted)
    packed = pack_modules(model, optimizer)
    assert type(packed) is PACKED[type(layer)]
    assert isinstance(packed, type(layer))
    assert torch.equal(packed(*given), wanted)


def test_every_kind_of_layer_is_among_those_that_are_tried():
    assert {type(layer) for layer, _ in LAYERS} | {nn.Embedding} == set(PACKED)


def test_outputs_in_channels_last_are_those_of_the_snapped_model():
    model, optimizer, snapped = trained(change=lambda model: model.to(memory_format=torch.channels_last))
    pack_modules(model, optimizer)
    assert (
        model.conv[0].weight.stride() == snapped.conv[0].weight.stride() != model.conv[0].weight.contiguous().stride()
    )
    assert torch.equal(model(INDEX), snapped(INDEX))


def test_only_codes_and_scales_are_held():
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False))
    optimizer = askew.AskewSGD(
        askew.param_groups(model, {"0.weight": "ternary", "1.weight": "4bit/group128"}, verbose=False), lr=0.1
    )
    pack_modules(model, optimizer)
    assert list(model.parameters()) == []
    assert {name: tuple(buffer.shape) for name, buffer in model.named_buffers()} == {
        "0.codes": (13108,),
        "0.scale": (),
        "1.codes": (32768,),
        "1.scale": (256, 2),
    }
    held = [value for layer in model for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    assert held == []


def test_repr_says_bits_and_shape():
    model, optimizer, _ = trained()
    pack_modules(model, optimizer)
    assert (
        repr(model.head)
        == "PackedLinear(in_features=16, out_features=5, bias=True, weight=5x16 float32, binary/channel, 1 bit)"
    )
    assert "weight=6x3x3x3 float32, ternary/channel, 1.6 bit" in repr(model.conv[0])
    assert repr(model.embed) == "PackedEmbedding(11, 27, padding_idx=0, weight=11x27 float32, int4/channel, 4 bit)"


def test_state_dict_goes_through_a_file_and_back():
    model, optimizer, snapped = trained()
    pack_modules(model, optimizer)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other, theirs, _ = trained(seed=1)
    pack_modules(other, theirs)
    assert not torch.equal(other(INDEX), snapped(INDEX))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(INDEX), snapped(INDEX))
    assert all(isinstance(value, torch.Tensor) for value in model.state_dict().values())


def test_codes_of_another_codebook_are_refused():
    model = nn.Linear(4, 4)
    layers = []
    for book in ("2bit", "int2"):
        optimizer = askew.AskewSGD(askew.param_groups(model, {"weight": book}, verbose=False), lr=0.1)
        layers.append(pack_modules(model, optimizer))
    before = layers[0].scale.clone()
    with pytest.raises(
        RuntimeError, match=r"codes: packed as .*-2\.0, -1\.0, 0\.0, 1\.0.*-1\.5, -0\.5, 0\.5, 1\.5.*is needed"
    ):
        layers[0].load_state_dict(layers[1].state_dict())
    assert torch.equal(layers[0].scale, before)


def test_a_model_that_is_one_layer_comes_back_packed():
    model = nn.Linear(4, 4)
    packed = pack_modules(
        model, askew.AskewSGD([("weight", model.weight)], lr=0.1, quantizer=askew.Quantizer([-2, 0, 1]))
    )
    assert "weight=4x4 float32, 3 levels/tensor, 1.6 bit" in repr(packed)
    assert isinstance(packed, PackedLinear)
    assert packed.bias is model.bias


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16])
def test_casting_a_packed_model_gives_what_casting_the_snapped_one_does(dtype, start):
    model, optimizer, snapped = trained(dtype=start)
    scale = optimizer.state[model.head.weight]["scale"]
    pack_modules(model, optimizer).to(dtype)
    snapped.to(dtype)
    assert torch.equal(model.head.scale, scale)
    assert model.head.scale.dtype == torch.float32
    assert model.head.weight.dtype == dtype
    assert torch.equal(model(INDEX), snapped(INDEX))
    assert torch.equal(copy.deepcopy(model)(INDEX), snapped(INDEX))


def test_tied_weights_share_their_codes():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9), "again": nn.Identity()})
    model["head"].weight, model["again"] = model["embed"].weight, model["head"]
    optimizer = askew.AskewSGD(askew.param_groups(model, {"embed.weight": "ternary/channel"}, verbose=False), lr=0.1)
    pack_modules(model, optimizer)
    assert model["embed"].codes is model["head"].codes
    assert model["again"] is model["head"]
    assert isinstance(model["head"], PackedLinear)


def test_hooks_stay_and_gradients_reach_the_input():
    model, optimizer, snapped = trained()
    seen = []
    handle = model.head.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    pack_modules(model, optimizer)
    x = torch.randn(2, 16, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    model.head(x).square().sum().backward()
    snapped.head(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(model.head.bias.grad, snapped.head.bias.grad)
    handle.remove()
    model.head(x)
    assert seen == [PackedLinear]


@pytest.mark.parametrize("index", [-1, 11])
def test_an_index_outside_of_the_embedding_is_refused(index):
    model, optimizer, _ = trained()
    pack_modules(model, optimizer)
    with pytest.raises(IndexError, match=r"outside of \[0, 11\)"):
        model.embed(torch.tensor([0, index]))
    assert model.embed(torch.zeros(0, 2, dtype=torch.int32)).shape == (0, 2, 27)


def test_the_layers_move_as_others_do():
    model, optimizer, snapped = trained()
    pack_modules(model, optimizer).share_memory()
    assert model.head.codes.is_shared()
    state = model.state_dict()
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(model(INDEX), snapped(INDEX))


def test_reset_parameters_is_refused():
    model, optimizer, _ = trained()
    pack_modules(model, optimizer)
    with pytest.raises(RuntimeError, match="packed layers are not trained"):
        model.head.reset_parameters()


class Special(nn.Linear):
    """A layer with a forward pass of its own, perhaps."""


class Experts(nn.Module):
    """As transformers' mixtures of experts."""

    is_transposed = False

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(2, 4, 4))


def pruned() -> nn.Linear:
    return prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5)


def with_own_forward() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x @ layer.weight
    return layer


REFUSED = [
    *(
        pytest.param(layer, f"1.{name}", rf"1\.{name}: {name} of {kind} can't be packed; .*save_packed", id=kind)
        for kind, layer, name in (
            ("EmbeddingBag", lambda: nn.EmbeddingBag(4, 4), "weight"),
            ("LSTM", lambda: nn.LSTM(4, 4), "weight_hh_l0"),
            ("GRUCell", lambda: nn.GRUCell(4, 4), "weight_ih"),
            ("MultiheadAttention", lambda: nn.MultiheadAttention(4, 2), "in_proj_weight"),
            ("Experts", Experts, "up_proj"),
        )
    ),
    pytest.param(pruned, "1.weight_orig", r"1\.weight_orig: weight_orig of Linear can't be packed", id="pruned"),
    pytest.param(lambda: Special(4, 4), "1.weight", r"1\.weight: weight of Special can't be packed", id="subclass"),
    pytest.param(
        lambda: nn.MultiheadAttention(4, 2), "1.out_proj.weight", r"NonDynamicallyQuantizableLinear", id="attention"
    ),
    pytest.param(lambda: nn.Linear(4, 4), "1.bias", r"1\.bias: bias of Linear can't be packed", id="bias"),
    pytest.param(
        lambda: nn.Embedding(4, 4, max_norm=1.0), "1.weight", r"1\.weight: an Embedding with max_norm", id="max_norm"
    ),
    pytest.param(with_own_forward, "1.weight", r"1\.weight: forward\(\) of its layer was replaced", id="forward"),
]


@pytest.mark.parametrize(("layer", "name", "match"), REFUSED)
def test_what_can_not_be_packed_is_refused_before_anything_changes(layer, name, match):
    model = nn.Sequential(nn.Linear(4, 4), layer())
    before = list(model)
    optimizer = askew.AskewSGD(
        askew.param_groups(model, {"0.weight": "ternary", name: "ternary"}, verbose=False), lr=0.1
    )
    with pytest.raises(ValueError, match=match):
        pack_modules(model, optimizer)
    assert all(now is then for now, then in zip(model, before, strict=True))
    assert type(model[0]) is nn.Linear


def test_weights_that_are_nan_or_elsewhere_are_refused_before_anything_changes():
    model, optimizer, _ = trained()
    with pytest.raises(ValueError, match=r"is not in the model"):
        pack_modules(model.head, optimizer)
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"head\.weight holds 1 NaN"):
        pack_modules(model, optimizer)
    with pytest.raises(TypeError, match=r"optimizer = SGD"):
        pack_modules(model, torch.optim.SGD(model.parameters()))
    assert [type(layer) for layer in (model.embed, *model.conv, model.head)] == [
        nn.Embedding,
        nn.Conv2d,
        nn.Conv2d,
        nn.Linear,
    ]


def test_from_the_file_to_packed_layers(tmp_path):
    model, optimizer, snapped = trained()
    save_packed(model, optimizer, tmp_path / "a")
    other = Net()
    groups = load_packed(tmp_path / "a", other)
    assert torch.equal(pack_modules(other, askew.AskewSGD(groups, lr=0.1))(INDEX), snapped(INDEX))
