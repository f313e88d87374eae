"""The paper's convex toy: logistic regression whose ten weights are to be -1 or 1, next to the best of all 1,024 sign
patterns.

    python -m examples.logistic [--seeds 32] [--size 1.0]

As in the authors' notebook: inputs uniform in [-1, 1]^10, labels drawn from the model with weights -size or +size,
6,000 samples, no bias, the loss summed over a batch of 100 and divided by 6,000, SGD at lr 2, halved at epoch 30, 50
epochs. In their notebook epsilon stays 1 for all 50; the other rows let it fall. A data set per seed; all seeds train
at once, which elementwise rules don't notice.
"""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import askew_cuda as askew

SAMPLES, DIMENSION, BATCH, LR = 6000, 10, 100, 2.0


@dataclass(frozen=True)
class Problem:
    """A data set per seed, and its best signs: x (S, n, d), y (S, n) of 0 and 1, best (S, d) of -1 and 1; float32."""

    x: Tensor
    y: Tensor
    best: Tensor


def problem(seeds: int, size: float = 1.0) -> Problem:
    """Draws the data sets, and tries all sign patterns on each."""
    patterns = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=DIMENSION)))
    drawn = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        true = size * torch.randint(0, 2, (DIMENSION,), generator=generator).mul(2).sub(1)
        x = torch.rand(SAMPLES, DIMENSION, generator=generator).mul(2).sub(1)
        y = torch.bernoulli(torch.sigmoid(x @ true), generator=generator)
        losses = functional.softplus(x @ patterns.T).mean(0) - (y @ x / SAMPLES) @ patterns.T
        drawn.append((x, y, patterns[losses.argmin()]))
    return Problem(*map(torch.stack, zip(*drawn, strict=True)))


def mean_loss(data: Problem, weight: Tensor) -> Tensor:
    """(S,): the loss per sample on all data."""
    logits = (data.x @ weight.unsqueeze(2)).squeeze(2)
    return functional.binary_cross_entropy_with_logits(logits, data.y, reduction="none").mean(1)


def sign(weight: Tensor) -> Tensor:
    """-1 or 1; 0 goes to 1."""
    return torch.where(weight < 0, -1.0, 1.0)


def draw_sign(weight: Tensor) -> Tensor:
    """1 with the chance (w + 1) / 2, else -1."""
    return torch.where(torch.rand_like(weight) * 2 - 1 < weight, 1.0, -1.0)


@dataclass(frozen=True)
class Method:
    """How to train. ``seen``: what the forward pass sees of the weight, which takes the gradient. ``keywords``: of the
    optimizer and of Anneal. ``planned``: epochs that the annealing is made for.
    """

    seen: Callable[[Tensor], Tensor] = lambda weight: weight
    clamp: bool = False
    keywords: tuple[dict[str, Any], dict[str, Any]] | None = None
    epochs: int = 50
    planned: int = 50
    half_range: float = DIMENSION**-0.5  # of the uniform initialisation; torch's Linear


def annealed(alpha: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The authors' step, with epsilon at 1 for 40 % of the training, then falling to 1e-6."""
    return askew.paper("binary", alpha=alpha)[0], {"hold": 0.4, "end": 1.0, "shape": "geometric"}


_CONNECT = {"clamp": True, "half_range": (1.5 / (DIMENSION + 1)) ** 0.5}
METHODS = {
    "full precision, rounded": Method(),
    "BinaryConnect, deterministic": Method(seen=sign, **_CONNECT),
    "BinaryConnect, stochastic": Method(seen=draw_sign, **_CONNECT),
    "AskewSGD, as shipped": Method(keywords=askew.paper("binary"), planned=100),  # epsilon falls in the second half
    "AskewSGD, 100 epochs": Method(keywords=askew.paper("binary"), epochs=100, planned=100),
    "AskewSGD, annealed": Method(keywords=annealed(0.1)),
    "AskewSGD, annealed, lr alpha = 1": Method(keywords=annealed(1 / LR)),
    "AskewSGD, capture": Method(keywords=({"quantizer": askew.Quantizer("binary", scale=1.0)}, {})),
}


def train(data: Problem, method: Method) -> Tensor:
    """(S, d): the trained weights, not rounded."""
    seeds, steps = len(data.x), SAMPLES // BATCH
    torch.manual_seed(0)
    weight = nn.Parameter(torch.empty(seeds, DIMENSION).uniform_(-method.half_range, method.half_range))
    if method.keywords is None:
        optimizer, anneal = torch.optim.SGD([weight], lr=LR), None
    else:
        optimizer = askew.AskewSGD([weight], lr=LR, **method.keywords[0])
        anneal = askew.Anneal(optimizer, total_steps=method.planned * steps, **method.keywords[1])
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30 * steps, 60 * steps], gamma=0.5)
    for _ in range(method.epochs):
        order = torch.randperm(SAMPLES)
        for x, y in zip(data.x[:, order].split(BATCH, 1), data.y[:, order].split(BATCH, 1), strict=True):
            seen = method.seen(weight.detach()).unsqueeze(1)
            wrong = torch.sigmoid((x * seen).sum(2)) - y
            weight.grad = (x * wrong.unsqueeze(2)).sum(1).div_(SAMPLES)  # of the batch's summed loss by what was seen
            optimizer.step()
            scheduler.step()
            if anneal is not None:
                anneal.step()
            if method.clamp:
                weight.data.clamp_(-1, 1)
    return weight.detach()


def at_optimum(data: Problem, weight: Tensor) -> int:
    """Seeds whose signs are the best ones."""
    return int((sign(weight) == data.best).all(1).sum())


def main() -> None:
    torch.set_num_threads(1)  # every operation is small
    parser = argparse.ArgumentParser(description="the paper's logistic toy")
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--size", type=float, default=1.0, help="of the weights that the labels are drawn with")
    arguments = parser.parse_args()
    data = problem(arguments.seeds, arguments.size)
    print(f"{'':34}{'loss':>9}{'rounded':>9}  at the optimum")
    print(f"{'best of 1,024 sign patterns':34}{'':9}{mean_loss(data, data.best).mean():9.5f}")
    for name, method in METHODS.items():
        weight = train(data, method)
        losses = mean_loss(data, method.seen(weight)).mean(), mean_loss(data, sign(weight)).mean()
        print(f"{name:34}{losses[0]:9.5f}{losses[1]:9.5f}  {at_optimum(data, weight)} of {arguments.seeds}")


if __name__ == "__main__":
    main()
