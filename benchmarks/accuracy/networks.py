"""The plain networks, as a user would write them.

What they hold may have one dimension more in front: see stacked.stack.
"""

import functools
import itertools
import re

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples import glosses


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers from each width to the next, with torch's default initialisation; ReLU between them."""
    layers = [nn.Linear(inputs, outputs) for inputs, outputs in itertools.pairwise(widths)]
    return nn.Sequential(*(part for layer in layers[:-1] for part in (layer, nn.ReLU())), layers[-1])


def mlp_batchnorm(hidden: int) -> nn.Sequential:
    """64-hidden-hidden-10 with BatchNorm after the first two layers."""
    blocks = [[nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU()] for inputs in (64, hidden)]
    return nn.Sequential(*blocks[0], *blocks[1], nn.Linear(hidden, 10))


def cnn(channels: int, *, norms: bool = True) -> nn.Sequential:
    """Images (..., 1, 28, 28) to ten classes: three convolutions of stride 2, with BatchNorm or without, and one linear
    layer.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, channels), (channels, 2 * channels), (2 * channels, 2 * channels)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=not norms)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()] if norms else [nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(-3), nn.Linear(2 * channels * 4 * 4, 10))


class Block(nn.Module):
    """A transformer's block, norms first: causal attention, then a feed-forward network of four times the width."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., context, width) -> the same."""
        parts = self.attention(self.norm1(x)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for part in parts)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(seen.transpose(-2, -3).flatten(-2))
        return x + self.down(functional.relu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Characters to the logits of the next ones.

    Embeddings are normal(.02); ``gpt2`` gives the Linear layers GPT-2's init, too.
    """

    def __init__(self, symbols: int, context: int, width: int, layers: int, heads: int, *, gpt2: bool):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(symbols, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        if gpt2:
            for name, layer in self.named_modules():
                if isinstance(layer, nn.Linear):
                    outer = name.endswith(("project", "down"))  # they add to the residual stream, 2 layers times
                    nn.init.normal_(layer.weight, std=0.02 / (2 * layers) ** 0.5 if outer else 0.02)
                    nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., batch, context) int64 -> (..., batch, context, symbols)."""
        places = torch.arange(tokens.shape[-1]).expand(*tokens.shape[:-2], 1, -1)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))


class EncoderBlock(nn.Module):
    """A block of BERT's encoder: attention to all that is seen, then a feed-forward network; norms last."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.project = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """(..., length, width), seen (..., 1, 1, length) bool -> (..., length, width)."""
        parts = (layer(x) for layer in (self.query, self.key, self.value))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for part in parts)
        looked = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        x = self.norm1(x + self.project(looked.transpose(-2, -3).flatten(-2)))
        return self.norm2(x + self.down(functional.gelu(self.up(x))))


class Encoder(nn.Module):
    """Tokens, 0 where a text has ended, to classes: BERT's encoder, the mean of its last states, and a linear layer."""

    def __init__(self, symbols: int, places: int, width: int, layers: int, heads: int, inner: int, classes: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(symbols, width), nn.Embedding(places, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, inner) for _ in range(layers))
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., batch, length) int64 -> (..., batch, classes)."""
        places = torch.arange(tokens.shape[-1]).expand(*tokens.shape[:-2], 1, -1)
        x, seen = self.norm(self.tokens(tokens) + self.positions(places)), tokens != 0
        for block in self.blocks:
            x = block(x, seen.unsqueeze(-2).unsqueeze(-2))
        shares = seen / seen.sum(-1, keepdim=True)
        return self.head((x * shares.unsqueeze(-1)).sum(-2))


SHAPE_OF_MINILM = (30522, 512, 384, 6, 12, 1536)  # symbols, places, width, layers, heads, inner
MINILM = {
    "embeddings.word_embeddings": "tokens",
    "embeddings.position_embeddings": "positions",
    "embeddings.LayerNorm": "norm",
    r"encoder.layer.(\d+).attention.self": r"blocks.\1",
    r"encoder.layer.(\d+).attention.output.dense": r"blocks.\1.project",
    r"encoder.layer.(\d+).attention.output.LayerNorm": r"blocks.\1.norm1",
    r"encoder.layer.(\d+).intermediate.dense": r"blocks.\1.up",
    r"encoder.layer.(\d+).output.dense": r"blocks.\1.down",
    r"encoder.layer.(\d+).output.LayerNorm": r"blocks.\1.norm2",
}  # what its file calls them -> what Encoder does


def minilm(classes: int) -> Encoder:
    """all-MiniLM-L6-v2 with a fresh head, without dropout.

    Raises:
        glosses.Missing: it is not installed.
    """
    with torch.device("meta"):  # nothing is drawn for what is read
        network = Encoder(*SHAPE_OF_MINILM, classes)
    head = nn.Linear(network.head.in_features, classes).state_dict(prefix="head.")
    network.load_state_dict(head | {name: value.clone() for name, value in _minilm_weights().items()}, assign=True)
    return network


@functools.cache
def _minilm_weights() -> dict[str, Tensor]:
    from safetensors.torch import load_file

    read = load_file(glosses.folder() / "model.safetensors")
    every_text = read["embeddings.token_type_embeddings.weight"][0]  # each is the first of BERT's two: it adds up
    read["embeddings.position_embeddings.weight"] += every_text
    found = {}
    for name, value in read.items():
        for theirs, ours in MINILM.items():
            if re.match(theirs, name):
                found[re.sub(theirs, ours, name)] = value  # what is left out is BERT's own head
    return found
