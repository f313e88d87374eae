"""The paper's non-convex toy: two moons and a network of nine weights, next to all 512 networks with weights -1 and 1.

    python -m examples.two_moons [--seeds 32]

As in the authors' notebook: 2,000 training and 200 test points, inputs standardised; 2-3-1, ReLU, no bias, batch
normalisation without affine part after both layers; batches of 100, 50 epochs, lr 0.1 without a schedule; AskewSGD on
Adam's gradient, alpha 1, epsilon 0.99 per epoch from epoch 20 on. That ends at 0.75, so that the network which is
trained is not the one which is rounded. All seeds train at once.
"""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn
from torch.nn import functional

import askew_cuda as askew
from examples.logistic import draw_sign, sign

EPOCHS, BATCH, LR, SHAPES = 50, 100, 0.1, ((3, 2), (1, 3))  # of the weights: (out, in)
EPS, FORGET = 1e-4, 0.15  # of batch normalisation


@dataclass(frozen=True)
class Data:
    """Inputs (n, 2) and labels (n,) of 0 and 1, float32."""

    x: Tensor
    y: Tensor


def moons() -> tuple[Data, Data]:
    """Training and test data, standardised by the training inputs. Always the same."""
    drawn = [make_moons(n, noise=0.1, random_state=0) for n in (2000, 200)]
    (x, y), (test_x, test_y) = [
        (torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)) for x, y in drawn
    ]
    mean, std = x.mean(0), x.std(0, correction=0)
    return Data((x - mean) / std, y), Data((test_x - mean) / std, test_y)


class Statistics:
    """Running mean and variance of what both layers give, for S networks: (S, 1, units) each."""

    def __init__(self, networks: int):
        self.mean = [torch.zeros(networks, 1, out) for out, _ in SHAPES]
        self.var = [torch.ones(networks, 1, out) for out, _ in SHAPES]


def logits(weights: list[Tensor], x: Tensor, statistics: Statistics | None = None, training: bool = False) -> Tensor:
    """(S, n) of S networks with weights S x (out, in), for inputs (n, 2) or (S, n, 2). Normalised by the batch's own
    statistics; with ``statistics`` given, they are updated in training, and used otherwise.
    """
    x = x.expand(len(weights[0]), -1, -1)
    for layer, weight in enumerate(weights):
        x = torch.bmm(x if layer == 0 else x.relu(), weight.transpose(1, 2))
        var, mean = torch.var_mean(x, 1, keepdim=True, correction=0)
        if statistics is not None and training:
            for kept, new in ((statistics.mean, mean), (statistics.var, var * (x.shape[1] / (x.shape[1] - 1)))):
                kept[layer].lerp_(new.detach(), FORGET)
        elif statistics is not None:
            mean, var = statistics.mean[layer], statistics.var[layer]
        x = (x - mean) * (var + EPS).rsqrt()
    return x.squeeze(2)


def loss(found: Tensor, y: Tensor) -> Tensor:
    """(S,): binary cross entropy of logits (S, n)."""
    return functional.binary_cross_entropy_with_logits(found, y.expand_as(found), reduction="none").mean(1)


def accuracy(found: Tensor, y: Tensor) -> Tensor:
    """(S,), in [0, 1]."""
    return ((found > 0) == (y > 0.5)).double().mean(1)


def all_binary() -> list[Tensor]:
    """The weights of all 512 networks, stacked."""
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=9)))
    return [signs[:, :6].reshape(-1, 3, 2), signs[:, 6:].reshape(-1, 1, 3)]


@dataclass(frozen=True)
class Method:
    """How to train: ``rule`` makes the optimizer. ``seen``: what the forward pass sees of a weight, which takes the
    gradient. ``anneal``: keywords of Anneal.
    """

    rule: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    seen: Callable[[Tensor], Tensor] = lambda weight: weight
    clamp: bool = False
    anneal: dict[str, Any] | None = None


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR)


def adam(keywords: dict[str, Any]) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """Ours, on Adam: AdamW without decay is Adam."""
    return lambda parameters: askew.AskewAdamW(parameters, lr=LR, weight_decay=0.0, **keywords)


