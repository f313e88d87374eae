"""compressed-tensors: what it decompresses is what was trained, and transformers loads a model from the folder."""

import json

import pytest
import torch

import askew_cuda as askew
from askew_cuda.packed.export.compressed import export_compressed
from askew_cuda.scales import short
from tests.packed.export.test_words import RULES, tensors_of
from tests.packed.export.trained import packed

pytest.importorskip("compressed_tensors", reason="make test-runtimes installs it")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_its_decompressor_computes_what_was_trained(rule, dtype, tmp_path):
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = packed(tmp_path / "a", {"layer.weight": rule}, dtype=dtype)
    export_compressed(tmp_path / "a", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(said).config_groups.values()
    tensors = tensors_of(tmp_path / "out" / "model.safetensors")
    state = {name.removeprefix("layer."): tensor for name, tensor in tensors.items() if name.startswith("layer.")}
    found = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(found, model.get_parameter("layer.weight"))


@pytest.mark.filterwarnings("ignore")  # those of transformers
def test_a_language_model_of_transformers_computes_the_same_logits(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99, max_position_embeddings=64, tie_word_embeddings=False, torch_dtype="float32",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    rules = {"re:.*(q|k)_proj.weight": "int4/group32", "re:.*down_proj.weight": "ternary/channel"}
    rules |= {"re:.*(v|o|gate|up)_proj.weight": "2bit/group32"}
    optimizer = askew.AskewSGD(askew.param_groups(model, rules, pretrained=True, verbose=False), lr=0.1)
    optimizer.prepare()
    for weight, *_ in optimizer.quantized_parameters():
        optimizer.state[weight]["scale"] = short(optimizer.state[weight]["scale"])
    askew.save_packed(model, optimizer, tmp_path / "a")
    askew.load_packed(tmp_path / "a", model)
    config.save_pretrained(tmp_path)
    bits = export_compressed(tmp_path / "a", tmp_path / "out", config=tmp_path / "config.json")
    assert len(bits) == 14
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
