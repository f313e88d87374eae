"""The cells of the accuracy table: which there are, and how they are measured.

Each is written when it is done (store.py).
"""

import dataclasses
import functools
import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, results
from benchmarks.accuracy import loop, store
from benchmarks.accuracy.loop import FULL, Plan, Setting, State
from benchmarks.accuracy.methods.method import Base, FullPrecision, Method
from benchmarks.accuracy.methods.ours import Ours
from benchmarks.accuracy.methods.registry import METHODS
from benchmarks.accuracy.store import Cell, Key, as_read
from benchmarks.accuracy.tasks import EVERY_TASK, STARTS, TASKS, Task

CELLS_FOLDER = results.RESULTS / "accuracy"
NETWORKS_FOLDER = Path("build/accuracy")  # full-precision networks to fine-tune; made again where they are missing
FACTORS = (0.3, 1.0, 3.0)  # of askew_cuda's learning rate, for the robustness rows
Seeds = tuple[int, ...]


@dataclass(frozen=True)
class Campaign:
    """How much is measured, and where it is kept.

    folder: of the cells. networks: of those that fine-tuning starts from. seeds: to report; None: the task's.
    tuning: at most so many tuning seeds. length: a factor of the task's.
    """

    folder: Path = CELLS_FOLDER
    networks: Path = NETWORKS_FOLDER
    seeds: Seeds | None = None
    tuning: int | None = None
    length: float = 1.0

    def shortened(self, task: Task) -> Task:
        """The task as this campaign has it."""
        tuning = task.tuning_seeds if self.tuning is None else min(self.tuning, task.tuning_seeds)
        return dataclasses.replace(task, tuning_seeds=tuning, length=max(1, round(self.length * task.length)))

    def reporting(self, task: Task) -> Seeds:
        """The reporting seeds of the task."""
        return loop.reporting_seeds(task) if self.seeds is None else self.seeds


def widths_of(method: Method) -> tuple[str, ...]:
    """Full precision has one column of its own."""
    return (FULL,) if isinstance(method, FullPrecision) else tuple(method.widths)


def wanted(task: Task, method: Method) -> bool:
    """Whether the task measures the method."""
    return task.peers is None or isinstance(method, (FullPrecision, Ours)) or method.name in task.peers


def plans(tasks: Sequence[str], starts: Sequence[str], widths: Sequence[str], methods: Sequence[str]) -> Iterator[Plan]:
    """Every cell of the choice, in the order of measurement: the cheap tasks first, from scratch before fine-tuning."""
    for task in EVERY_TASK:
        for start in STARTS:
            if task.name not in tasks or start not in starts or start not in task.starts:
                continue
            for method in METHODS:
                if method.name in methods and wanted(task, method):
                    yield from (
                        Plan(task, start, width, method) for width in widths_of(method) if width in (FULL, *widths)
                    )


def key(plan: Plan) -> Key:
    """What names the cell."""
    return plan.task.name, plan.start, plan.width, plan.method.name


def done(plan: Plan, campaign: Campaign) -> Cell | None:
    """The cell where nothing is left to measure; else None.

    It is there, was tried at all that the plan tries, and has all seeds.
    """
    cell = _known(plan, campaign)
    if cell is None or not set(campaign.reporting(plan.task)) <= set(cell["seeds"]):
        return None
    tried = [each["setting"] for each in cell["tried"]] or [cell["chosen"]]
    return cell if tried == as_read(plan.settings()) else None


def _known(plan: Plan, campaign: Campaign) -> Cell | None:
    """What is there of the cell.

    None where nothing is, or where it was fine-tuned from other networks than those of full precision today.
    """
    cell = store.find(campaign.folder, key(plan))
    return cell if cell and cell["origin"] == _origin(plan, campaign) else None


def _origin(plan: Plan, campaign: Campaign) -> dict[str, Any] | None:
    """The setting that made the networks which fine-tuning starts from.

    None for networks that the task itself makes, and where full precision has not been measured.
    """
    if plan.start != "fine-tuned":
        return None
    full = done(_full_precision(plan), campaign)
    return full and full["chosen"]


def _full_precision(plan: Plan) -> Plan:
    return Plan(TASKS[plan.task.name], "scratch", FULL, FullPrecision())


