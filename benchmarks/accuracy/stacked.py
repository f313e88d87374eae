"""S networks of one shape trained as one.

Each weight of theirs is one parameter of shape (S, ...), each activation is (S, batch, ...).

What network i computes, and the gradient of its weights, is what the i-th plain network would have computed by itself:
layers never mix networks. The weights come from plain networks, so that their initialisation is torch's own.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.accuracy.methods.method import Run


class Quantizable(nn.Module):
    """A layer whose weight may be quantized. ``run`` says what the forward pass sees; None: the weight as it is."""

    run: Run | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(S, batch, ...) -> (S, batch, ...)."""
        if self.run is None:
            return self.compute(x, self.weight)
        return self.run.output(self.compute(self.run.input(x), self.run.weight(self.weight)))

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's output for this weight."""
        raise NotImplementedError


class Linear(Quantizable):
    """x: (S, ..., in), weight: (S, out, in), bias: (S, out) or None -> (S, ..., out)."""

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__()
        self.weight, self.bias = _stacked(layers, "weight"), _stacked(layers, "bias")

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        rows, columns = x.flatten(1, -2), weight.transpose(1, 2)
        y = torch.bmm(rows, columns) if self.bias is None else torch.baddbmm(self.bias.unsqueeze(1), rows, columns)
        return y.unflatten(1, x.shape[1:-1])


class Conv2d(Quantizable):
    """x: (S, batch, in, h, w), weight: (S, out, in, kh, kw), bias: (S, out) or None.

    One grouped convolution for all: each network is a group.
    """

    def __init__(self, layers: Sequence[nn.Conv2d]):
        super().__init__()
        first = layers[0]
        if first.groups != 1 or first.padding_mode != "zeros":
            raise ValueError(
                f"stacked.Conv2d: groups = {first.groups}, padding_mode = {first.padding_mode!r}; only 1 and 'zeros'"
            )
        self.weight, self.bias = _stacked(layers, "weight"), _stacked(layers, "bias")
        self.settings = {
            "stride": first.stride,
            "padding": first.padding,
            "dilation": first.dilation,
            "groups": len(layers),
        }

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.flatten()
        return _networks(functional.conv2d(_channels(x), weight.flatten(0, 1), bias, **self.settings), len(x))


class BatchNorm(nn.Module):
    """x: (S, batch, features) or (S, batch, channels, h, w).

    Weight, bias and running statistics: (S, channels), else as torch's.
    """

    def __init__(self, layers: Sequence[nn.BatchNorm1d | nn.BatchNorm2d]):
        super().__init__()
        self.weight, self.bias = _gain(layers), _stacked(layers, "bias")
        self.register_buffer("running_mean", torch.stack([layer.running_mean for layer in layers]))
        self.register_buffer("running_var", torch.stack([layer.running_var for layer in layers]))
        self.settings = {"momentum": layers[0].momentum, "eps": layers[0].eps}

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean.view(-1), self.running_var.view(-1)  # views, since batch_norm moves them in place
        weight, bias = self.weight.flatten(), self.bias.flatten()
        y = functional.batch_norm(_channels(x), mean, var, weight, bias, training=self.training, **self.settings)
        return _networks(y, len(x))


class LayerNorm(nn.Module):
    """x: (S, ..., features), weight and bias: (S, features)."""

    def __init__(self, layers: Sequence[nn.LayerNorm]):
        super().__init__()
        self.weight, self.bias = _gain(layers), _stacked(layers, "bias")
        self.shape, self.eps = layers[0].normalized_shape, layers[0].eps

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (each.view(len(x), *(1,) * (x.dim() - 2), *self.shape) for each in (self.weight, self.bias))
        return functional.layer_norm(x, self.shape, eps=self.eps) * weight + bias


class Embedding(nn.Module):
    """x: (S, ...) int64, weight: (S, rows, features) -> (S, ..., features)."""

    def __init__(self, layers: Sequence[nn.Embedding]):
        super().__init__()
        self.weight = _stacked(layers, "weight")

    def forward(self, x: Tensor) -> Tensor:
        count, rows, _ = self.weight.shape
        first = rows * torch.arange(count).view(count, *(1,) * (x.dim() - 1))
        return functional.embedding(x + first, self.weight.flatten(0, 1))


KINDS = {
    nn.Linear: Linear,
    nn.Conv2d: Conv2d,
    nn.BatchNorm1d: BatchNorm,
    nn.BatchNorm2d: BatchNorm,
    nn.LayerNorm: LayerNorm,
    nn.Embedding: Embedding,
}
POINTWISE = (
    nn.ReLU,
    nn.GELU,
    nn.Flatten,
)  # the same with one dimension more in front; Flatten where it counts from the end


def stack(networks: Sequence[nn.Module]) -> nn.Module:
    """One network that holds copies of the weights of all.

    Layers of KINDS are stacked; what holds them has to take (..., batch, ...).

    Raises:
        TypeError: a layer has parameters of its own and is not of KINDS, or has none and is not known to take one more
            dimension.
    """
    first = networks[0]
    if type(first) in KINDS:
        return KINDS[type(first)](networks)
    if next(first.parameters(recurse=False), None) is not None or (
        not [*first.children()] and not isinstance(first, POINTWISE)
    ):
        raise TypeError(
            f"stack: {type(first).__name__} is not among {', '.join(kind.__name__ for kind in KINDS)}; add it to KINDS"
        )
    whole = copy.deepcopy(first)
    for name, _ in first.named_children():
        setattr(whole, name, stack([getattr(network, name) for network in networks]))
    return whole


def quantizable(network: nn.Module, prefix: str = "") -> list[Quantizable]:
    """The layers with weights that can be quantized and names that begin so, in the order of the network."""
    return [
        layer for name, layer in network.named_modules() if isinstance(layer, Quantizable) and name.startswith(prefix)
    ]


def free_end(network: nn.Module) -> Quantizable | None:
    """The last layer, where no normalisation layer follows it; what ``askew.param_groups`` sees in a plain network."""
    last = [layer for layer in network.modules() if isinstance(layer, (Quantizable, BatchNorm, LayerNorm))][-1]
    return last if isinstance(last, Quantizable) else None


def _stacked(layers: Sequence[nn.Module], name: str) -> nn.Parameter | None:
    """The layers' parameters as one; None where they have none."""
    if getattr(layers[0], name) is None:
        return None
    return nn.Parameter(torch.stack([getattr(layer, name).detach() for layer in layers]))


def _gain(layers: Sequence[nn.Module]) -> nn.Parameter | None:
    """The weights of normalisation layers, marked ``is_gain`` for the methods; None where they have none."""
    gain = _stacked(layers, "weight")
    if gain is not None:
        gain.is_gain = True
    return gain


def _channels(x: Tensor) -> Tensor:
    """(S, batch, channels, ...) -> (batch, S channels, ...)."""
    return x.transpose(0, 1).flatten(1, 2)


def _networks(x: Tensor, count: int) -> Tensor:
    """The way back; a view, which the next layer's _channels turns round again without a copy."""
    return x.unflatten(1, (count, -1)).transpose(0, 1)
