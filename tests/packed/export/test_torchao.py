"""torchao's tensors: what it dequantizes, and what its linear layers compute, is what was trained."""

import pytest
import torch
from torch import nn

import askew_cuda as askew
from askew_cuda.packed.export.torchao import export_torchao, torchao_state
from askew_cuda.scales import short
from tests.packed.export.trained import packed

RULES = [
    "binary/channel", "ternary", "2bit/group64", "3bit/channel", "4bit/group32", "8bit/channel", "int4/group128",
    "int8",
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dtype", "fits"), [(torch.float32, False), (torch.float32, True), (torch.float16, True)])
def test_torchao_computes_what_was_trained(rule, dtype, fits, tmp_path):
    model = packed(tmp_path / "a", {"weight": rule}, dtype=dtype, fits=fits)
    found = torchao_state(tmp_path / "a")
    assert type(found["weight"]).__name__ == "IntxUnpackedToInt8Tensor"
    assert torch.equal(found["weight"].dequantize(), model.weight)
    assert torch.equal(found["bias"], model.bias)


def test_a_model_with_its_weights_computes_as_the_snapped_one(tmp_path):
    from safetensors import safe_open
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    rules = {"0.weight": "4bit/group32", "2.weight": "ternary/channel"}
    optimizer = askew.AskewSGD(askew.param_groups(model, rules, pretrained=True, verbose=False), lr=0.1)
    askew.save_packed(model, optimizer, tmp_path / "a")
    askew.load_packed(tmp_path / "a", model)
    x = torch.randn(5, 64)
    wanted = model(x)
    export_torchao(tmp_path / "a", tmp_path / "b")
    with safe_open(tmp_path / "b", "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for state in (torchao_state(tmp_path / "a"), unflatten_tensor_state_dict(tensors, metadata)[0]):
        other = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        other.load_state_dict(state, assign=True)
        assert torch.equal(other(x), wanted)


def test_what_torchao_can_not_hold_is_refused_by_name(tmp_path):
    packed(tmp_path / "a", {"weight": "nf4"})
    with pytest.raises(ValueError, match=r"weight, nf4, .* equally far apart"):
        torchao_state(tmp_path / "a")
    packed(tmp_path / "a", {"weight": "ternary"}, shape=(2, 3, 8))
    with pytest.raises(ValueError, match=r"two dimensions are needed"):
        torchao_state(tmp_path / "a")
    packed(tmp_path / "a", {"weight": "4bit"}, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16 weights are needed"):
        export_torchao(tmp_path / "a", tmp_path / "b")
    packed(tmp_path / "a", {"weight": "8bit/channel"}, dtype=torch.bfloat16, fits=False)
    with pytest.raises(ValueError, match=r"torchao rounds its torch.bfloat16 weights otherwise"):
        export_torchao(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_short_scales_keep_seven_bits():
    scale = torch.logspace(-30, 30, 1001)
    found = short(scale)
    assert torch.equal(short(found), found)
    assert float(((found - scale) / scale).abs().max()) <= 2**-7
    assert torch.equal(found.bfloat16().float(), found)
    inside = found[(found > 2**-14 * 16) & (found < 4096)]
    assert torch.equal((inside * 7.5).half().float(), inside * 7.5)
    assert torch.equal(short(scale.double()).float(), found)
    assert short(torch.ones(0)).shape == (0,)
