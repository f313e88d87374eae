"""Whether the cells have the accuracy that the project set itself as targets; a target is a list of comparisons.

"Ahead" and "not behind" are about mean paired differences; where a target asks for standard errors, it says how many.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accuracy import cells, store
from benchmarks.accuracy.methods.method import WIDTHS
from benchmarks.accuracy.score_tables import (
    CAN,
    NOT_RUN,
    OURS,
    PEERS,
    Cells,
    best_minus_worst,
    best_peer,
    compared,
    gain,
)
from benchmarks.accuracy.tasks import EVERY_TASK, TASKS
from benchmarks.markdown import markdown_table

Place = tuple[str, str]  # task, start
EVERYWHERE: tuple[Place, ...] = tuple((task.name, start) for task in EVERY_TASK for start in task.starts)
FROM_SCRATCH = tuple(place for place in EVERYWHERE if place[1] == "scratch")
TRAINED_BEFORE = tuple(place for place in EVERYWHERE if place[1] != "scratch")
LETTERS = (("letters", "scratch"),)
TABLES = (*LETTERS, ("dna", "scratch"), ("fashion-mlp", "scratch"))  # MLPs don't learn these data by heart
REAL = (
    *TABLES,
    *((task, "scratch") for task in ("cnn", "fashion-cnn", "mnist-cnn", "lm-wordnet")),
    ("minilm", "pretrained"),
)
A_POINT = {"%": 1.0, "nats": 0.01}  # one per cent of perplexity
CHANCE = {
    "%": 20.0,
    "nats": 3.0,
}  # ten classes by chance are 10 %; single characters without what precedes them take about 3 nats
Rule = Callable[[float, float], bool]  # gain in points, standard error -> whether it holds


@dataclass(frozen=True)
class Check:
    """One comparison: holds, or not, or None: not run. ``text``: what was found."""

    holds: bool | None
    text: str


@dataclass(frozen=True)
class Target:
    """What is asked for, and its comparisons."""

    text: str
    checks: Callable[[Cells], Iterable[Check]]


def against(
    places: Iterable[Place], widths: Iterable[str], peers: Iterable[str], rule: Rule
) -> Callable[[Cells], Iterator[Check]]:
    """Ours against each of the peers that can do the width and that the task measures; a peer named "best" is the best
    of those that were run.
    """

    def checks(found: Cells) -> Iterator[Check]:
        for task, start in places:
            measured, point = TASKS[task].peers or PEERS, A_POINT[TASKS[task].unit]
            for width in widths:
                ours = found.get((task, start, width, OURS))
                for peer in peers:
                    if peer != "best" and (peer not in measured or width not in CAN[peer]):
                        continue
                    theirs = (
                        best_peer(found, task, start, width)
                        if peer == "best"
                        else found.get((task, start, width, peer))
                    )
                    if ours is None or theirs is None:
                        yield Check(None, f"{task} {width} against {peer}")
                        continue
                    text = f"{task} {width} against {theirs['method']} {compared(ours, theirs)}"
                    yield Check(rule(*(value / point for value in gain(ours, theirs))), text)

    return checks


def steady(found: Cells) -> Iterator[Check]:
    """The worst learning rate at most 1.5 points behind the best, where scores are in points."""
    for task, start, width in _ours():
        if TASKS[task].unit == "%":
            cell = found.get((task, start, width, OURS))
            name = f"{task} {start} {width}"
            yield (
                Check(None, name)
                if cell is None
                else Check(best_minus_worst(cell) <= 1.5, f"{name} {best_minus_worst(cell):.2f}")
            )


def learned(found: Cells) -> Iterator[Check]:
    """No network of ours at chance."""
    for task, start, width in _ours():
        cell = found.get((task, start, width, OURS))
        name, sign, chance = f"{task} {start} {width}", TASKS[task].sign, CHANCE[TASKS[task].unit]
        if cell is None:
            yield Check(None, name)
            continue
        lost = [score for score in cell["scores"] if not sign * score > sign * chance]
        yield Check(
            not lost,
            f"{name}, {len(lost)} of {len(cell['scores'])} networks, mean {statistics.fmean(cell['scores']):.2f}",
        )


def _ours() -> Iterator[tuple[str, str, str]]:
    return ((task, start, width) for task, start in EVERYWHERE for width in WIDTHS)


def ahead(gain: float, error: float) -> bool:
    return gain > 0


def clearly_ahead(gain: float, error: float) -> bool:
    return gain > 2 * error


def hardly_behind(gain: float, error: float) -> bool:
    return gain >= -error


def tied(gain: float, error: float) -> bool:
    return gain >= -2 * error


def within_a_point(gain: float, error: float) -> bool:
    return gain >= -1 or tied(gain, error)


FEW_LEVELS, MORE_LEVELS = ("binary", "ternary"), ("2bit", "4bit")
TARGETS = (
    Target(
        "letters, DNA, Fashion-MNIST (MLP), 1 bit and ternary: ahead of every peer by more than two standard errors",
        against(TABLES, FEW_LEVELS, PEERS, clearly_ahead),
    ),
    Target(
        "real tasks, 1 bit and ternary: behind the best peer by more than two standard errors nowhere",
        against(REAL, FEW_LEVELS, ("best",), tied),
    ),
    Target(
        "every task from scratch, 2 and 4 bit: not behind the best peer by more than one standard error",
        against(FROM_SCRATCH, MORE_LEVELS, ("best",), hardly_behind),
    ),
    Target(
        "networks that are trained already: not behind STE by more than one standard error",
        against(TRAINED_BEFORE, WIDTHS, ("STE",), hardly_behind),
    ),
    Target("the worst of lr x 0.3, x 1, x 3 at most 1.5 points below the best", steady),
    Target(
        "floor: letters, 1 bit and ternary: a better mean than every peer",
        against(LETTERS, FEW_LEVELS, PEERS, ahead),
    ),
    Target(
        "floor: real tasks: nowhere a point behind the best peer, or 0.01 nats, but for ties",
        against(REAL, WIDTHS, ("best",), within_a_point),
    ),
    Target("floor: no network at chance", learned),
)


def verdict(checks: Iterable[Check]) -> tuple[str, str]:
    """(whether the target holds, what misses it)."""
    checks = [*checks]
    open_, missed = (
        [each for each in checks if each.holds is None],
        [each.text for each in checks if each.holds is False],
    )
    holds = len(checks) - len(open_) - len(missed)
    word = "no" if missed else NOT_RUN if open_ else "yes"
    return f"{word}: {holds} of {len(checks)}" + (
        f", {len(open_)} {NOT_RUN}" if open_ and word != NOT_RUN else ""
    ), "; ".join(missed)


def targets_table(folder: Path = cells.CELLS_FOLDER) -> str:
    """A row per target: whether it holds, and every comparison that misses it."""
    found = store.read(folder)
    return markdown_table(
        ["target", "holds", "misses"], [[target.text, *verdict(target.checks(found))] for target in TARGETS]
    )
