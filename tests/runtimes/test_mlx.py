"""MLX: what it dequantizes is what was trained."""

import json

import pytest
import torch

from askew_cuda.packed.export.mlx import export_mlx
from tests.packed.export.trained import packed

mx = pytest.importorskip("mlx.core", reason="make test-runtimes installs it")
CASES = {
    "binary/group64": (2, 64), "ternary/channel": (2, 128), "2bit/group32": (2, 32), "4bit/group128": (4, 128),
    "int4": (4, 128), "3bit/group256": (4, 128), "6bit/channel": (8, 128),
}  # fmt: skip


# 6 bits of a level times 7 of a scale are more than float16 has: refused, as tests/packed/export/test_words.py says.
EACH = [(rule, dtype) for rule in CASES for dtype in (torch.float32, torch.float16)]
EACH.remove(("6bit/channel", torch.float16))


@pytest.mark.parametrize(("rule", "dtype"), EACH)
def test_mlx_computes_what_was_trained(rule, dtype, tmp_path):
    model = packed(tmp_path / "a", {"layer.weight": rule}, dtype=dtype)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "tiny"}))
    made = export_mlx(tmp_path / "a", tmp_path / "out", config=tmp_path / "config.json")
    assert made == {"layer.weight": CASES[rule]}
    bits, size = CASES[rule]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "tiny"
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (bits, size)
    arrays = mx.load(str(tmp_path / "out" / "model.safetensors"))
    found = mx.dequantize(
        arrays["layer.weight"], arrays["layer.scales"], arrays["layer.biases"], group_size=size, bits=bits
    )
    assert torch.equal(torch.tensor(found.tolist(), dtype=dtype), model.get_parameter("layer.weight"))


def test_a_layer_of_mlx_computes_with_them(tmp_path):
    """nn.QuantizedLinear takes the arrays as they are named."""
    from mlx import nn as layers

    model = packed(tmp_path / "a", {"layer.weight": "4bit/group64"}, shape=(32, 128))
    export_mlx(tmp_path / "a", tmp_path / "out")
    arrays = mx.load(str(tmp_path / "out" / "model.safetensors"))
    layer = layers.QuantizedLinear(128, 32, bias=False, group_size=64, bits=4)
    layer.load_weights([(key, arrays[f"layer.{key}"]) for key in ("weight", "scales", "biases")])
    eye = layer(mx.eye(128))
    assert torch.equal(torch.tensor(eye.tolist()).mT, model.get_parameter("layer.weight"))
