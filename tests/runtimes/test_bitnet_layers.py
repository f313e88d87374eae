"""BitNet checkpoints by transformers' own layers: their numbers times their scales are what was trained."""

import pytest
import torch

import askew_cuda as askew
from askew_cuda.packed.export import export_bitnet, load_bitnet

transformers = pytest.importorskip("transformers", reason="make test-runtimes installs it")

pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers


def language_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99, max_position_embeddings=64, tie_word_embeddings=False, dtype="float32",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_a_language_model_of_transformers_has_the_weights_that_were_trained(tmp_path):
    from transformers.integrations.bitnet import AutoBitLinear

    model = language_model()
    groups = askew.param_groups(model, {"re:.*_proj.weight": "ternary", "*": None}, verbose=False, short_scales=True)
    optimizer = askew.AskewAdamW(groups, lr=0.01, total_steps=20)
    tokens = torch.arange(20).unsqueeze(0)
    for _ in range(20):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    optimizer.finalize()
    askew.save_packed(model, optimizer, tmp_path / "a")
    model.config.save_pretrained(tmp_path)
    assert len(export_bitnet(tmp_path / "a", tmp_path / "out", config=tmp_path / "config.json")) == 14

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    layers = {name: layer for name, layer in loaded.named_modules() if isinstance(layer, AutoBitLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.weight * layer.weight_scale, model.get_parameter(f"{name}.weight"))
        layer.forward = lambda x, layer=layer: torch.nn.functional.linear(x, layer.weight * layer.weight_scale)
    with torch.no_grad():  # all but the activations, which its layers round
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)

    again = language_model()
    load_bitnet(tmp_path / "out", again)
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
