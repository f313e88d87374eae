"""What is known of layers, on small modules of one's own: which weights, which scale, and why not the others."""

import copy
import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import askew_cuda as askew
from askew_cuda import layers
from askew_cuda.layers import is_norm, survey
from askew_cuda.param_groups import param_groups
from tests.compare import assert_same_bits

unannealed = pytest.mark.filterwarnings("ignore:finalize. :UserWarning")  # the weights have a way to go
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")


def chosen(groups: list[dict]) -> list[str]:
    return [name for group in groups if group["quantizer"] is not None for name, _ in group["params"]]


def facts(groups: list[dict]) -> dict[str, tuple[object, int]]:
    """Output dimension and fan-in of each quantized weight."""
    return {
        name: (group["channel_dim"], fan_in)
        for group in groups
        if group["quantizer"] is not None
        for (name, _), fan_in in zip(group["params"], group["fan_in"], strict=True)
    }


def table(model: nn.Module, spec: object, capsys, **keywords: object) -> dict[str, str]:
    """A line of the printed table for each parameter."""
    capsys.readouterr()
    param_groups(model, spec, **keywords)
    return {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}


def between(*middle: nn.Module) -> nn.Sequential:
    """Layers between a first and a last one: their names begin with 1, 2, .."""
    return nn.Sequential(nn.Linear(4, 4), *middle, nn.Linear(4, 4))


class Bare(nn.Module):
    """Parameters that no known layer owns."""

    def __init__(self, **parameters: Tensor):
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))


class Conv1D(nn.Module):
    """As in transformers: (in, out)."""

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(in_features, out_features)),
            nn.Parameter(torch.zeros(out_features)),
        )


class Experts(nn.Module):
    """As transformers' mixtures of experts, which state their layout."""

    def __init__(self, transposed: bool, count: int = 3, width: int = 4, hidden: int = 6):
        super().__init__()
        self.is_transposed = transposed
        shapes = {"gate_up_proj": (2 * hidden, width), "down_proj": (width, hidden)}
        for name, (outputs, inputs) in shapes.items():
            shape = (inputs, outputs) if transposed else (outputs, inputs)
            self.register_parameter(name, nn.Parameter(torch.randn(count, *shape)))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(count, 2 * hidden))


@pytest.fixture
def registered():
    """What a test registers is forgotten after it."""
    before = dict(layers._KINDS)
    yield
    layers._KINDS.clear()
    layers._KINDS.update(before)


KNOWN = [
    (nn.Linear(4, 6), {"weight": (0, 4)}),
    (nn.modules.linear.NonDynamicallyQuantizableLinear(4, 6), {"weight": (0, 4)}),
    (nn.Conv1d(4, 6, 5), {"weight": (0, 20)}),
    (nn.Conv2d(4, 6, 3), {"weight": (0, 36)}),
    (nn.Conv2d(4, 6, 3, groups=2), {"weight": (0, 18)}),
    (nn.Conv2d(4, 4, 3, groups=4), {"weight": (0, 9)}),
    (nn.Conv3d(4, 6, 2), {"weight": (0, 32)}),
    (nn.ConvTranspose1d(4, 6, 5), {"weight": (1, 20)}),
    (nn.ConvTranspose2d(4, 6, 3), {"weight": (1, 36)}),
    (nn.ConvTranspose2d(4, 6, 2, stride=2), {"weight": (1, 4)}),  # each output sees one weight of the field
    (nn.ConvTranspose2d(4, 6, 4, stride=2), {"weight": (1, 16)}),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), {"weight": (1, 18)}),
    (nn.ConvTranspose2d(4, 4, 3, groups=4), {"weight": (0, 9)}),
    (nn.ConvTranspose2d(4, 8, 3, groups=4), {"weight": ((0, 1), 9)}),
    (nn.ConvTranspose3d(4, 6, 2), {"weight": (1, 32)}),
    (nn.RNN(4, 6), {"weight_ih_l0": (0, 4), "weight_hh_l0": (0, 6)}),
    (nn.Bilinear(4, 5, 6), {"weight": (0, 20)}),
    (nn.GRUCell(4, 6), {"weight_ih": (0, 4), "weight_hh": (0, 6)}),
    (nn.LSTM(4, 6, proj_size=5), {"weight_ih_l0": (0, 4), "weight_hh_l0": (0, 5), "weight_hr_l0": (0, 6)}),
    (nn.MultiheadAttention(4, 2), {"in_proj_weight": (0, 4), "out_proj.weight": (0, 4)}),
    (
        nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
        {"q_proj_weight": (0, 4), "k_proj_weight": (0, 3), "v_proj_weight": (0, 5), "out_proj.weight": (0, 4)},
    ),
    (Experts(transposed=False), {"gate_up_proj": ((0, 1), 4), "down_proj": ((0, 1), 6)}),
    (Experts(transposed=True), {"gate_up_proj": ((0, 2), 4), "down_proj": ((0, 2), 6)}),
]


