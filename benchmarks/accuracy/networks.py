"""The plain networks, as a user would write them.

What they hold may have one dimension more in front: see stacked.stack.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers from each width to the next, with torch's default initialisation; ReLU between them."""
    layers = [nn.Linear(inputs, outputs) for inputs, outputs in itertools.pairwise(widths)]
    return nn.Sequential(*(part for layer in layers[:-1] for part in (layer, nn.ReLU())), layers[-1])


def mlp_batchnorm(hidden: int) -> nn.Sequential:
    """64-hidden-hidden-10 with BatchNorm after the first two layers."""
    blocks = [[nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU()] for inputs in (64, hidden)]
    return nn.Sequential(*blocks[0], *blocks[1], nn.Linear(hidden, 10))


def cnn(channels: int) -> nn.Sequential:
    """Images (..., 1, 28, 28) to ten classes: three convolutions of stride 2 with BatchNorm, and one linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, channels), (channels, 2 * channels), (2 * channels, 2 * channels)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
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
