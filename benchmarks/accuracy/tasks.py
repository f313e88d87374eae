"""The tasks of the accuracy table, the cheap ones first: network, data, budget, and the base rules that are tried."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from benchmarks.accuracy import datasets, networks
from benchmarks.accuracy.methods.method import Base
from examples import digits, glosses

FINE_TUNING = 0.3  # share of the budget
STARTS = ("scratch", "fine-tuned", "pretrained")  # fine-tuned: full precision's own network; pretrained: by others


@dataclass(frozen=True)
class Task:
    """One network on one kind of data.

    network: makes one, under the seed that was set. sample: seeds, tuning -> data.
    length: epochs of images, steps of text. bases: what every peer tries.
    ours: the base rule of askew_cuda, which tries nothing; fine_tuning, binary: the same for fine-tuning, and at 1 bit
    from scratch, if another.
    factors: of the learning rate of these, by start and width. binary_decay: whether their weight decay holds at 1 bit.
    quantized: names of quantized layers begin so. granularity: of the scales.
    tuning_seeds, reporting_seeds: how many. unit: of the scores.
    warmup: share of the steps in which the learning rate rises. starts: of STARTS, those that are measured.
    peers: the names of those that are measured, where a step is slow; None: every method.
    """

    name: str
    title: str
    network: Callable[[], nn.Module]
    sample: Callable[[Sequence[int], bool], datasets.Data]
    length: int
    batch: int
    bases: tuple[Base, ...]
    ours: Base
    quantized: str = ""
    granularity: str = "tensor"
    tuning_seeds: int = 4
    reporting_seeds: int = 10
    unit: str = "%"
    warmup: float = 0.0
    fine_tuning: Base | None = None
    binary: Base | None = None
    factors: Mapping[tuple[str, str], float] = field(default_factory=dict)
    binary_decay: bool = True
    starts: tuple[str, ...] = ("scratch", "fine-tuned")
    peers: tuple[str, ...] | None = None

    @property
    def sign(self) -> int:
        """+1 where a higher score is better, -1 where a lower one is."""
        return 1 if self.unit == "%" else -1

    def plain(self, seed: int) -> nn.Module:
        """The network that a user would get after torch.manual_seed(seed)."""
        torch.manual_seed(seed)
        return self.network()

    def default(self, start: str, width: str) -> Base:
        """The base rule of askew_cuda.

        The more levels, the shorter the way to the next, and the smaller the learning rate. Weight decay pulls towards
        zero, which at 1 bit is as far from the levels as a weight can be.
        """
        base = self.ours
        if start == "fine-tuned" and self.fine_tuning:
            base = self.fine_tuning
        elif start == "scratch" and width == "binary" and self.binary:
            base = self.binary
        if width == "binary" and not self.binary_decay:
            base = replace(base, weight_decay=0.0)
        return replace(base, lr=base.lr * self.factors.get((start, width), 1.0))

    def budget(self, start: str) -> int:
        """``length`` for this start."""
        return max(1, round(FINE_TUNING * self.length)) if start == "fine-tuned" else self.length


def rates(rule: str, *lrs: float, **keywords: float) -> tuple[Base, ...]:
    """The same rule at several learning rates."""
    return tuple(Base(rule, lr, **keywords) for lr in lrs)


EITHER = rates("sgd", 0.03, 0.1, 0.3) + rates("adamw", 0.003, 0.01, 0.03)
MANY_SEEDS = {
    "tuning_seeds": 8,
    "reporting_seeds": 40,
}  # where they cost a second each, and networks are so small that they differ much
FEW_PEERS = ("STE", "STE in our box", "BinaryRelax", "PARQ", "CAGE")  # one of them is the best nearly everywhere
FEW_SEEDS = {"tuning_seeds": 2, "reporting_seeds": 5, "starts": ("scratch",), "peers": FEW_PEERS}
DECAYED = (
    rates("sgd", 0.1, 0.3, 0.5, weight_decay=0.003)
    + rates("adamw", 0.01, weight_decay=0.3)
    + rates("adamw", 0.03, weight_decay=0.1)
)
UNNORMALISED = EITHER + rates("sgd", 0.5) + DECAYED
FINE_TUNED_FACTORS = {("fine-tuned", "binary"): 2.0, ("fine-tuned", "4bit"): 0.5}
UNNORMALISED_FACTORS = FINE_TUNED_FACTORS | {("scratch", "2bit"): 0.8, ("scratch", "4bit"): 0.5}
TEXT_FACTORS = {("fine-tuned", "2bit"): 0.5, ("fine-tuned", "4bit"): 0.5}
TEXT_RULE = {"weight_decay": 0.1, "betas": (0.9, 0.95)}
SHAPE = {"symbols": datasets.SYMBOLS, "context": 32, "width": 32, "layers": 2, "heads": 2}
LARGER = {"symbols": datasets.SYMBOLS, "context": 64, "width": 64, "layers": 3, "heads": 4}
TOKENS = 16  # of a definition: most have no more


def _digits(hidden: int) -> Task:
    title = f"digits, MLP 64-{hidden}-{hidden}-10"
    make = functools.partial(digits.mlp, hidden)
    common = f"digits-{hidden}", title, make, datasets.handwritten, digits.EPOCHS, digits.BATCH
    ours = {
        "ours": Base("sgd", 0.5, 0.003),
        "fine_tuning": Base("sgd", 0.2, 0.005),
        "binary_decay": False,
        "factors": UNNORMALISED_FACTORS,
    }
    return Task(*common, UNNORMALISED, **ours, **MANY_SEEDS)


def _table(name: str, sizes: tuple[int, ...], sample: Callable, length: int, batch: int, steps: int, **changes) -> Task:
    """An MLP on data that it does not learn by heart, from scratch. steps: what ``length`` comes to."""
    title = f"{name}, MLP {'-'.join(map(str, sizes))}"
    make, ours = functools.partial(networks.mlp, *sizes), Base("sgd", 0.5, 2 / steps)  # docs/recipes.md
    settings = {"binary_decay": False, "factors": UNNORMALISED_FACTORS, "starts": ("scratch",), **changes}
    return Task(name, title, make, sample, length, batch, UNNORMALISED, ours, **settings)


def _transformer(name: str, init: str, gpt2: bool) -> Task:
    make = functools.partial(networks.Transformer, gpt2=gpt2, **SHAPE)
    title = f"characters of Python's help, transformer of 2 layers, {init}"
    bases, sample = rates("adamw", 0.005, 0.01, **TEXT_RULE), datasets.documentation(SHAPE["context"])
    settings = {"quantized": "blocks.", "granularity": "channel", "tuning_seeds": 2, "unit": "nats", "warmup": 0.08}
    return Task(
        name, title, make, sample, 1000, 16, bases, Base("adamw", 0.01, **TEXT_RULE), factors=TEXT_FACTORS, **settings
    )


EVERY_TASK = (
    *map(_digits, (16, 32)),
    _table("letters", (16, 64, 64, 26), datasets.letters, 15, 64, 1875),
    _table("dna", (180, 16, 16, 3), datasets.dna, 20, 64, 760, reporting_seeds=20),
    _table(
        "fashion-mlp",
        (784, 64, 64, 10),
        datasets.four_files(datasets.FASHION_MNIST, (784,)),
        3,
        128,
        1407,
        tuning_seeds=2,
    ),
    Task(
        name="digits-bn",
        title="digits, MLP 64-64-64-10 with BatchNorm",
        network=functools.partial(networks.mlp_batchnorm, 64),
        sample=datasets.handwritten,
        length=digits.EPOCHS,
        batch=digits.BATCH,
        bases=EITHER + DECAYED,
        ours=Base("adamw", 0.01, 0.3),  # the float run's, docs/recipes.md
        binary=Base("sgd", 0.1),
        fine_tuning=Base("sgd", 0.1, 0.005),
        binary_decay=False,
        factors={("fine-tuned", "4bit"): 0.5},
        **MANY_SEEDS,
    ),
    Task(
        name="cnn",
        title="MNIST (5,000 images), CNN with BatchNorm",
        network=functools.partial(networks.cnn, 8),
        sample=datasets.mnist,
        length=8,
        batch=64,
        bases=EITHER[:-1],
        ours=Base("sgd", 0.1),
        factors=FINE_TUNED_FACTORS,
        tuning_seeds=2,
    ),
    Task(
        name="fashion-cnn",
        title="Fashion-MNIST, CNN with BatchNorm",
        network=functools.partial(networks.cnn, 8),
        sample=datasets.four_files(datasets.FASHION_MNIST, (1, 28, 28)),
        length=1,
        batch=64,
        bases=EITHER[:-1],
        ours=Base("adamw", 0.01),  # the float run's, docs/recipes.md
        binary=Base("sgd", 0.1),
        **FEW_SEEDS,
    ),
    Task(
        name="mnist-cnn",
        title="MNIST, CNN without normalisation",
        network=functools.partial(networks.cnn, 8, norms=False),
        sample=datasets.four_files(datasets.MNIST, (1, 28, 28)),
        length=1,
        batch=64,
        bases=EITHER[:-1] + DECAYED[:2],
        ours=Base("sgd", 0.2, 2 / 938),  # docs/recipes.md
        binary_decay=False,
        factors=UNNORMALISED_FACTORS,
        **FEW_SEEDS,
    ),
    _transformer("lm-gpt2", "GPT-2's init", True),
    _transformer("lm-default", "torch's default Linear init", False),
    Task(
        name="lm-wordnet",
        title="characters of WordNet's definitions, transformer of 3 layers",
        network=functools.partial(networks.Transformer, gpt2=True, **LARGER),
        sample=datasets.dictionary(LARGER["context"]),
        length=1000,
        batch=8,
        bases=rates("adamw", 0.003, 0.01, **TEXT_RULE),
        ours=Base("adamw", 0.003, **TEXT_RULE),
        quantized="blocks.",
        granularity="channel",
        unit="nats",
        warmup=0.08,
        **FEW_SEEDS | {"tuning_seeds": 1},
    ),
    Task(
        name="minilm",
        title="classes of WordNet's definitions, MiniLM",
        network=functools.partial(networks.minilm, glosses.CLASSES),
        sample=datasets.definitions(3200, 2000, TOKENS),
        length=1,
        batch=16,
        bases=rates("adamw", 0.0001, 0.0003),
        ours=Base("adamw", 0.0003),
        quantized="blocks.",
        granularity="channel",
        warmup=0.08,
        starts=("pretrained",),
        tuning_seeds=1,
        reporting_seeds=3,
        peers=("STE", "PARQ"),
    ),
)
TASKS = {task.name: task for task in EVERY_TASK}
