"""How much memory does a step need?    python -m benchmarks.speed.memory [--full] [--save [FOLDER]]

Bytes per weight beyond the weights and their gradients: what an optimizer keeps between steps, and the most that a step
holds. As the system counts the process (a GPU: torch's allocator), one optimizer after another.
"""

import functools
import gc
from collections.abc import Iterator

import torch

from benchmarks.speed import harness, script, workloads
from benchmarks.speed.section import Section


def bytes_per_weight(make: workloads.Maker, size: int, device: torch.device) -> tuple[float, float]:
    """(between steps, at the peak of a step)."""
    warm = make(
        [workloads.parameter(2**12, device, columns=64)]
    )  # code and tables that come with a first step are not counted
    warm()
    warm()
    parameters = [workloads.parameter(size, device, columns=1024)]
    gc.collect()
    before = harness.held_memory(device)
    step = make(parameters)
    step()
    step()
    gc.collect()
    kept = harness.held_memory(device) - before
    return kept / size, (harness.peak_memory(step, device) - before) / size


def measure(effort: script.Effort) -> Iterator[Section]:
    harness.pin(1)
    harness.return_memory_at_once()
    size = effort.pick(2**21, 2**24)
    rows, absent = {}, {}
    for name, make in workloads.optimizers().items():
        if name == workloads.COMPILED and not effort.full:
            absent[name] = script.TOO_LONG
            continue
        found, why = workloads.attempt(name, functools.partial(bytes_per_weight, make, size, effort.device))
        if found is None:
            absent[name] = why
        else:
            rows[name] = {"between steps": found[0], "peak": found[1]}
    yield Section("Bytes per weight", {"weights": size, "threads": 1}, "torch SGD(fused=True)", [], absent, memory=rows)


if __name__ == "__main__":
    script.main("memory", measure, __doc__)
