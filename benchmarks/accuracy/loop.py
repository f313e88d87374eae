"""The one loop, and the rule by which every method is tuned.

Tuning: every base rule of the task times every setting of the method's knob is tried on the tuning seeds, whose
networks are trained on four fifths of their training data and judged on the rest; the best mean wins, the first of
equals. Reporting: the winner on the reporting seeds, trained on all training data and judged on test data that nothing
was chosen by. askew_cuda tries nothing.
"""

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.accuracy import stacked
from benchmarks.accuracy.methods.method import Base, Method
from benchmarks.accuracy.methods.ours import Ours
from benchmarks.accuracy.tasks import Task

FIRST_TUNING_SEED = 1000
FULL = "float"  # the width of full precision
State = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """What a method is tried at."""

    base: Base
    knob: Any = None


@dataclass(frozen=True)
class Plan:
    """What is trained: a method on a task, from scratch or fine-tuned, at a width."""

    task: Task
    start: str
    width: str
    method: Method

    @property
    def tuned(self) -> bool:
        """Everything but askew_cuda with its defaults."""
        return not isinstance(self.method, Ours)

    def settings(self) -> list[Setting]:
        """All that are tried; one for askew_cuda."""
        if not self.tuned:
            return [Setting(self.task.default(self.start, self.width))]
        return [Setting(base, knob) for base in self.task.bases for knob in self.method.knobs]


@dataclass(frozen=True)
class Trained:
    """Scores of S networks on what they were not trained on, and the stacked weights."""

    scores: list[float]
    state: State


def tuning_seeds(task: Task) -> tuple[int, ...]:
    """None of them is a reporting seed."""
    return tuple(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + task.tuning_seeds))


def reporting_seeds(task: Task) -> tuple[int, ...]:
    """What the table shows is measured on these."""
    return tuple(range(task.reporting_seeds))


def network_of(task: Task, seeds: Sequence[int], state: State | None = None) -> nn.Module:
    """The networks of the seeds as one, freshly initialised or with the weights given."""
    network = stacked.stack([task.plain(seed) for seed in seeds])
    if state is not None:
        network.load_state_dict(state)
    return network


def train_networks(
    plan: Plan, setting: Setting, seeds: Sequence[int], *, tuning: bool, state: State | None = None
) -> Trained:
    """Trains one network per seed and judges them. ``state``: trained weights to start from, those of fine-tuning."""
    task = plan.task
    network, data, length = network_of(task, seeds, state), task.sample(seeds, tuning), task.budget(plan.start)
    layers = stacked.quantizable(network, task.quantized)
    quantized = [layer.weight for layer in layers]
    for layer in layers:
        layer.weight.is_free_end = layer is stacked.free_end(network)  # for the methods
    chosen = set(quantized)
    rest = [parameter for parameter in network.parameters() if parameter not in chosen]
    steps = data.steps(length, task.batch)
    settings = {"total_steps": steps, "pretrained": plan.start != "scratch", "granularity": task.granularity}
    torch.manual_seed(seeds[0])  # what methods draw
    run = plan.method.begin(quantized, rest, setting.base, plan.width, setting.knob, **settings)
    for layer in layers:
        layer.run = run
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        run.optimizer, functools.partial(schedule, steps=steps, warmup=task.warmup)
    )
    network.train()
    for x, y in data.batches(seeds, length, task.batch):
        run.optimizer.zero_grad()
        logits = network(x)
        losses = (
            functional.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none").view(len(seeds), -1).mean(1)
        )
        losses.sum().backward()
        run.optimizer.step()
        scheduler.step()
        run.stepped()
    run.finish()
    network.eval()
    return Trained(data.judge(network), {name: value.detach().clone() for name, value in network.state_dict().items()})


def schedule(step: int, *, steps: int, warmup: float) -> float:
    """Factor of the learning rate: a cosine to zero, over whose first share ``warmup`` it rises from zero."""
    rise = min(1.0, (step + 1) / (warmup * steps + 1))
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def merit(task: Task, scores: Sequence[float]) -> float:
    """The higher the better; networks that blew up count as nothing at all."""
    mean = statistics.fmean(scores)
    return task.sign * mean if math.isfinite(mean) else -math.inf


def best_setting(task: Task, tried: Sequence[tuple[Setting, list[float]]]) -> Setting:
    """That of the best mean score; the first of equals."""
    return max(tried, key=lambda each: merit(task, each[1]))[0]
