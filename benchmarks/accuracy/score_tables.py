"""The tables of docs/accuracy.md from the cells that are there; what is not there is "not run".

Differences are paired: the score of askew_cuda minus the peer's on the same seed, the mean over the seeds with its
standard error; above zero askew_cuda is better, also where a lower score is.
"""

import functools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.accuracy import cells, store
from benchmarks.accuracy.loop import FULL
from benchmarks.accuracy.methods.method import WIDTHS
from benchmarks.accuracy.methods.ours import Ours
from benchmarks.accuracy.methods.registry import METHODS
from benchmarks.accuracy.store import Cell, Key
from benchmarks.accuracy.tasks import EVERY_TASK, STARTS, TASKS
from benchmarks.markdown import markdown_table
from benchmarks.results import where_made

FLOAT = "full precision"
OURS = next(method.name for method in METHODS if isinstance(method, Ours))
PEERS = tuple(method.name for method in METHODS if method.name not in (FLOAT, OURS))
CAN = {method.name: method.widths for method in METHODS}
NOT_RUN = "not run"
PLOTTED = ("letters", "dna", "fashion-mlp", "fashion-cnn", "mnist-cnn", "lm-wordnet")
SUMMARY = (
    ("letters", "scratch"),
    ("dna", "scratch"),
    ("fashion-mlp", "scratch"),
    ("fashion-cnn", "scratch"),
    ("mnist-cnn", "scratch"),
    ("lm-wordnet", "scratch"),
    ("minilm", "pretrained"),
    ("cnn", "scratch"),
    ("cnn", "fine-tuned"),
    ("lm-gpt2", "scratch"),
    ("lm-gpt2", "fine-tuned"),
    ("digits-32", "scratch"),
)  # what docs/accuracy.md opens with: real data first, losses as plainly as wins
REST = tuple(
    (task.name, start) for task in EVERY_TASK for start in task.starts if (task.name, start) not in SUMMARY
)  # toys, and digits once more: a table further down
Cells = dict[Key, Cell]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean."""
    return statistics.fmean(values), (
        statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    )


def gain(ours: Cell, peer: Cell) -> tuple[float, float]:
    """How much better ours is, seed by seed, on the seeds that both have: mean and standard error.

    Raises:
        ValueError: the two cells have no seed in common.
    """
    mine, theirs = (dict(zip(cell["seeds"], cell["scores"], strict=True)) for cell in (ours, peer))
    both = [seed for seed in mine if seed in theirs]
    if not both:
        raise ValueError(
            f"{ours['method']} has seeds {ours['seeds']}, {peer['method']} {peer['seeds']}; measure one of them --again"
        )
    sign = TASKS[ours["task"]].sign
    return mean_and_error([sign * (mine[seed] - theirs[seed]) for seed in both])


def best_peer(found: Cells, task: str, start: str, width: str) -> Cell | None:
    """The peer's cell of the best mean on the reporting seeds, a choice in the peers' favour.

    None where none was run.
    """
    there = [found[task, start, width, peer] for peer in PEERS if (task, start, width, peer) in found]
    return max(there, key=lambda cell: TASKS[task].sign * statistics.fmean(cell["scores"]), default=None)


def decimals(unit: str) -> int:
    """Digits after the point of a score."""
    return 2 if unit == "%" else 3


def shown(cell: Cell | None) -> str:
    """The mean score."""
    return NOT_RUN if cell is None else f"{statistics.fmean(cell['scores']):.{decimals(cell['unit'])}f}"


def compared(ours: Cell | None, peer: Cell | None) -> str:
    """Gain and standard error."""
    if ours is None or peer is None:
        return NOT_RUN
    digits = decimals(ours["unit"])
    return "{:+.{}f} ± {:.{}f}".format(*(each for value in gain(ours, peer) for each in (value, digits)))


def _measured(tasks: Iterable[str], starts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Every task with each of the starts that it is measured from."""
    return ((task, start) for task in tasks for start in starts if start in TASKS[task].starts)


def summary_table(folder: Path = cells.CELLS_FOLDER, rows=SUMMARY, widths=WIDTHS) -> str:
    """A row per task and start; for each width the mean of ours, and how much better it is than the best peer's."""
    found = store.read(folder)
    table = [
        [
            TASKS[task].title,
            start,
            f"{shown(found.get((task, start, FULL, FLOAT)))} ({TASKS[task].unit})",
            *(_against_best(found, task, start, width) for width in widths),
        ]
        for task, start in rows
    ]
    return markdown_table(["task", "start", FLOAT, *widths], table) + "\n\n" + provenance(found)


