"""BitNet checkpoints: what their layers multiply by is what is trained on."""

import json

import pytest
import torch
from torch import nn

import askew_cuda as askew
from askew_cuda.packed.export.bitnet import load_bitnet
from askew_cuda.packed.safetensors import TensorWriter


def write(folder, tensors, **config) -> None:
    said = {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline", **config}
    (folder / "config.json").write_text(json.dumps({"quantization_config": said}))
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with open(folder / "model.safetensors", "wb") as file:
        writer = TensorWriter(file, described, lambda digests: {})
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()


def network(dtype=torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8, bias=False, dtype=dtype), nn.LayerNorm(8, dtype=dtype))


def checkpoint(scale: float, dtype=torch.float32) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Ternary numbers, and the tensors that hold them: row r of 8 in bits 2 (r // 2) of row r % 2."""
    ternary = torch.randint(-1, 2, (8, 6), generator=torch.Generator().manual_seed(0))
    packed = torch.zeros(2, 6, dtype=torch.uint8)
    for row in range(8):
        for column in range(6):
            packed[row % 2, column] |= int(ternary[row, column] + 1) << 2 * (row // 2)
    tensors = {"0.weight": packed, "0.weight_scale": torch.tensor([scale], dtype=dtype)}
    return ternary, {**tensors, "1.weight": torch.ones(8, dtype=dtype), "1.bias": torch.zeros(8, dtype=dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layer", "scale"), [("bitlinear", 8.0), ("autobitlinear", 0.125)])
def test_weights_are_those_of_its_layers_and_train_on(layer, scale, dtype, tmp_path):
    ternary, tensors = checkpoint(scale, dtype)
    write(tmp_path, tensors, linear_class=layer)
    model = network(dtype)
    groups = load_bitnet(tmp_path, model)
    assert torch.equal(model[0].weight, ternary.to(dtype) * 0.125)
    optimizer = askew.AskewSGD(groups, lr=0.1)
    assert float(optimizer.state[model[0].weight]["scale"]) == 0.125
    assert groups[0]["quantizer"] == "ternary"
    askew.save_packed(model, optimizer, tmp_path / "a")
    again = network(dtype)
    askew.load_packed(tmp_path / "a", again)
    assert torch.equal(again[0].weight, model[0].weight)


def test_what_is_no_such_checkpoint_is_refused_and_changes_nothing(tmp_path):
    _, tensors = checkpoint(8.0)

    def refused(match: str, changed: dict[str, torch.Tensor | None], **config) -> None:
        kept = {name: value for name, value in {**tensors, **changed}.items() if value is not None}
        write(tmp_path, kept, **config)
        model = network()
        before = [value.clone() for value in model.state_dict().values()]
        with pytest.raises(ValueError, match=match):
            load_bitnet(tmp_path, model)
        assert all(map(torch.equal, before, model.state_dict().values()))

    refused(r"config\.json: quant_method = 'gptq'", {}, quant_method="gptq")
    refused(r"quantization_mode = 'online'; .* weights that are packed", {}, quantization_mode="online")
    refused(r"1\.bias \(1 in all\) of the model are not in it", {"1.bias": None})
    refused(r"'0.weight' has shape \(12, 6\); \(8, 6\)", {"0.weight": torch.zeros(3, 6, dtype=torch.uint8)})
    refused(r"'0.weight' holds a 3", {"0.weight": torch.full((2, 6), 255, dtype=torch.uint8)})
    refused(r"'0.weight_scale', the one scale", {"0.weight_scale": None})
    for bad in (0.0, -1.0, torch.nan, torch.inf):
        refused(r"'0.weight_scale' is .*; a positive number", {"0.weight_scale": torch.tensor([bad])})
    refused(r"'1.weight' is torch.float64; torch.float32", {"1.weight": torch.ones(8).double()})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: it is not JSON"):
        load_bitnet(tmp_path, network())
