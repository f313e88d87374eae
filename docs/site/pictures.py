"""Draws the pictures of the method into docs/pictures.    python -m docs.site.pictures [NAME ..]

They show what the library itself computes: half-widths by its schedule, displacements and paths by its steps. Text and
axes take the colour of the text around them; alone, a picture follows the system's colours.
"""

import argparse
import io
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import askew_cuda as askew
from askew_cuda.schedule import epsilon_of, half_width
from benchmarks.results import RESULTS
from examples.minilm import EVERY, read

FOLDER = Path(__file__).parent.parent / "pictures"
TEXT = "#010203"  # stands for the colour of the text around
BLUE, ORANGE, GREEN, GREY = "#4c8bf5", "#e8710a", "#1e9e63", "#8a8f98"  # each readable on white and on black
LEVELS = askew.Codebook.named("2bit").levels
STYLE = (
    "<style>svg:root{color:#1f2328}@media(prefers-color-scheme:dark){svg:root{color:#d1d7e0}}"
    "svg text{font-family:system-ui,sans-serif}</style>"
)


def radius(progress: float) -> float:
    """r by the default schedule, half-way through which annealing begins."""
    return half_width({"hold": 0.5, "end": 0.95, "shape": "quadratic"}, progress)


def feasible_set() -> Figure:
    """Where weights are free, from the first step to the last."""
    figure, both = panels(2, "progress of the training")
    progress = [i / 100 for i in range(101)]
    r = [radius(each) for each in progress]
    for axis, title in zip(
        both, ("interval: weights shall lie in here", "capture: weights move freely in here"), strict=True
    ):
        axis.set_title(title)
        for lower, upper in itertools.pairwise(LEVELS):
            middle, half = (lower + upper) / 2, (upper - lower) / 2
            if title.startswith("interval"):
                for level, side in ((lower, 1), (upper, -1)):
                    axis.fill_betweenx(
                        progress, level, [level + side * half * each for each in r], color=BLUE, alpha=0.35, lw=0
                    )
            else:
                axis.fill_betweenx(
                    progress,
                    [middle - half * each for each in r],
                    [middle + half * each for each in r],
                    color=ORANGE,
                    alpha=0.35,
                    lw=0,
                )
        for level in LEVELS:
            axis.axvline(level, color=TEXT, lw=1.2)
        axis.set(xlabel="weight / scale", xlim=(-1.75, 1.75), ylim=(1, 0), xticks=LEVELS)
    return figure


