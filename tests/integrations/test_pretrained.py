"""save_pretrained and from_pretrained of packed models: the same bits, or an error; never random weights."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is in the dev extra")

import askew_cuda as askew
from askew_cuda.packed.modules import PackedLayer
from tests.integrations.tiny import Counting, language_model

pytestmark = pytest.mark.filterwarnings("ignore:finalize:UserWarning")  # weights that were never annealed

INDEX = Counting().rows[:4]


def load(folder, kind=transformers.LlamaForCausalLM, **given):
    """From a folder; with the attention of :func:`language_model`, which a folder does not say."""
    return kind.from_pretrained(folder, attn_implementation="eager", **given)


def packed(spec="ternary/channel", **changes):
    """A packed language model, and what it says of INDEX."""
    model = language_model(**changes).eval()
    groups = askew.param_groups(model, spec, verbose=False, pretrained=True)
    optimizer = askew.AskewAdamW(groups, lr=0.1)
    optimizer.finalize()
    wanted = model(INDEX).logits
    assert askew.pack_modules(model, optimizer) is model
    assert torch.equal(model(INDEX).logits, wanted)
    return model, wanted


@pytest.mark.parametrize(
    "spec", ["ternary/channel", "binary", "4bit/group8", {"*": "int8"}, {"*": askew.Codebook([-2, 0, 1])}]
)
def test_a_packed_model_comes_back_to_the_last_bit(tmp_path, spec):
    if isinstance(spec, dict) and isinstance(spec["*"], askew.Codebook):
        spec = {"*": askew.Quantizer(spec["*"])}
    if isinstance(spec, dict):
        spec = {"re:.*norm.*": None, **spec}
    model, wanted = packed(spec)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "askew_cuda"
    loaded, report = load(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert torch.equal(loaded(INDEX).logits, wanted)
    kinds = {name: type(each) for name, each in model.named_modules()}
    assert {name: type(each) for name, each in loaded.named_modules()} == kinds
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLayer):
            assert repr(loaded.get_submodule(name)) == repr(layer)
            assert torch.equal(loaded.get_submodule(name).codes, layer.codes)
    loaded.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", transformers.AutoModelForCausalLM)
    assert torch.equal(again(INDEX).logits, wanted)
    plain = again.dequantize()
    assert not any(isinstance(each, PackedLayer) for each in plain.modules())
    assert torch.equal(plain(INDEX).logits, wanted)
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(load(tmp_path / "plain")(INDEX).logits, wanted)


def test_in_bfloat16_the_scales_keep_their_dtype(tmp_path):
    model, wanted = packed()
    model.to(torch.bfloat16)
    wanted = model(INDEX).logits
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=torch.bfloat16)
    assert {each.scale.dtype for each in loaded.modules() if isinstance(each, PackedLayer)} == {torch.float32}
    assert torch.equal(loaded(INDEX).logits, wanted)


def test_without_the_import_it_is_refused(tmp_path):
    packed()[0].save_pretrained(tmp_path)
    script = (
        "from tests.layers.architectures import package; transformers = package('transformers')\n"
        f"transformers.LlamaForCausalLM.from_pretrained({str(tmp_path)!r})"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "ignore_mismatched_sizes" in run.stderr
    assert "quantization type, got askew_cuda" in run.stderr or "askew_cuda" in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("imports", [False, True])
def test_a_packed_file_is_refused(imports, tmp_path):
    """One of save_packed, under the name that from_pretrained looks for."""
    model = language_model()
    optimizer = askew.AskewSGD(askew.param_groups(model, "ternary", verbose=False, pretrained=True))
    askew.save_packed(model, optimizer, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    script = (
        f"from tests.layers.architectures import package; transformers = package('transformers')\n"
        f"{'import askew_cuda.integrations.transformers' if imports else ''}\n"
        f"transformers.LlamaForCausalLM.from_pretrained({str(tmp_path)!r})"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "ignore_mismatched_sizes" in run.stderr


def test_another_model_is_refused(tmp_path):
    packed()[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the layer 'model.layers.1.* is packed in the file, and in this model"):
        load(tmp_path)


def test_codes_of_another_codebook_are_refused(tmp_path):
    packed("binary")[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for layer in config["quantization_config"]["layers"].values():
        layer["quantizer"] = {"levels": [0.0, 1.0], "scale": "auto", "granularity": "tensor", "group_size": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="packed as"):
        load(tmp_path)


def test_an_unpacked_model_is_saved_as_any_other(tmp_path):
    for way in (askew.unpack_modules, lambda model: model.dequantize()):
        model, wanted = packed()
        assert way(model) is model
        assert not hasattr(model.config, "quantization_config")
        model.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        loaded = load(tmp_path)
        assert torch.equal(loaded(INDEX).logits, wanted)


def test_a_part_that_is_packed_is_announced_by_the_whole(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.language = language_model()

    pair = Pair()
    optimizer = askew.AskewSGD(askew.param_groups(pair, "ternary", verbose=False, pretrained=True))
    askew.pack_modules(pair, optimizer)
    wanted = pair.language.eval()(INDEX).logits
    pair.language.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(INDEX).logits, wanted)