@pytest.mark.parametrize(("layer", "wanted"), KNOWN, ids=lambda each: str(each) if isinstance(each, nn.Module) else "")
def test_output_dimension_and_fan_in_of_known_layers(layer, wanted):
    found = facts(param_groups(between(layer), "ternary", verbose=False))
    assert found == {f"1.{name}": fact for name, fact in wanted.items()}


CALLED = [layer for layer, _ in KNOWN if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))]


@pytest.mark.parametrize("layer", CALLED, ids=str)
def test_fan_in_is_how_many_weights_an_output_sums_up(layer):
    """With weights and inputs of 1, away from the edges, every output is their number; on average, with a stride."""
    layer = copy.deepcopy(layer).requires_grad_(False)
    layer.weight.fill_(1)
    layer.bias.zero_()
    dims = layer.weight.dim() - 2
    output = layer(torch.ones(1, layer.weight.shape[1])) if dims == 0 else layer(torch.ones(1, 4, *[20] * dims))
    inner = output[(..., *[slice(6, -6)] * dims)]
    (_, fan_in) = facts(param_groups(between(layer), "ternary", verbose=False))["1.weight"]
    assert inner.mean().item() == fan_in


# Layers of torch, and fan-in and fan-out of their weights.
FRESH = [
    (nn.Linear(32, 48), {"weight": (32, 48)}),
    (nn.ConvTranspose2d(16, 24, 2, stride=2), {"weight": (16, 96)}),
    (nn.Bilinear(8, 6, 40), {"weight": (48, 240)}),
    (nn.RNN(24, 64), {"weight_ih_l0": (24, 64), "weight_hh_l0": (64, 64)}),
    (nn.GRU(96, 16), {"weight_ih_l0": (96, 48), "weight_hh_l0": (16, 48)}),
    (
        nn.LSTM(24, 48, proj_size=12),
        {"weight_ih_l0": (24, 192), "weight_hh_l0": (12, 192), "weight_hr_l0": (48, 12)},
    ),
    (nn.RNNCell(24, 64), {"weight_ih": (24, 64), "weight_hh": (64, 64)}),
    (nn.GRUCell(96, 16), {"weight_ih": (96, 48), "weight_hh": (16, 48)}),
    (nn.LSTMCell(24, 48), {"weight_ih": (24, 192), "weight_hh": (48, 192)}),
    (nn.MultiheadAttention(32, 2), {"in_proj_weight": (32, 96), "out_proj.weight": (32, 32)}),
    (
        nn.MultiheadAttention(32, 2, kdim=24, vdim=48),
        {
            "q_proj_weight": (32, 32),
            "k_proj_weight": (24, 32),
            "v_proj_weight": (48, 32),
            "out_proj.weight": (32, 32),
        },
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("layer", "fans"), FRESH, ids=lambda each: str(each) if isinstance(each, nn.Module) else "")
def test_fresh_weights_take_the_scale_of_their_shape_whatever_interval_they_start_in(layer, fans, dtype):
    """And nothing warns of the first clip: warnings are errors here. Once trained, they say their scale themselves."""
    model = between(copy.deepcopy(layer).to(dtype))
    optimizer = askew.AskewSGD(param_groups(model, "binary", verbose=False), lr=0.1)
    optimizer.prepare()
    by_shape = {name: math.sqrt(2 / i) * (16 / math.sqrt(i * o)) ** 0.25 for name, (i, o) in fans.items()}
    for name, wanted in by_shape.items():
        scale = optimizer.state[model.get_parameter(f"1.{name}")]["scale"].item()
        assert scale == pytest.approx(wanted, rel=1e-6), name
    with torch.no_grad():
        for name in fans:
            model.get_parameter(f"1.{name}").mul_(4)
    optimizer = askew.AskewSGD(param_groups(model, "binary", verbose=False), lr=0.1)
    with pytest.warns(UserWarning, match="pretrained=True"):
        optimizer.prepare()
    for name, least in by_shape.items():
        weight = model.get_parameter(f"1.{name}")
        wanted = max(least, weight.double().abs().mean().item())  # the latter is of the least squared error
        assert optimizer.state[weight]["scale"].item() == pytest.approx(wanted, rel=0.05)


def test_the_interval_of_fresh_weights_is_told_one_for_each_weight():
    """A weight that is listed twice in its group keeps its own number."""
    first, second = (nn.Parameter(draw) for draw in torch.rand(2, 40, 30).mul(2).sub(1).mul(torch.tensor(0.8)))
    with pytest.raises(ValueError, match=r"init_bound has 1 numbers for a group of 2 weights; one for each is needed"):
        askew.AskewSGD([first, second], quantizer="binary", init_bound=[0.8])
    group = {"params": [first, first, second], "init_bound": [0.8, 0.8, None]}
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = askew.AskewSGD([group], quantizer="binary", clip=False)
    optimizer.prepare()
    scales = [optimizer.state[weight]["scale"].item() for weight in (first, second)]
    by_shape = math.sqrt(2 / 30) * (16 / math.sqrt(30 * 40)) ** 0.25
    assert scales[0] == pytest.approx(by_shape)
    assert scales[1] == pytest.approx(second.abs().mean().item(), rel=0.05)  # of the least squared error, to 1 %


@pytest.mark.parametrize(
    ("spec", "shared"), [("binary", False), ("binary/channel", True), ("binary/group6", True), ("binary/group3", False)]
)
def test_the_table_says_where_groups_of_a_transposed_convolution_share_scales(spec, shared, capsys):
    """Their outputs lie side by side in one dimension, so that a scale for each of them can't be stated."""
    model = between(nn.ConvTranspose2d(6, 8, 3, groups=2), nn.ConvTranspose2d(6, 8, 3))
    lines = table(model, spec, capsys)
    assert ("each scale shared by the 2 groups" in lines["1.weight"]) is shared
    assert "shared" not in lines["2.weight"]


@pytest.mark.parametrize("module", ["transformers.pytorch_utils", "elsewhere"])
def test_conv1d_is_known_by_its_package_without_importing_it(module, monkeypatch):
    monkeypatch.setattr(Conv1D, "__module__", module)
    model = between(Conv1D(6, 4))
    if module == "elsewhere":
        with pytest.raises(ValueError, match=r"1\.weight \(Conv1D is not known\)"):
            param_groups(model, "ternary")
    else:
        assert facts(param_groups(model, "ternary", verbose=False)) == {"1.weight": (1, 4)}


def test_ones_own_layer_in_a_line(registered):
    class Mine(Bare):
        pass

    model = between(Mine(mix=torch.randn(6, 4), other=torch.randn(6, 4)))
    with pytest.raises(ValueError, match=r"1\.mix \(Mine is not known\)"):
        param_groups(model, "ternary")
    askew.register_layer(Mine, "mix", channel_dim=-1)
    assert facts(param_groups(model, "ternary", verbose=False)) == {"1.mix": (1, 6)}
    askew.register_layer(Mine, ["mix", "other"], fan_in=lambda module, weight: 77)
    assert facts(param_groups(model, "ternary", verbose=False)) == {"1.mix": (0, 77), "1.other": (0, 77)}
    askew.register_layer(Mine, "mix", embedding=True)
    with pytest.raises(ValueError, match=r"1\.mix \(embedding\)"):
        param_groups(model, "ternary")
    for kind, weights in ((Mine(), "mix"), (int, "mix"), (Mine, 3), (Mine, [])):
        with pytest.raises(TypeError, match=r"register_layer: .*; .* is needed"):
            askew.register_layer(kind, weights)


# Norms


class RMSNorm(Bare):
    """A norm of one's own."""


class Normalize(nn.Module):
    """It normalises pixels, and is no normalisation layer."""


class SurfaceNormalNet(nn.Sequential):
    """It sees the normals of surfaces."""


class SurfaceNorm(nn.Sequential):
    """A network whose name ends like a norm's."""


NORMS = [
    (nn.LayerNorm(4), True),
    (nn.BatchNorm2d(4, affine=False), True),
    (nn.GroupNorm(2, 4), True),
    (nn.InstanceNorm2d(4), True),
    (nn.RMSNorm(4), True),
    (RMSNorm(weight=torch.ones(4)), True),
    (type("LayerNorm2d", (Bare,), {})(weight=torch.ones(4)), True),
    (Normalize(), False),
    (SurfaceNormalNet(nn.Linear(4, 4)), False),
    (SurfaceNorm(nn.Linear(4, 4)), False),
    (RMSNorm(weight=torch.ones(4, 4)), False),
]


@pytest.mark.parametrize(("module", "norm"), NORMS, ids=lambda each: str(each).split("\n")[0])
def test_what_a_norm_is(module, norm):
    assert is_norm(module) is norm
    groups = param_groups(between(nn.Linear(4, 4), module), "ternary", verbose=False)
    assert groups[0]["normalized"] is norm


def test_gains_and_biases_change_no_scale():
    """A vector of ones, a LayerScale, a forget gate's bias: none of them is looked at."""
    model = between(nn.Linear(4, 4), Bare(scale=torch.ones(4), gamma=torch.full((4,), 1e-6)))
    optimizer = askew.AskewSGD(param_groups(model, {"1.weight": "ternary"}, verbose=False), lr=0.1)
    alone = askew.AskewSGD([{"params": [model[1].weight], "fan_in": 4}], lr=0.1, quantizer="ternary")
    for each in (optimizer, alone):
        each.prepare()
    assert_same_bits(optimizer.state[model[1].weight]["scale"], alone.state[model[1].weight]["scale"], "scale")


# Which weights


def test_first_and_last_layer_are_counted_among_known_layers(capsys):
    model = nn.Sequential()
    model.append(Bare(cls_token=torch.randn(1, 1, 4), position=torch.randn(1, 5, 4)))
    model.extend([nn.Conv2d(3, 4, 2), nn.Linear(4, 4), nn.Linear(4, 4), Bare(A_log=torch.randn(8, 4))])
    lines = table(model, "ternary", capsys)
    assert "Bare is not known" in lines["0.cls_token"]
    assert "Bare is not known" in lines["0.position"]
    assert "Bare is not known" in lines["4.A_log"]
    assert "first layer" in lines["1.weight"]
    assert "last layer" in lines["3.weight"]
    assert chosen(param_groups(model, "ternary", verbose=False)) == ["2.weight"]


def test_a_level_of_an_lstm_is_a_layer():
    model = nn.LSTM(4, 4, num_layers=3, bidirectional=True)
    found = chosen(param_groups(model, "ternary", verbose=False))
    assert found == [f"weight_{part}_l1{side}" for side in ("", "_reverse") for part in ("ih", "hh")]


def test_a_tied_weight_counts_at_every_place():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[3].weight = model[1].weight
    assert chosen(param_groups(model, "ternary", verbose=False)) == ["2.weight"]
    model[3] = model[1]  # as a layer, too
    assert chosen(param_groups(model, "ternary", verbose=False)) == ["2.weight"]


class Mixture(nn.Module):
    """A block whose experts are chosen by a Linear; a gated unit beside it has a gate of the ordinary kind."""

    def __init__(self, stacked: bool):
        super().__init__()
        self.gate, self.shared_expert_gate = nn.Linear(4, 3, bias=False), nn.Linear(4, 1, bias=False)
        self.gate_proj = nn.Linear(4, 4, bias=False)
        self.experts = Experts(False) if stacked else nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))


