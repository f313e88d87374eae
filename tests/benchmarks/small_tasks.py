"""A task that takes a second, and how near networks have to be that were trained together and alone."""

import dataclasses

from benchmarks.accuracy import tasks

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # sums of up to 256 float32 products in another order


def small(task: str = "digits-16", **changes: object) -> tasks.Task:
    """A task cut to an epoch, and to two tuning seeds."""
    return dataclasses.replace(
        tasks.TASKS[task], length=1, tuning_seeds=2, bases=tasks.rates("sgd", 0.001, 0.1), **changes
    )
