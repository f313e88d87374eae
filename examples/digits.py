"""Digits: scikit-learn's 8 x 8 handwritten digits and a small MLP, the task that the demo and the accuracy table share.

Trains one network three ways on the same data in the same order: in full precision, with a straight-through estimator,
and with askew_cuda. Every weight matrix is quantized, the first and the last one included; biases are not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn.utils import parametrize

import askew_cuda as askew
from askew_cuda import reference
from askew_cuda.scales import estimate

EPOCHS, BATCH = 30, 64


@dataclass(frozen=True)
class Data:
    """Standardised images (n, 64) float32 and labels (n,) int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits(seed: int) -> Data:
    """1,437 training and 360 test images, split by class; standardised by the training images."""
    x, y = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.2, stratify=y, random_state=seed)
    scaler = StandardScaler().fit(train_x)
    as_x, as_y = (lambda a: torch.tensor(scaler.transform(a), dtype=torch.float32)), torch.tensor
    return Data(as_x(train_x), as_y(train_y), as_x(test_x), as_y(test_y))


def mlp(hidden: int) -> nn.Sequential:
    """64-hidden-hidden-10 with torch's default initialisation."""
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10))


class StraightThrough(nn.Module):
    """The rival: the forward pass sees the rounded weight, the gradient goes to the latent one as if it had not been
    rounded.

    The scale, of the whole weight or of each output, is estimated anew in every forward pass of the training: mean|w|
    for 1 bit and ternary; for more levels one least-squares refit of the min-MSE scale to the current rounding.
    """

    def __init__(self, quantizer: askew.Quantizer, weight: Tensor):
        super().__init__()
        self.levels, self.each_output = quantizer.codebook.levels, quantizer.granularity == "channel"
        scale = estimate(weight.detach(), quantizer, pretrained="packed", name="weight")
        self.register_buffer("scale", scale.view(-1, 1))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            rows = weight.flatten(1) if self.each_output else weight.reshape(1, -1)
            if self.training and len(self.levels) <= 3:
                self.scale = rows.abs().mean(1, keepdim=True)
            book = reference.codebook(self.levels, weight)
            level = book.unit * book.level(book.nearest(rows / (self.scale * book.unit)))
            if self.training and len(self.levels) > 3:
                self.scale = (rows * level).sum(1, keepdim=True) / (level * level).sum(1, keepdim=True)
            rounded = (self.scale * level).view_as(weight)
        return weight + (rounded - weight).detach()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Test accuracy in per cent."""
    model.eval()
    right = (model(data.test_x).argmax(1) == data.test_y).double().mean().item()
    model.train()
    return 100 * right


def fit(
    model: nn.Module,
    data: Data,
    optimizer: torch.optim.Optimizer,
    seed: int,
    anneal: askew.Anneal | None,
    each: Callable[[], None],
) -> None:
    """The training loop: a cosine learning rate to zero, the data order of the seed; ``each`` is called after every
    step.
    """
    order = torch.Generator().manual_seed(seed)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps(data))
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(data.train_x), generator=order).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.train_x[batch]), data.train_y[batch]).backward()
            optimizer.step()
            scheduler.step()
            if anneal is not None:
                anneal.step()
            each()


def steps(data: Data) -> int:
    """Steps of a training."""
    return EPOCHS * -(-len(data.train_x) // BATCH)


def nothing() -> None:
    """The default of ``each``."""


def full_precision(hidden: int, seed: int, each: Callable[[], None] = nothing) -> float:
    """Test accuracy of the network as it is, torch.optim.SGD, lr 0.1."""
    data, model = digits(seed), _seeded(hidden, seed)
    fit(model, data, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), seed, None, each)
    return accuracy(model, data)


def straight_through(name: str, hidden: int, seed: int, each: Callable[[], None] = nothing) -> float:
    """Test accuracy with a straight-through estimator, torch.optim.SGD, lr 0.1."""
    data, model = digits(seed), _seeded(hidden, seed)
    for layer in model:
        if isinstance(layer, nn.Linear):
            parametrize.register_parametrization(
                layer, "weight", StraightThrough(askew.Quantizer.parse(name), layer.weight)
            )
    fit(model, data, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), seed, None, each)
    return accuracy(model, data)


def settings(name: str, total: int) -> dict[str, float]:
    """Learning rate and weight decay by the number of levels and steps, as docs/recipes.md has them."""
    levels = len(askew.Quantizer.parse(name).codebook)
    lr = 0.5 if levels < 4 else 0.4 if levels < 8 else 0.25
    return {"lr": lr, "weight_decay": 0.0 if levels == 2 else 2 / total}


def quantized(
    name: str, hidden: int, seed: int, each: Callable[[nn.Module, askew.AskewSGD], None] = lambda *_: None, **keywords
) -> float:
    """Test accuracy with askew_cuda's defaults after finalize(): every weight matrix is on its levels.

    ``each(model, optimizer)`` is called after every step; ``keywords`` go to the param groups.
    """
    data, model = digits(seed), _seeded(hidden, seed)
    groups = askew.param_groups(model, {"*": name}, verbose=False, **keywords)
    optimizer = askew.AskewSGD(groups, momentum=0.9, **settings(name, steps(data)))
    anneal = askew.Anneal(optimizer, total_steps=steps(data))
    fit(model, data, optimizer, seed, anneal, lambda: each(model, optimizer))
    report = optimizer.finalize()
    if report.share_on_level < 1:
        raise AssertionError(f"{name}: only {report.share_on_level:.4%} of the weights had reached their levels")
    return accuracy(model, data)


def _seeded(hidden: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return mlp(hidden)
