"""compressed-tensors and MLX, without either: what is in their files stands for what was trained, by their formulas."""

import json
import struct

import pytest
import torch

from askew_cuda.packed.export.compressed import export_compressed
from askew_cuda.packed.export.mlx import export_mlx
from askew_cuda.packed.safetensors import TensorReader
from tests.packed.export.table import PAGE, written
from tests.packed.export.trained import packed

RULES = ["binary/group64", "ternary/channel", "2bit/group32", "4bit/group128", "int4", "3bit/group256", "6bit/channel"]


def tensors_of(path) -> dict[str, torch.Tensor]:
    with open(path, "rb") as file:
        reader = TensorReader(file, path)
        return {name: reader.read(name)[0] for name in reader.entries}


def digits(words: torch.Tensor, bits: int) -> torch.Tensor:
    """(rows, words) of 32 bits to (rows, columns), the first one lowest; word by word."""
    rows = []
    for row in words.view(torch.int32).tolist():
        unsigned = [struct.unpack("<I", struct.pack("<i", word))[0] for word in row]
        rows.append([(word >> (bits * k)) % 2**bits for word in unsigned for k in range(32 // bits)])
    return torch.tensor(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_words_and_scales_stand_for_what_was_trained(rule, dtype, tmp_path):
    model = packed(tmp_path / "a", {"layer.weight": rule}, dtype=dtype)
    wanted = model.get_parameter("layer.weight")
    bits = export_compressed(tmp_path / "a", tmp_path / "c")["layer.weight"]
    found = tensors_of(tmp_path / "c" / "model.safetensors")
    assert found["layer.weight_shape"].tolist() == [6, 512]
    whole = (digits(found["layer.weight_packed"], bits) - 2 ** (bits - 1)).to(dtype)
    scale = found["layer.weight_scale"]
    assert torch.equal(whole * scale.repeat_interleave(512 // scale.shape[1], 1), wanted)
    config = json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["layer"]
    assert group["weights"]["num_bits"] == bits
    assert group["weights"].get("group_size", 512) == 512 // scale.shape[1]

    if (rule, dtype) == ("6bit/channel", torch.float16):  # 7 bits of a scale times 6 of a level are more than it has
        with pytest.raises(ValueError, match="would be rounded"):
            export_mlx(tmp_path / "a", tmp_path / "m")
        return
    bits, size = export_mlx(tmp_path / "a", tmp_path / "m")["layer.weight"]
    found = tensors_of(tmp_path / "m" / "model.safetensors")
    q = digits(found["layer.weight"], bits).to(dtype)
    scale, bias = (found[f"layer.{part}"].repeat_interleave(size, 1) for part in ("scales", "biases"))
    assert torch.equal(q * scale + bias, wanted)
    assert torch.equal(found["bias"], model.bias)


REFUSED = [
    (export_compressed, {"layer.weight": "nf4"}, {}, r"compressed-tensors holds integers of 2, 4, 8 bits"),
    (export_compressed, {"layer.other": "ternary"}, {}, r"layer\.other, .* weights of Linear layers"),
    (export_compressed, {"layer.weight": "ternary"}, {"shape": (2, 3, 8)}, r"of two dimensions"),
    (
        export_compressed,
        {"layer.weight": "int8"},
        {"dtype": torch.bfloat16, "fits": False},
        r"round its torch.bfloat16",
    ),
    (export_mlx, {"layer.weight": "nf4"}, {}, r"layer\.weight, nf4, .* equally far apart"),
    (export_mlx, {"layer.weight": "4bit/group16"}, {}, r"rows of groups of 32, 64 or 128"),
    (export_mlx, {"layer.weight": "4bit/group32"}, {"fits": False}, r"would be rounded; scales of 7 significant bits"),
]


@pytest.mark.parametrize(("export", "rules", "how", "match"), REFUSED)
def test_what_they_can_not_hold_is_refused_by_name(export, rules, how, match, tmp_path):
    packed(tmp_path / "a", rules, **how)
    with pytest.raises(ValueError, match=match):
        export(tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_table_of_the_docs_is_that_of_the_code():
    page = PAGE.read_text()
    assert written(page) == page