class TopKRouter(Bare):
    """Of a class that is called so."""


@pytest.mark.parametrize("stacked", [True, False])
def test_routers_are_left_alone_unless_they_are_named(stacked, capsys):
    model = between(Mixture(stacked), TopKRouter(weight=torch.randn(3, 4)))
    lines = table(model, "ternary/channel", capsys)
    assert all("router" in lines[name] for name in ("1.gate.weight", "1.shared_expert_gate.weight", "2.weight"))
    stacks = ["1.experts.gate_up_proj", "1.experts.down_proj"]
    quantized = ["1.gate_proj.weight", *(stacks if stacked else [f"1.experts.{i}.weight" for i in range(3)])]
    assert sorted(chosen(param_groups(model, "ternary/channel", verbose=False))) == sorted(quantized)
    assert facts(param_groups(model, {"1.gate.weight": "ternary/channel"}, verbose=False)) == {"1.gate.weight": (0, 4)}


def old_weight_norm(layer: nn.Module) -> nn.Module:
    return nn.utils.weight_norm(layer)


PARAMETRIZED = [
    (old_weight_norm, "weight_norm"),
    (nn.utils.parametrizations.weight_norm, "weight_norm"),
    (nn.utils.spectral_norm, "parametrized by spectral_norm"),
    (nn.utils.parametrizations.orthogonal, "parametrized by Orthogonal"),
]


