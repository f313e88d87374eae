"""Real architectures: which of their weights are quantized, by which scale, and why not the others."""

import importlib.util
import math
import re

import pytest
import torch

import askew_cuda as askew
from askew_cuda.layers import is_norm
from askew_cuda.param_groups import param_groups
from askew_cuda.quantizer import Codebook, Quantizer
from tests.layers.architectures import BEGIN, END, NETWORKS, PAGE, build, decided, reasons, rows


@pytest.fixture(params=NETWORKS)
def name(request) -> str:
    """Of a network whose package is here."""
    needed = NETWORKS[request.param][0]
    for each in {"timm": ("timm", "torchvision"), "transformers": ("transformers",), None: ()}[needed]:
        if importlib.util.find_spec(each) is None:
            pytest.skip(f"{each} is not installed: `pip install {each}`, or the dev extra")
    return request.param


def short(full: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", full)


# What is left alone beyond norms and vectors, and what is quantized along another dimension than the first.
LEFT = {
    "Llama": {"model.embed_tokens.weight": "embedding", "lm_head.weight": "last layer"},
    "Qwen3, tied": {"model.embed_tokens.weight": "embedding"},
    "Gemma3": {"model.embed_tokens.weight": "embedding"},
    "Mixtral": {
        "model.embed_tokens.weight": "embedding",
        "model.layers.*.mlp.gate.weight": "router",
        "lm_head.weight": "last layer",
    },
    "gpt-oss": {
        "model.embed_tokens.weight": "embedding",
        "model.layers.*.mlp.router.weight": "router",
        "model.layers.*.mlp.experts.gate_up_proj_bias": "not a weight of GptOssExperts",
        "model.layers.*.mlp.experts.down_proj_bias": "not a weight of GptOssExperts",
        "lm_head.weight": "last layer",
    },
    "Llama4": {
        "model.embed_tokens.weight": "embedding",
        "model.layers.*.feed_forward.router.weight": "router",
        "lm_head.weight": "last layer",
    },
    "GPT-2": {"transformer.wte.weight": "embedding", "transformer.wpe.weight": "embedding"},
    "BERT": {f"bert.embeddings.{part}_embeddings.weight": "embedding" for part in ("word", "position", "token_type")},
    "T5": {
        "shared.weight": "embedding",
        "encoder.block.*.layer.*.SelfAttention.relative_attention_bias.weight": "embedding",
        "decoder.block.*.layer.*.SelfAttention.relative_attention_bias.weight": "embedding",
    },
    "Whisper": {
        "model.encoder.conv1.weight": "first layer",
        "model.encoder.embed_positions.weight": "embedding, frozen",
        "model.decoder.embed_tokens.weight": "embedding",
        "model.decoder.embed_positions.weight": "embedding",
    },
    "ViT": {
        "vit.embeddings.cls_token": "ViTEmbeddings is not known",
        "vit.embeddings.position_embeddings": "ViTEmbeddings is not known",
        "vit.embeddings.patch_embeddings.projection.weight": "first layer",
        "classifier.weight": "last layer",
    },
    "ViT of timm": {
        "cls_token": "VisionTransformer is not known",
        "pos_embed": "VisionTransformer is not known",
        "patch_embed.proj.weight": "first layer",
        "head.weight": "last layer",
    },
    "Swin of timm": {
        "patch_embed.proj.weight": "first layer",
        "layers.*.blocks.*.attn.relative_position_bias_table": "WindowAttention is not known",
        "head.fc.weight": "last layer",
    },
    "ConvNeXt": {"convnext.embeddings.patch_embeddings.weight": "first layer", "classifier.weight": "last layer"},
    "ConvNeXt of timm": {"stem.*.weight": "first layer", "head.fc.weight": "last layer"},
    "ResNet": {"resnet.embedder.embedder.convolution.weight": "first layer", "classifier.*.weight": "last layer"},
    "EfficientNet of timm": {"conv_stem.weight": "first layer", "classifier.weight": "last layer"},
    "Mamba": {
        "backbone.embeddings.weight": "embedding",
        "backbone.layers.*.mixer.A_log": "MambaMixer is not known",
    },
    "LSTM": {"embed.weight": "embedding", "head.weight": "last layer"},
    "U-Net": {"down.*.weight": "first layer", "out.weight": "last layer"},
}
ELSEWHERE = {
    "Mixtral": {"gate_up_proj": ((0, 1), 32), "down_proj": ((0, 1), 48)},
    "gpt-oss": {"gate_up_proj": ((0, 2), 32), "down_proj": ((0, 2), 48)},
    "Llama4": {"gate_up_proj": ((0, 2), 32), "down_proj": ((0, 2), 48)},
    "GPT-2": {
        "c_attn.weight": (1, 32), "attn.c_proj.weight": (1, 32), "c_fc.weight": (1, 32), "mlp.c_proj.weight": (1, 128)
    },
    "U-Net": {"up.weight": (1, 16)},
}  # fmt: skip


def test_what_is_quantized_and_what_is_not(name):
    model = build(name)
    quantized, why = decided(model), reasons(model)
    named = dict(model.named_parameters())
    assert set(quantized) | set(why) == set(named)
    assert {short(full): reason for full, reason in why.items() if named[full].dim() >= 2} == LEFT[name]
    elsewhere = {full: (dim, fan_in) for full, (_, dim, fan_in) in quantized.items() if dim != 0}
    wanted = ELSEWHERE.get(name, {})
    assert {next(end for end in wanted if full.endswith(end)): fact for full, fact in elsewhere.items()} == wanted
    for weight, dim, fan_in in quantized.values():
        assert dim != 0 or fan_in == weight[0].numel()


def test_every_scale_is_that_of_the_fan_in(name):
    """Between normalisation layers it follows from the fan-in alone."""
    model, book = build(name), Codebook.named("ternary")
    groups = param_groups(model, "ternary/channel", verbose=False)
    assert groups[0]["normalized"] is (name not in ("LSTM", "U-Net"))
    optimizer = askew.AskewSGD(groups, lr=0.1)
    optimizer.prepare()
    for weight, dim, fan_in in decided(model).values():
        scale = optimizer.state[weight]["scale"]
        assert scale.shape == Quantizer.parse("ternary/channel").scale_shape(weight, dim)
        if groups[0]["normalized"]:
            wanted = torch.full_like(scale, 1 / math.sqrt(3 * fan_in) / book.rms)
            torch.testing.assert_close(scale, wanted, rtol=1e-6, atol=0)


def test_gains_are_not_decayed_on_request(name):
    model = build(name)
    groups = param_groups(model, "ternary/channel", no_decay=True, verbose=False)
    free = {full for group in groups if group.get("weight_decay") == 0 for full, _ in group["params"]}
    gains = {
        f"{path}.{part}" for path, module in model.named_modules() if is_norm(module) for part in module._parameters
    }
    named = dict(model.named_parameters())
    assert gains & set(named) <= free
    assert {full for full, weight in named.items() if weight.dim() < 2} <= free
    if name == "ViT of timm":
        assert {"pos_embed", "cls_token"} <= free
    rest = {full for group in groups if group.get("weight_decay") is None for full, _ in group["params"]}
    assert free | rest == set(named)
    assert not free & rest


@pytest.mark.parametrize("name", ["Qwen3, tied", "Gemma3", "GPT-2", "BERT", "T5", "Whisper", "Mamba"], indirect=True)
def test_tied_weights_of_transformers_count_at_every_place(name):
    """The head of a tied network is its embedding: nothing is quantized twice, or by half."""
    model = build(name)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    assert not any(weight is head.weight for weight, _, _ in decided(model).values())


def test_the_table_in_the_docs_is_what_is_decided(name):
    text = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert "\n".join(rows(name)) in text


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"], indirect=True)
def test_a_scale_of_stacked_experts_is_one_per_expert_and_output(name):
    """And its groups run along the inputs."""
    model = build(name)
    groups = param_groups(model, {"re:.*experts.*": "ternary/group16"}, verbose=False)
    optimizer = askew.AskewSGD(groups, lr=0.1)
    optimizer.prepare()
    shapes = [tuple(optimizer.state[weight]["scale"].shape) for _, weight in groups[0]["params"]]
    assert shapes == {"Mixtral": [(3, 96, 2), (3, 32, 3)], "gpt-oss": [(3, 2, 96), (3, 3, 32)]}[name]
