"""Real architectures, small and with random weights, and what param_groups makes of them: the tables of docs/layers.md.

python -m tests.layers.architectures writes them. transformers and timm are imported where a network needs them.
"""

import contextlib
import importlib.util
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from askew_cuda.layers import survey
from askew_cuda.param_groups import param_groups
from askew_cuda.quantizer import Quantizer

PAGE = Path(__file__).parent.parent.parent / "docs" / "layers.md"
BEGIN, END = "<!-- tables: python -m tests.layers.architectures -->\n", "<!-- end of the tables -->\n"


def package(name: str) -> Any:
    """transformers or timm, without what they say while they are imported.

    torchvision, which timm needs, is built for one torch: beside another, its operators are missing, and its import
    fails for want of two that nothing here calls.
    """
    if importlib.util.find_spec("torchvision") is not None and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        module = importlib.import_module(name)
        if name == "transformers":
            module.logging.set_verbosity_error()
    return module


_LIBRARIES: list[torch.library.Library] = []  # operators live as long as their library

DECODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


class LSTMTagger(nn.Module):
    """Words to tags."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16, padding_idx=0)
        self.lstm = nn.LSTM(16, 24, num_layers=2, bidirectional=True)
        self.head = nn.Linear(48, 5)


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions, without normalisation, as in the first U-Net."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU()
    )


class UNet(nn.Module):
    """Down and up again, with transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom = block(3, 8), block(8, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.merge, self.out = block(16, 8), nn.Conv2d(8, 2, 1)


def _transformers(kind: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = package("transformers")
        return getattr(transformers, kind)(getattr(transformers, config)(**settings))

    return build


def _timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: package("timm").create_model(name, num_classes=10, **settings)


WHISPER = {
    f"{side}_{what}": value
    for side in ("encoder", "decoder")
    for what, value in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))
}
NETWORKS: dict[str, tuple[str | None, Callable[[], nn.Module]]] = {
    "Llama": ("transformers", _transformers("LlamaForCausalLM", "LlamaConfig", **DECODER)),
    "Qwen3, tied": (
        "transformers",
        _transformers("Qwen3ForCausalLM", "Qwen3Config", **DECODER, tie_word_embeddings=True),
    ),
    "Gemma3": ("transformers", _transformers("Gemma3ForCausalLM", "Gemma3TextConfig", **DECODER)),
    "Mixtral": ("transformers", _transformers("MixtralForCausalLM", "MixtralConfig", **DECODER, num_local_experts=3)),
    "gpt-oss": ("transformers", _transformers("GptOssForCausalLM", "GptOssConfig", **DECODER, num_local_experts=3)),
    "Llama4": (
        "transformers",
        _transformers(
            "Llama4ForCausalLM", "Llama4TextConfig", **DECODER, intermediate_size_mlp=48, num_local_experts=3
        ),
    ),
    "GPT-2": (
        "transformers",
        _transformers(
            "GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=1, n_head=4, n_positions=16, vocab_size=64,
            bos_token_id=1, eos_token_id=2,
        ),
    ),
    "BERT": ("transformers", _transformers("BertForMaskedLM", "BertConfig", **ENCODER, vocab_size=64)),
    "T5": (
        "transformers",
        _transformers(
            "T5ForConditionalGeneration", "T5Config", d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
            vocab_size=64,
        ),
    ),
    "Whisper": (
        "transformers",
        _transformers(
            "WhisperForConditionalGeneration", "WhisperConfig", d_model=32, vocab_size=64, num_mel_bins=8,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **WHISPER,
        ),
    ),
    "ViT": (
        "transformers",
        _transformers("ViTForImageClassification", "ViTConfig", **ENCODER, image_size=16, patch_size=4),
    ),
    "ViT of timm": ("timm", _timm("vit_tiny_patch16_224", depth=1, embed_dim=48, img_size=32)),
    "Swin of timm": (
        "timm",
        _timm("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=24, num_heads=(3, 3)),
    ),
    "ConvNeXt": (
        "transformers",
        _transformers(
            "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2
        ),
    ),
    "ConvNeXt of timm": ("timm", _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))),
    "ResNet": (
        "transformers",
        _transformers(
            "ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
            layer_type="basic",
        ),
    ),
    "EfficientNet of timm": ("timm", _timm("efficientnet_lite0")),
    "Mamba": (
        "transformers",
        _transformers(
            "MambaForCausalLM", "MambaConfig", hidden_size=32, state_size=8, num_hidden_layers=1, vocab_size=64
        ),
    ),
    "LSTM": (None, LSTMTagger),
    "U-Net": (None, UNet),
}  # fmt: skip


def build(name: str) -> nn.Module:
    """A small network of an architecture."""
    torch.manual_seed(0)
    return NETWORKS[name][1]()


def decided(model: nn.Module) -> dict[str, tuple[Tensor, object, int]]:
    """Weight, output dimension and fan-in of what "ternary/channel" quantizes; by name."""
    groups = param_groups(model, "ternary/channel", verbose=False)
    return {
        name: (weight, group["channel_dim"], fan_in)
        for group in groups
        if group["quantizer"] is not None
        for (name, weight), fan_in in zip(group["params"], group["fan_in"], strict=True)
    }


def reasons(model: nn.Module) -> dict[str, str]:
    """Why what is not quantized is left alone; by name."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        param_groups(model, "ternary/channel")
    lines = [re.split(r"\s{2,}", line) for line in said.getvalue().splitlines()[1:]]
    return {fields[0]: fields[-1] for fields in lines if len(fields) > 4 and fields[3] == "-"}


def rows(name: str) -> list[str]:
    """The table of an architecture: a line for each kind of weight, indices left out, vectors counted below it."""
    model = build(name)
    quantized, why, found = decided(model), reasons(model), survey(model)
    lines, vectors = {}, 0
    for full, weight in model.named_parameters():
        if weight.dim() < 2:
            vectors += 1
            continue
        short = re.sub(r"(?<=\.)\d+(?=\.)", "*", full)
        shape, layer = "x".join(map(str, weight.shape)), found.places[weight][0].layer
        if full in quantized:
            _, dim, fan_in = quantized[full]
            scale = "x".join(map(str, Quantizer.parse("ternary/channel").scale_shape(weight, dim)))
            lines.setdefault((short, "yes"), f"| `{short}` | {shape} | {layer} | {scale} | {fan_in} |  |")
        else:
            lines.setdefault((short, why[full]), f"| `{short}` | {shape} | {layer} |  |  | {why[full]} |")
    head = ["| weight | shape | layer | scale | fan-in | left alone |", "| --- | --- | --- | --- | --- | --- |"]
    gains = sum(reason.startswith("norm") for full, reason in why.items() if model.get_parameter(full).dim() < 2)
    return [f"### {name}", "", *head, *lines.values(), "", f"and {vectors} vectors, {gains} of them of norms.", ""]


def tables() -> str:
    """All of them, as docs/layers.md has them."""
    return "\n".join(line for name in NETWORKS for line in rows(name))


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{tables()}\n{END}{rest.partition(END)[2]}")