def displacement(anneal: str, r: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of 2 bit without a gradient, none half-way between two levels, and by how much one step moves each, in
    level units.
    """
    weight = nn.Parameter(torch.linspace(-1.5, 1.5, 900, dtype=torch.float64))
    quantizer = askew.Quantizer("2bit", scale=1.0)
    optimizer = askew.AskewSGD([weight], lr=0.1, quantizer=quantizer, anneal=anneal, epsilon=epsilon_of(r), scale_lr=0)
    before, weight.grad = weight.detach().clone(), torch.zeros_like(weight)
    optimizer.step()
    return before, weight.detach() - before


def two_annealings() -> Figure:
    """What one step does to a weight that no gradient moves."""
    figure, both = panels(2, "displacement in one step")
    for axis, anneal in zip(both, ("interval", "capture"), strict=True):
        axis.set_title(anneal)
        for r, colour, width in ((0.8, GREEN, 1.2), (0.5, BLUE, 3), (0.2, ORANGE, 5)):
            before, moved = displacement(anneal, r)
            breaks = torch.cat([torch.tensor([False]), moved.diff().abs() > (0.3 if anneal == "interval" else 0.03)])
            path = moved.masked_fill(breaks, math.nan)
            axis.plot(before, path, color=colour, lw=width, zorder=2 + r, label=f"r = {r}")
        for level in LEVELS:
            axis.axvline(level, color=TEXT, lw=1.2)
        axis.axhline(0, color=GREY, lw=0.6)
        axis.set(xlabel="weight / scale", xticks=LEVELS)
        legend(axis)
    return figure


def toy(anneal: str, watch: Callable[[nn.Module, askew.AskewSGD], None], steps: int = 300) -> None:
    """A small network learns what a larger one says, ternary, from scratch."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    x = torch.randn(256, 8)
    y = teacher(x).detach().argmax(1)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    groups = askew.param_groups(model, {"*": "ternary"}, verbose=False)
    optimizer = askew.AskewSGD(groups, lr=0.3, momentum=0.9, anneal=anneal, total_steps=steps)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        rates.step()
        watch(model, optimizer)
    optimizer.finalize()


def weights_travel() -> Figure:
    """Every weight of a layer, from its initialisation to its level."""
    figure, both = panels(2, "weight / scale")
    for axis, anneal in zip(both, ("interval", "capture"), strict=True):
        ways, free = [], []

        def watch(model: nn.Module, optimizer: askew.AskewSGD, ways: list = ways, free: list = free) -> None:
            weight = model[0].weight
            ways.append((weight / optimizer.state[weight]["scale"]).detach().flatten())
            free.append(optimizer.param_groups[0]["epsilon"] == 1)

        toy(anneal, watch)
        paths = torch.stack(ways)
        for code, colour in ((-1, BLUE), (0, GREEN), (1, ORANGE)):
            axis.plot(range(0, len(ways), 2), paths[::2, paths[-1].round() == code], color=colour, lw=0.6, alpha=0.75)
        axis.axvspan(sum(free), len(free), color=GREY, alpha=0.15, lw=0)
        axis.text(sum(free) + 3, 1.07, "annealing", color=TEXT, size=8)
        axis.set(title=anneal, xlabel="step", yticks=(-1, 0, 1), ylim=(-1.15, 1.2), xlim=(0, len(free)))
    return figure


def learning_scale() -> Figure:
    """Scales of three layers that learn, from three starts."""
    figure, (axis,) = panels(1, "scale / where it starts by rule")
    pyplot.setp(axis, yscale="log")
    for factor, style in ((0.5, ":"), (1.0, "-"), (2.0, "--")):
        scales, free = letters(factor)
        for layer, colour in enumerate((BLUE, ORANGE, GREEN)):
            label = f"layer {layer + 1}" if factor == 1 else None
            axis.plot([each[layer] for each in scales], color=colour, ls=style, lw=1.5, label=label)
    axis.axvspan(free, len(scales), color=GREY, alpha=0.15, lw=0)
    axis.text(free + 8, axis.get_ylim()[0] * 1.06, "annealing: scales stay", color=TEXT, size=8)
    axis.set(xlabel="step", xlim=(0, len(scales)))
    ticks = (0.5, 1, 2)
    axis.set_yticks(ticks, labels=[f"{each:g}" for each in ticks])
    axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    legend(axis)
    return figure


def minilm() -> Figure:
    """The losses of MiniLM's trainings, from what examples/minilm.py has left in the results."""
    figure, (axis,) = panels(1, "training loss, nats")
    colours = itertools.cycle((GREY, ORANGE, BLUE, GREEN))
    for run, colour in zip(read(RESULTS), colours, strict=False):
        steps = [EVERY * (point + 1) for point in range(len(run.losses))]
        axis.plot(steps, run.losses, color=colour, lw=1, label=run.way)
    axis.set(xlabel="step", xlim=(0, None), ylim=(0.4, 1.6))
    legend(axis)
    return figure


def letters(factor: float, steps: int = 900) -> tuple[list[list[float]], int]:
    """LetterRecognition, an MLP at 1 bit whose scales start at ``factor`` times their rule's: scales in units of that
    rule's after each step, and for how many steps they learned.
    """
    import numpy

    data = numpy.load(Path(__file__).parents[2] / "benchmarks/accuracy/data/letters.npz")
    x = torch.tensor(data["x"], dtype=torch.float32)
    x, y = (x - x.mean(0)) / x.std(0), torch.tensor(data["y"], dtype=torch.int64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 26))
    groups = askew.param_groups(model, {"*": "binary"}, verbose=False)
    optimizer = askew.AskewSGD(groups, lr=0.5, momentum=0.9, total_steps=steps)
    optimizer.prepare()
    weights = [model[i].weight for i in (0, 2, 4)]
    rule = [optimizer.state[weight]["scale"].item() for weight in weights]
    for weight in weights:
        optimizer.state[weight]["scale"].mul_(factor)
    found, free = [], 0
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        free += optimizer.param_groups[0]["epsilon"] == 1
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        rates.step()
        found.append([optimizer.state[w]["scale"].item() / start for w, start in zip(weights, rule, strict=True)])
    return found, free


def panels(count: int, label: str) -> tuple[Figure, list[Axes]]:
    figure, axes = pyplot.subplots(1, count, figsize=(9, 3.4), sharey=True, squeeze=False)
    axes[0, 0].set_ylabel(label)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def legend(axis: Axes) -> None:
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=3, frameon=False)


def svg_of(name: str) -> str:
    """The picture as SVG text, made to stand alone and within a page."""
    look = {key: TEXT for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    look |= {
        "svg.hashsalt": name,
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.titlesize": 10,
        "savefig.transparent": True,
    }
    with matplotlib.rc_context(look):
        figure = PICTURES[name]()
        figure.tight_layout()
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    svg = re.sub(r"[ \t]+$", "", text.getvalue(), flags=re.MULTILINE).replace(TEXT, "currentColor")
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"<metadata>.*?</metadata>\n?", "", svg, flags=re.DOTALL)
    return re.sub(r"<style type=.*?</style>", STYLE, svg, count=1, flags=re.DOTALL)


PICTURES: dict[str, Callable[[], Figure]] = {
    "feasible-set": feasible_set,
    "two-annealings": two_annealings,
    "weights-travel": weights_travel,
    "learning-scale": learning_scale,
    "minilm": minilm,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[], metavar="NAME", help=", ".join(PICTURES))
    for name in parser.parse_args().names or PICTURES:
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / f"{name}.svg").write_text(svg_of(name))
        print("written:", f"docs/pictures/{name}.svg")


if __name__ == "__main__":
    main()