@pytest.mark.parametrize(("change", "why"), PARAMETRIZED)
def test_parametrized_weights_are_left_alone(change, why, capsys):
    """What is trained is not what the layer computes with: that would not be on levels."""
    model = between(change(nn.Linear(4, 4)), nn.Linear(4, 4))
    lines = table(model, "ternary", capsys)
    changed = [line for name, line in lines.items() if name.startswith("1.") and "bias" not in name]
    assert changed
    assert all(line.endswith(why) for line in changed)
    assert chosen(param_groups(model, "ternary", verbose=False)) == ["2.weight"]
    assert survey(model).layers == 4


def test_a_parametrized_first_layer_is_the_first_layer():
    model = nn.Sequential(old_weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4), nn.Linear(4, 4))
    assert chosen(param_groups(model, "ternary", verbose=False)) == ["1.weight"]


def test_pruned_weights_are_quantized_where_a_level_is_zero(capsys):
    model = between(nn.Linear(4, 4), nn.Linear(4, 4))
    prune.l1_unstructured(model[1], "weight", amount=0.5)
    assert "pruned, and no level is 0" in table(model, "binary", capsys)["1.weight_orig"]
    assert chosen(param_groups(model, "ternary", verbose=False)) == ["1.weight_orig", "2.weight"]
    with pytest.raises(ValueError, match=r"1\.weight_orig is pruned, and no level of 'binary' is 0; take levels with"):
        param_groups(model, {"*": "binary"})
    prune.remove(model[1], "weight")
    optimizer = askew.AskewSGD(param_groups(model, "binary", verbose=False, pretrained=True), lr=0.1)
    with pytest.warns(UserWarning, match=r"1\.weight: 50% of its weights are exactly 0, .*pruned.*'ternary'"):
        optimizer.prepare()


