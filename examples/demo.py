"""The demo: trains digits at 1 bit, ternary, 2 and 4 bit, beside full precision and a straight-through estimator.

    python -m examples.demo [--hidden 16] [--seeds 10] [--picture digits.png]

Prints a table and draws a picture: accuracy by bits, and how the weights of one network travel to their levels.
"""

import argparse
import functools
import statistics
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen is needed

import torch
from matplotlib import pyplot
from tqdm import tqdm

from askew_cuda.quantizer import Quantizer
from examples import digits

WIDTHS = {"binary": "1 bit", "ternary": "ternary", "2bit": "2 bit", "4bit": "4 bit"}
TRAVELLERS = 150  # weights whose way is drawn


class Travel:
    """The way of some weights of the middle layer, in level units, and the half-width r, step by step."""

    def __init__(self):
        self.weights: list[torch.Tensor] = []
        self.epsilon: list[float] = []

    def __call__(self, model: torch.nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        weight = model[2].weight
        some = weight.detach().flatten()[:: max(1, weight.numel() // TRAVELLERS)]
        self.weights.append((some / optimizer.state[weight]["scale"]).clone())
        self.epsilon.append(float(optimizer.param_groups[0]["epsilon"]))


def train_all(hidden: int, seeds: int) -> tuple[dict[str, dict[str, list[float]]], Travel]:
    """Accuracies by method and width, seed by seed; and the way of a ternary network's weights."""
    trainings = [("full precision", "", digits.full_precision)]
    for name in WIDTHS:
        trainings.append(("straight-through", name, functools.partial(digits.straight_through, name)))
        trainings.append(("askew_cuda", name, functools.partial(digits.quantized, name)))
    travel = Travel()
    found: dict[str, dict[str, list[float]]] = {}
    with tqdm(total=len(trainings) * seeds * digits.steps(digits.digits(0)), unit="step", smoothing=0.05) as bar:
        for method, name, train in trainings:
            for seed in range(seeds):
                bar.set_description(f"{method} {WIDTHS.get(name, '')} seed {seed}".ljust(34))

                def each(*arguments, watched=(method, name, seed) == ("askew_cuda", "ternary", 0)) -> None:
                    bar.update()
                    if watched:
                        travel(*arguments)

                found.setdefault(method, {}).setdefault(name, []).append(train(hidden, seed, each))
    return found, travel


def table(found: dict[str, dict[str, list[float]]], hidden: int, seeds: int) -> str:
    """Mean test accuracies."""
    lines = [
        f"Test accuracy in %, digits, MLP 64-{hidden}-{hidden}-10, all weight matrices quantized, mean of {seeds} "
        f"seeds; full precision {statistics.mean(found['full precision']['']):.2f}",
        f"{'':10}{'straight-through':>18}{'askew_cuda':>14}",
    ]
    for name, title in WIDTHS.items():
        cells = [statistics.mean(found[method][name]) for method in ("straight-through", "askew_cuda")]
        lines.append(f"{title:10}{cells[0]:18.2f}{cells[1]:14.2f}")
    return "\n".join(lines)


def draw(found: dict[str, dict[str, list[float]]], travel: Travel, path: Path) -> None:
    """Accuracy by bits; weights on their way to the levels."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), width_ratios=(2, 3))
    full = statistics.mean(found["full precision"][""])
    left.axhline(full, color="0.4", linestyle="--", label="full precision")
    for method, marker in (("straight-through", "s"), ("askew_cuda", "o")):
        points = [found[method][name] for name in WIDTHS]
        means = [statistics.mean(each) for each in points]
        left.errorbar(
            list(WIDTHS.values()),
            means,
            yerr=[
                [m - min(each) for m, each in zip(means, points, strict=True)],
                [max(each) - m for m, each in zip(means, points, strict=True)],
            ],
            marker=marker,
            capsize=3,
            label=method,
        )
    left.set_ylabel("test accuracy, % (bars: range over seeds)")
    left.legend(loc="lower right")
    ways = torch.stack(travel.weights)
    codes = ways[-1].round().long()  # ternary: the level is the code
    for code, colour in ((-1, "tab:blue"), (0, "tab:green"), (1, "tab:red")):
        right.plot(ways[:, codes == code], color=colour, linewidth=0.5, alpha=0.5)
    for level in Quantizer.parse("ternary").codebook.levels:
        right.axhline(level, color="0.2", linewidth=0.8, linestyle=":")
    starts = next(i for i, epsilon in enumerate(travel.epsilon) if epsilon < 1)
    ends = next(i for i, epsilon in enumerate(travel.epsilon) if epsilon == 0)
    right.axvspan(starts, ends, color="0.9", label="annealing")
    right.set_xlabel("step")
    right.set_ylabel("weight / scale")
    right.set_title("ternary: every weight travels to its level", fontsize=10)
    right.legend(loc="upper left", bbox_to_anchor=(0.0, 0.97), framealpha=1)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=16, help="width of the hidden layers")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--picture", type=Path, default=Path("digits.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the network is too small for more
    start = time.perf_counter()
    found, travel = train_all(arguments.hidden, arguments.seeds)
    draw(found, travel, arguments.picture)
    print(table(found, arguments.hidden, arguments.seeds))
    print(f"{time.perf_counter() - start:.0f} s. Picture: {arguments.picture}")


if __name__ == "__main__":
    main()