def measure(plan: Plan, campaign: Campaign) -> Cell:
    """The cell, read where it is done, else measured and written.

    What is there is not measured again: settings that were tried, and where they still choose the same one, its scores.
    """
    cell = done(plan, campaign)
    if cell is not None:
        return cell
    begun = time.process_time()
    if plan.start == "fine-tuned":
        measure(_full_precision(plan), campaign)
    known, origin = _known(plan, campaign), _origin(plan, campaign)
    plan = dataclasses.replace(plan, task=campaign.shortened(plan.task))
    tried = _tried(plan, campaign, known, origin)
    chosen = loop.best_setting(plan.task, tried) if tried else plan.settings()[0]
    scores: dict[str, list[float]] = {}
    seeds: list[int] = []
    if known and known["chosen"] == as_read(chosen):
        scores, seeds = known["robustness"] or {"1": known["scores"]}, known["seeds"]
    missing = tuple(seed for seed in campaign.reporting(plan.task) if seed not in seeds)
    for factor in ((1.0,) if plan.tuned else FACTORS) if missing else ():
        setting = dataclasses.replace(chosen, base=dataclasses.replace(chosen.base, lr=factor * chosen.base.lr))
        trained = loop.train_networks(
            plan, setting, missing, tuning=False, state=_initial_weights(plan, campaign, origin, missing, False)
        )
        scores[f"{factor:g}"] = scores.get(f"{factor:g}", []) + trained.scores
    cell = dict(zip(("task", "start", "width", "method"), key(plan), strict=True)) | {
        "unit": plan.task.unit,
        "budget": plan.task.budget(plan.start),
        "origin": origin,
        "tuning seeds": loop.tuning_seeds(plan.task) if tried else [],
        "tried": [{"setting": setting, "validation": values} for setting, values in tried],
        "chosen": chosen,
        "seeds": [*seeds, *missing],
        "scores": scores["1"],
        "robustness": scores if len(scores) > 1 else {},
        "seconds": time.process_time()
        - begun
        + (known["seconds"] if known else 0),  # of one core, whatever else the machine does
        "environment": environment_of_scores(),
    }
    store.put(campaign.folder, cell)
    return as_read(cell)


def measure_in_own_process(cell: Key, campaign: Campaign) -> tuple[float, str]:
    """Seconds of a core that one cell took and, where it could not be measured, why; on one thread."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*(clipping to the outermost levels)")
    (plan,) = plans(*([name] for name in cell))
    begun = time.process_time()
    try:
        measure(plan, campaign)
    except Exception as error:  # the other cells don't depend on it, and the table says "not run"
        return time.process_time() - begun, f"{type(error).__name__}: {error}"
    return time.process_time() - begun, ""


def _tried(
    plan: Plan, campaign: Campaign, known: Cell | None, origin: dict[str, Any] | None
) -> list[tuple[Setting, list[float]]]:
    """Every setting with its scores on the tuning seeds; none where nothing is tuned."""
    before = {json.dumps(each["setting"]): each["validation"] for each in known["tried"]} if known else {}
    seeds, found = loop.tuning_seeds(plan.task), []
    for setting in plan.settings() if plan.tuned else []:
        scores = before.get(json.dumps(as_read(setting)))
        if scores is None:
            scores = loop.train_networks(
                plan, setting, seeds, tuning=True, state=_initial_weights(plan, campaign, origin, seeds, True)
            ).scores
        found.append((setting, scores))
    return found


@functools.cache
def environment_of_scores() -> dict[str, object]:
    """What the scores may depend on; as it was when this process measured its first cell."""
    known = machine.environment()
    return {name: known[name] for name in ("commit", "date", "processor", "cores", "cpu_kernel", "torch", "python")}


def _initial_weights(
    plan: Plan, campaign: Campaign, origin: dict[str, Any] | None, seeds: Seeds, tuning: bool
) -> State | None:
    """The weights that a training starts from.

    None from scratch, else those of full precision, of the same seeds on the same data.
    """
    if origin is None:
        return None
    scratch = dataclasses.replace(_full_precision(plan), task=plan.task)
    setting = Setting(Base(**origin["base"]), origin["knob"])
    where = campaign.networks / f"{plan.task.name}-{fingerprint(plan.task, setting, seeds, tuning)}.pt"
    if not where.exists():
        trained = loop.train_networks(scratch, setting, seeds, tuning=tuning)
        where.parent.mkdir(parents=True, exist_ok=True)
        unfinished = where.with_suffix(f".{os.getpid()}")
        torch.save(trained.state, unfinished)
        unfinished.replace(where)
    return torch.load(where)


def fingerprint(task: Task, setting: Setting, seeds: Sequence[int], tuning: bool) -> str:
    """Of all that a network to start from depends on: numbers, and the code that makes and trains it.

    The same in every process.
    """
    numbers = (task.name, task.length, task.batch, task.warmup, setting, tuple(seeds), tuning)
    code = [
        (Path(__file__).parent / f"{name}.py").read_text()
        for name in ("datasets", "networks", "stacked", "tasks", "loop")
    ]
    return hashlib.sha256("\n".join([repr(numbers), *code]).encode()).hexdigest()[:16]


def names(methods: Sequence[Method] = METHODS) -> list[str]:
    """Of the rows of the table."""
    return [method.name for method in methods]