@unannealed
def test_the_padding_row_of_a_quantized_embedding_stays_zero():
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=2), nn.Linear(4, 4))
    with pytest.raises(
        ValueError, match=r"0\.weight has a padding_idx.*no level of '2bit' is 0.*\{'0\.weight': None\}"
    ):
        param_groups(model, {"*": "2bit"})
    groups = param_groups(model, {"0.weight": "int2/channel", "*": "2bit"}, verbose=False)
    optimizer = askew.AskewSGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1, epsilon=0.3)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.tensor([0, 2, 4])).square().sum().backward()
        optimizer.step()
    for group in optimizer.param_groups:
        group["epsilon"] = 0.0
    optimizer.finalize()
    assert not model[0].weight[2].any()
    assert model[0].weight.any()


# Weights that start at zero


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("spec", ["binary", "2bit/channel", "4bit/group2"])
def test_weights_that_start_at_zero_take_the_scale_of_their_shape(spec, pretrained, normalized):
    """The second matrix of LoRA, the modulation of adaLN-Zero."""
    model, default = between(nn.Linear(8, 4)), nn.Linear(8, 4)
    nn.init.zeros_(model[1].weight)
    groups = param_groups(model, spec, pretrained=pretrained, normalized=normalized, verbose=False)
    optimizer = askew.AskewSGD(groups, lr=0.1)
    optimizer.prepare()
    other = askew.AskewSGD([default.weight], quantizer=spec, normalized=normalized)
    other.prepare()
    assert_same_bits(optimizer.state[model[1].weight]["scale"], other.state[default.weight]["scale"], "scale")


