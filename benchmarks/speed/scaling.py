"""How does the cost depend on size and cores?    python -m benchmarks.speed.scaling [--full] [--save [FOLDER]]

The step of one float32 tensor from 1,024 weights to the largest that fits (--full; else 64 Mi), 4 bit and capture
against torch's fused SGD; caches warm, and cold where a cache could hold the tensors; with 1, 2, 4, .. threads up to
all cores.
"""

from collections.abc import Iterator

import psutil
import torch

from benchmarks import machine
from benchmarks.speed import harness, script, workloads
from benchmarks.speed.harness import COPY
from benchmarks.speed.section import Section
from benchmarks.speed.workloads import Tensors

BYTES = 4 * 8  # weight, gradient, momentum; two and a half each for the copy and its target
ROOM = 0.5  # share of the free memory that may be taken


def exponents(effort: script.Effort) -> range:
    """Sizes as powers of two, each four times the one before."""
    free = torch.cuda.mem_get_info()[0] if effort.device.type == "cuda" else psutil.virtual_memory().available
    largest = max(10, int(ROOM * free / BYTES).bit_length() - 1)
    return range(10, (largest if effort.full else min(largest, 26)) + 1, 2)


def doubling_threads(effort: script.Effort) -> list[int]:
    """1, 2, 4, .. and all."""
    every = machine.cores()
    return (
        [1]
        if effort.device.type == "cuda"
        else sorted({2**k for k in range(every.bit_length()) if 2**k <= every} | {every})
    )


def measure(effort: script.Effort) -> Iterator[Section]:
    device = effort.device
    for threads in doubling_threads(effort):
        harness.pin(threads)
        cold = harness.clock_of(device) if device.type == "cuda" else harness.cold()
        for size in (2**k for k in exponents(effort)):
            tensors = Tensors("sgd", size, torch.float32, device)
            variants = {COPY: tensors.copy(), "torch fused": tensors.torch_fused()}
            names, absent = workloads.backends(device, torch.float32)
            for name in names:
                variants[f"askew {name} 4 bit, capture"] = tensors.ours(name)
            fits = (
                size * BYTES < 4 * machine.last_level_cache() and device.type == "cpu"
            )  # a GPU's clock clears its cache anyway
            calls = max(1, min(200, 2**20 // size))
            for caches, clock in {"warm": harness.clock_of(device), "cold": cold}.items():
                if caches == "cold" and not fits:
                    continue
                about = {"weights": size, "threads": threads, "caches": caches if fits else "too small"}
                rounds = effort.pick(7, 31) if size < 2**28 else 7
                timings = harness.compare(
                    variants, baseline="torch fused", rounds=rounds, calls=calls if caches == "warm" else 1, clock=clock
                )
                yield Section("Cost against size", about, "torch fused", timings, absent)


if __name__ == "__main__":
    script.main("scaling", measure, __doc__)