def _against_best(found: Cells, task: str, start: str, width: str) -> str:
    """Ours, its gain over the best peer and that peer's name; and how many peers were not run."""
    ours, best = found.get((task, start, width, OURS)), best_peer(found, task, start, width)
    missing = sum((task, start, width, peer) not in found for peer in PEERS if width in CAN[peer])
    against = f": {compared(ours, best)}, {best['method']}" if ours and best else ""
    return shown(ours) + against + (f" ({missing} peers {NOT_RUN})" if missing else "")


def methods_table(folder: Path = cells.CELLS_FOLDER, tasks=tuple(TASKS), starts=STARTS, widths=WIDTHS) -> str:
    """A table per task and start: every method, in each column its mean and how much better ours is than it."""
    found, blocks = store.read(folder), []
    for task, start in _measured(tasks, starts):
        full = found.get((task, start, FULL, FLOAT))
        rows = [[OURS, *(shown(found.get((task, start, width, OURS))) for width in widths)]]
        for peer in PEERS:
            entries = []
            for width in widths:
                ours, theirs = (found.get((task, start, width, name)) for name in (OURS, peer))
                ran = NOT_RUN if theirs is None else f"{shown(theirs)} ({compared(ours, theirs)})"
                entries.append(ran if width in CAN[peer] else "-")
            rows.append([peer, *entries])
        title = f"**{TASKS[task].title}, {start}**, {TASKS[task].unit}; {FLOAT} {shown(full)}"
        blocks.append(title + "\n\n" + markdown_table(["", *widths], rows))
    return "\n\n".join(blocks) + "\n\n" + provenance(found)


def robustness_table(folder: Path = cells.CELLS_FOLDER, tasks=tuple(TASKS), starts=STARTS, widths=WIDTHS) -> str:
    """Ours at its learning rate x 0.3, x 1, x 3, and how far the worst lies behind the best."""
    found, rows = store.read(folder), []
    for task, start in _measured(tasks, starts):
        for width in widths:
            cell = found.get((task, start, width, OURS))
            if cell is None:
                rows.append([task, start, width, *[NOT_RUN] * 4])
                continue
            digits = decimals(cell["unit"])
            means = [statistics.fmean(cell["robustness"][f"{factor:g}"]) for factor in cells.FACTORS]
            rows.append([task, start, width, *(f"{each:.{digits}f}" for each in (*means, best_minus_worst(cell)))])
    header = ["task", "start", "levels", *(f"lr x {factor:g}" for factor in cells.FACTORS), "worst behind best"]
    return markdown_table(header, rows) + "\n\n" + provenance(found)


def gains(folder: Path = cells.CELLS_FOLDER) -> dict[str, dict[str, list[float]]]:
    """For the plot: by how much ours is better than each peer, and the standard error.

    From scratch, at 1 bit and ternary.
    """
    found, panels = store.read(folder), {}
    for task in PLOTTED:
        for width in ("binary", "ternary"):
            ours = found.get((task, "scratch", width, OURS))
            theirs = {peer: found.get((task, "scratch", width, peer)) for peer in PEERS if width in CAN[peer]}
            there = {peer: list(gain(ours, cell)) for peer, cell in theirs.items() if ours and cell}
            missing = len(theirs) - len(there)
            panels[f"{task}, {width}, {TASKS[task].unit}" + (f": {missing} {NOT_RUN}" if missing else "")] = there
    return panels


def best_minus_worst(cell: Cell) -> float:
    """Best minus worst mean over the learning rates."""
    means = [statistics.fmean(values) for values in cell["robustness"].values()]
    return max(means) - min(means)


def provenance(found: Cells) -> str:
    """Where and with what the cells were made."""
    if not found:
        return "Nothing was run."
    hours = sum(cell["seconds"] for cell in found.values()) / 3600
    where = where_made(cell["environment"] for cell in found.values())
    return f"{len(found)} cells in {hours:.1f} hours of one core: {where}."


FIGURES = {
    "accuracy": summary_table,
    "accuracy-rest": functools.partial(summary_table, rows=REST),
    "accuracy-methods": methods_table,
    "accuracy-robustness": robustness_table,
}