def test_bare_zeros_say_what_to_state():
    weight = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"nothing but zeros.*scale=0\.05.*say fan_in"):
        askew.AskewSGD([weight], quantizer="ternary").prepare()
    askew.AskewSGD([weight], quantizer="ternary", fan_in=4).prepare()


# Frozen weights


def frozen_base() -> tuple[nn.Sequential, list[dict]]:
    torch.manual_seed(0)
    model = between(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].requires_grad_(False)
    return model, param_groups(model, "ternary", verbose=False)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()


@unannealed
def test_frozen_weights_are_listed_and_keep_their_values_until_they_train(capsys, tmp_path):
    model, groups = frozen_base()
    assert "3, frozen" in table(model, "ternary", capsys)["1.weight"]
    optimizer, before = askew.AskewSGD(groups, lr=0.1, epsilon=0.0), model[1].weight.clone()
    optimizer.prepare()
    train(model, optimizer)
    with optimizer.quantized():
        assert_same_bits(model[1].weight, before, "inside quantized()")
    report = optimizer.finalize()
    assert report.left_alone == ("1.weight",)
    assert [each.name for each in report.tensors] == ["2.weight"]
    assert [weight is model[2].weight for weight, *_ in optimizer.quantized_parameters()] == [True]
    askew.save_packed(model, optimizer, tmp_path / "a")
    other, _ = frozen_base()
    askew.load_packed(tmp_path / "a", other)
    assert_same_bits(other[1].weight, before, "in the file")
    model[1].requires_grad_(True)
    train(model, optimizer)
    assert optimizer.finalize().left_alone == ()
    assert model[1].weight.unique().numel() <= 3


def test_a_checkpoint_may_leave_frozen_weights_out():
    model, groups = frozen_base()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    theirs = torch.optim.SGD(list(trained.items()), lr=0.5, momentum=0.9)
    train(model, theirs)
    optimizer = askew.AskewSGD(groups, lr=0.1, momentum=0.9)
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert model[1].weight not in optimizer.state
    buffers = [each.state[model[2].weight]["momentum_buffer"] for each in (theirs, optimizer)]
    assert_same_bits(*buffers, "momentum")
    model[1].requires_grad_(True)
    with pytest.raises(ValueError, match=r"1\.bias, 1\.weight \(2 in all\) not in the checkpoint"):
        optimizer.load_state_dict(theirs.state_dict())


@unannealed
def test_frozen_weights_are_snapped_on_request():
    model, _ = frozen_base()
    optimizer = askew.AskewSGD(param_groups(model, "ternary", quantize_frozen=True, verbose=False), epsilon=0.0)
    optimizer.finalize()
    assert model[1].weight.unique().numel() <= 3


def test_what_is_frozen_and_no_number_is_listed_only(capsys):
    model = between(nn.Linear(4, 4))
    model.register_parameter("table", nn.Parameter(torch.arange(4), requires_grad=False))
    model.register_parameter("small", nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False))
    assert "float8_e4m3fn, frozen" in table(model, "ternary", capsys)["small"]
    assert "int64, frozen" in table(model, "ternary", capsys)["table"]
    everything = [name for group in param_groups(model, "ternary", verbose=False) for name, _ in group["params"]]
    assert not {"table", "small"} & set(everything)


# Rules


@pytest.mark.parametrize("rules", [{"re:(": "ternary"}, {"re:[": None, "*": "ternary"}])
def test_a_bad_regular_expression_is_named(rules):
    with pytest.raises(ValueError, match=r"the rule 're:.*' is not a regular expression \(.*\); .*re\.fullmatch"):
        param_groups(nn.Linear(4, 4), rules)


@pytest.mark.parametrize("keywords", [{"include": "re:("}, {"exclude": ["re:*"]}, {"include": "re:nothing"}])
def test_so_are_bad_patterns_beside_one_specification(keywords):
    (rule,) = [each if isinstance(each, str) else each[0] for each in keywords.values()]
    with pytest.raises(ValueError, match=rf"the rule {re.escape(repr(rule))} (is not a regular|matches no parameter)"):
        param_groups(between(nn.Linear(4, 4)), "ternary", **keywords)


