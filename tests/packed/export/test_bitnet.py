"""BitNet checkpoints: what their layers multiply by is what is trained on, and written again; damaged ones change
nothing."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import askew_cuda as askew
from askew_cuda.packed.export.bitnet import export_bitnet, load_bitnet, packed_of
from askew_cuda.packed.export.compressed import export_compressed
from askew_cuda.packed.export.mlx import export_mlx
from askew_cuda.packed.file import Trained
from askew_cuda.packed.safetensors import TensorReader, TensorWriter
from tests.packed.export.mutations import mutated
from tests.packed.export.trained import packed


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
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: it is a list; an object"):
        load_bitnet(tmp_path, network())


def tensors_in(folder) -> dict[str, torch.Tensor]:
    with open(folder / "model.safetensors", "rb") as file:
        reader = TensorReader(file, folder)
        return {name: reader.read(name)[0] for name in reader.entries}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layer", "scale"), [("bitlinear", 11.3), ("bitlinear", 8.0), ("autobitlinear", 0.0137)])
def test_there_and_back_is_the_same_checkpoint(layer, scale, dtype, tmp_path):
    """Also after training on: the same scale, and the numbers that were trained."""
    _, tensors = checkpoint(scale, dtype)
    write(tmp_path, tensors, linear_class=layer, rms_norm_eps=1e-5)
    config = tmp_path / "config.json"
    model = network(dtype)
    optimizer = askew.AskewSGD(load_bitnet(tmp_path, model), lr=0.5, total_steps=30)
    askew.save_packed(model, optimizer, tmp_path / "a")
    assert export_bitnet(tmp_path / "a", tmp_path / "b", config=config) == {"0.weight": "ternary"}
    found = tensors_in(tmp_path / "b")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    said, before = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "b", tmp_path))
    kept = {**before["quantization_config"], "modules_to_not_convert": []}
    assert said["quantization_config"] == kept
    x, y = torch.randn(32, 6, dtype=dtype), torch.randn(32, 8, dtype=dtype)
    for _ in range(30):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    optimizer.finalize()
    askew.save_packed(model, optimizer, tmp_path / "a")
    export_bitnet(tmp_path / "a", tmp_path / "c", config=config)
    trained = tensors_in(tmp_path / "c")
    assert not torch.equal(trained["0.weight"], tensors["0.weight"])
    assert torch.equal(trained["0.weight_scale"], tensors["0.weight_scale"])
    again = network(dtype)
    load_bitnet(tmp_path / "c", again)
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def test_what_was_trained_here_becomes_a_checkpoint(tmp_path):
    model = packed(tmp_path / "a", {"layer.weight": "ternary"}, shape=(8, 6))
    export_bitnet(tmp_path / "a", tmp_path / "b")
    said = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert (said["quant_method"], said["linear_class"]) == ("bitnet", "autobitlinear")
    found = tensors_in(tmp_path / "b")
    digits = torch.cat([found["layer.weight"] >> 2 * place & 3 for place in range(4)]).float() - 1
    assert torch.equal(digits * found["layer.weight_scale"], model.get_parameter("layer.weight"))


REFUSED = [
    (
        {"layer.weight": "int4"},
        (8, 6),
        r"layer\.weight, int4, .* ternary weights with one scale .* It fits onnx, torchao",
    ),
    ({"layer.weight": "ternary/channel"}, (8, 256), r"with one scale per tensor\. It fits gguf, onnx, torchao"),
    ({"layer.weight": "ternary"}, (6, 8), r"a multiple of 4 outputs\. It fits onnx, torchao, compressed-tensors$"),
    ({"layer.weight": "nf4"}, (8, 6), r"No format here holds it$"),
]


@pytest.mark.parametrize(("rules", "shape", "match"), REFUSED)
def test_what_bitnet_can_not_hold_is_refused_by_name(rules, shape, match, tmp_path):
    packed(tmp_path / "a", rules, shape=shape)
    with pytest.raises(ValueError, match=match):
        export_bitnet(tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scale_whose_inverse_is_no_number_of_the_weights_is_refused():
    """Of bfloat16: inverses near 0.5 lie farther apart than scales near 2."""
    codes, scale = torch.tensor([0, 1, 2, 2], dtype=torch.uint8).reshape(4, 1), torch.tensor(1.9921875)
    trained = Trained(askew.Quantizer("ternary"), 0, torch.bfloat16, codes, scale)
    with pytest.raises(ValueError, match=r"scale is 1\.9921875, which weight_scale, its inverse, of torch\.bfloat16"):
        packed_of("a.weight", trained, -1)
    assert packed_of("a.weight", trained, 1)[1].tolist() == [1.9921875]


def refusal(of, *arguments, **keywords) -> str | None:
    """The message of the ValueError, or None; any other exception comes through."""
    try:
        of(*arguments, **keywords)
    except ValueError as error:
        return str(error)
    return None


def load_or_refuse(folder) -> None:
    """A refused folder is named, and the model then is as it was."""
    model = network()
    before = [value.clone() for value in model.state_dict().values()]
    message = refusal(load_bitnet, folder, model)
    if message is not None:
        assert message.startswith(str(folder))
        assert all(map(torch.equal, before, model.state_dict().values()))


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_a_mutated_checkpoint_is_refused_or_loaded(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "mutated-bitnet"
    folder.mkdir(exist_ok=True)
    _, tensors = checkpoint(8.0)
    write(folder, tensors)
    path = folder / data.draw(st.sampled_from(["config.json", "model.safetensors", "model.safetensors"]), "file")
    path.write_bytes(mutated(path.read_bytes(), data))
    load_or_refuse(folder)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from(["bitnet", "autobitlinear"]),
    lambda inside: st.lists(inside, max_size=2) | st.dictionaries(st.text(max_size=4), inside, max_size=2),
    max_leaves=4,
)
KEYS = ("quant_method", "linear_class", "quantization_mode", "quantization_config")


@settings(max_examples=100, deadline=None)
@given(said=st.dictionaries(st.sampled_from(KEYS), JSON) | JSON, whole=st.booleans())
def test_whatever_a_config_says_is_refused_or_loaded(tmp_path_factory, said, whole):
    folder = tmp_path_factory.getbasetemp() / "said-bitnet"
    folder.mkdir(exist_ok=True)
    _, tensors = checkpoint(8.0)
    write(folder, tensors)
    (folder / "config.json").write_text(json.dumps(said if whole else {"quantization_config": said}))
    load_or_refuse(folder)
    packed(folder / "a", {"layer.weight": "ternary"}, shape=(8, 128))
    for export in (export_bitnet, export_compressed, export_mlx):
        message = refusal(export, folder / "a", folder / "out", config=folder / "config.json")
        assert message is None or message.startswith(str(folder))