_AUTHORS, _SHIPPED = askew.paper("binary", epochs=EPOCHS, hold_epochs=20, decay=0.99, alpha=1.0)
_TO_THE_END = {"hold": 0.4, "end": 1.0, "shape": "geometric"}  # epsilon to 1e-6, and 0
METHODS = {
    "full precision": Method(sgd),
    "BinaryConnect, deterministic": Method(sgd, seen=sign, clamp=True),
    "BinaryConnect, stochastic": Method(sgd, seen=draw_sign, clamp=True),
    "AskewSGD, as shipped": Method(adam(_AUTHORS), anneal=_SHIPPED),
    "AskewSGD, annealed": Method(adam(_AUTHORS), anneal=_TO_THE_END),
    "AskewSGD, capture": Method(adam({"quantizer": askew.Quantizer("binary", scale=1.0)}), anneal={}),
}


@dataclass(frozen=True)
class Trained:
    """S networks, not rounded: weights, the running statistics, and what the forward pass saw of the weights."""

    weights: list[Tensor]
    statistics: Statistics
    seen: Callable[[Tensor], Tensor]


def train(data: Data, method: Method, seeds: int) -> Trained:
    """Trains that many networks, each with its own initialisation."""
    torch.manual_seed(0)
    weights = [
        nn.Parameter((torch.rand(seeds, *shape) * 2 - 1) * shape[1] ** -0.5) for shape in SHAPES
    ]  # torch's Linear
    optimizer, statistics = method.rule(weights), Statistics(seeds)
    anneal = (
        None
        if method.anneal is None
        else askew.Anneal(optimizer, total_steps=EPOCHS * len(data.x) // BATCH, **method.anneal)
    )
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(data.x)).split(BATCH):
            seen = [method.seen(weight.detach()).requires_grad_() for weight in weights]
            found = logits(seen, data.x[batch], statistics, training=True)
            loss(found, data.y[batch]).sum().backward()
            for weight, one in zip(weights, seen, strict=True):
                weight.grad = one.grad
            optimizer.step()
            if anneal is not None:
                anneal.step()
            for weight in weights if method.clamp else ():
                weight.data.clamp_(-1, 1)
    return Trained([weight.detach() for weight in weights], statistics, method.seen)


def evaluate(trained: Trained, data: Data, test: Data) -> dict[str, Tensor]:
    """Of each network, (S,): training loss and test accuracy as it is and rounded; then with the statistics that
    training left ("old") and with those of its own on the training data.
    """
    as_seen, rounded = [trained.seen(w) for w in trained.weights], [sign(w) for w in trained.weights]
    fresh = Statistics(len(rounded[0]))
    for _ in range(100):
        logits(rounded, data.x, fresh, training=True)
    return {
        "loss": loss(logits(as_seen, data.x), data.y),
        "accuracy": accuracy(logits(as_seen, test.x, trained.statistics), test.y),
        "rounded loss": loss(logits(rounded, data.x), data.y),
        "rounded, old": accuracy(logits(rounded, test.x, trained.statistics), test.y),
        "rounded, own": accuracy(logits(rounded, test.x, fresh), test.y),
    }


def main() -> None:
    torch.set_num_threads(1)  # every operation is small
    parser = argparse.ArgumentParser(description="the paper's two-moons toy")
    parser.add_argument("--seeds", type=int, default=32)
    seeds = parser.parse_args().seeds
    data, test = moons()
    best = loss(logits(all_binary(), data.x), data.y)
    print(f"best of 512 binary networks: training loss {best.min():.5f}")
    print(
        f"{'mean of seeds':32}{'loss':>8}{'accuracy':>10}{'rounded loss':>14}{'rounded, old':>14}{'rounded, own':>14}"
    )
    for name, method in METHODS.items():
        found = evaluate(train(data, method, seeds), data, test)
        numbers = [found[key].mean().item() for key in found]
        print(f"{name:32}{numbers[0]:8.4f}{numbers[1]:10.3f}{numbers[2]:14.4f}{numbers[3]:14.3f}{numbers[4]:14.3f}")


if __name__ == "__main__":
    main()