@pytest.mark.parametrize("spec", ["ternary", "ternary/channel", askew.Quantizer("ternary", "mse", "group", 2)])
def test_an_unknown_layer_named_for_a_scale_by_shape_says_what_to_state(spec):
    model = between(Bare(position=torch.randn(5, 4)))
    with pytest.raises(ValueError, match=r"1\.position .*register_layer\(Bare, 'position', channel_dim=\.\.\).*'mse'"):
        param_groups(model, {"1.position": spec}, verbose=False)
    groups = param_groups(model, {"1.position": askew.Quantizer("ternary", scale="mse")}, verbose=False)
    assert chosen(groups) == ["1.position"]


@pytest.mark.parametrize("given", [{"channel_dim": 1}, {"fan_in": 3}])
def test_layouts_are_not_keywords_of_param_groups(given):
    with pytest.raises(ValueError, match=r"decided layer by layer; use askew_cuda\.register_layer"):
        param_groups(nn.Linear(4, 4), {"*": "ternary"}, **given)


def test_a_lazy_layer_is_to_be_called_first():
    with pytest.raises(ValueError, match="call the model once"):
        param_groups(between(nn.LazyLinear(4)), "ternary")


# What is not decayed


class Listed(nn.Sequential):
    """As timm's models say it."""

    def no_weight_decay(self) -> set[str]:
        return {"1.position", "2.weight"}


@pytest.mark.parametrize("nested", [False, True])
def test_a_group_without_decay_is_split_off_on_request(nested):
    model = Listed(
        nn.Linear(4, 4), Bare(position=torch.randn(5, 4), mix=torch.randn(5, 4)), nn.Linear(4, 4), nn.LayerNorm((4, 4)),
        nn.Linear(4, 4), nn.Linear(4, 4),
    )  # fmt: skip
    at = "module." if nested else ""
    whole = nn.ModuleDict({"module": model}) if nested else model
    groups = param_groups(whole, "ternary", no_decay=True, verbose=False)
    found = [({name.removeprefix(at) for name, _ in each["params"]}, each.get("weight_decay")) for each in groups]
    vectors = {f"{i}.bias" for i in (0, 2, 4, 5)} | {"3.weight", "3.bias", "1.position"}
    assert found == [({"2.weight"}, 0), ({"4.weight"}, None), ({"0.weight", "1.mix", "5.weight"}, None), (vectors, 0)]
    optimizer = askew.AskewAdamW(groups, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0.1, 0.1, 0]
    assert len(param_groups(whole, "ternary", verbose=False)) == 2


def test_those_without_decay_can_be_named():
    model = between(nn.Linear(4, 4), nn.Linear(4, 4))
    groups = param_groups(model, "ternary", no_decay=["1.weight", "0.bias"], verbose=False)
    found = [({name for name, _ in each["params"]}, each.get("weight_decay")) for each in groups]
    rest = {"0.weight", "1.bias", "2.bias", "3.weight", "3.bias"}
    assert found == [({"1.weight"}, 0), ({"2.weight"}, None), (rest, None), ({"0.bias"}, 0)]
    assert [each["fan_in"] for each in groups[:2]] == [[4], [4]]
    with pytest.raises(ValueError, match=r"no_decay names '1\.wait', which the model does not have"):
        param_groups(model, "ternary", no_decay={"1.wait"}, verbose=False)


@pytest.mark.parametrize(("rank", "prints"), [("0", True), ("3", False)])
def test_only_rank_0_prints_the_table(rank, prints, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    param_groups(between(nn.Linear(4, 4)), "ternary")
    assert bool(capsys.readouterr().out) is prints


def test_a_checkpoint_brings_no_layouts_along():
    """They belong to the weights of this model, whose order may be another one."""
    model = between(nn.Linear(8, 4), nn.Linear(4, 8))
    groups = param_groups(model, "ternary", verbose=False)
    assert groups[0]["fan_in"] == [8, 4]
    optimizer = askew.AskewSGD(groups, lr=0.1)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group.pop("fan_in"), group.pop("channel_dim"), group.pop("trained_norms")
        group["normalized"] = None  # as older versions wrote
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["fan_in"] == [8, 4]
    assert math.prod(optimizer.param_groups[0]["params"][0].shape) == 32
