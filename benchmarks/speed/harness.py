"""Times variants against each other inside one process.

Variants take turns, each round in another order, so that a drifting clock or a busy neighbour meets all of them alike.
What is reported are medians with quartiles, ratios of paired times (a variant over the baseline of the same round) with
a bootstrap interval of their median, and, where a variant says how many bytes it moves, its rate as a share of that of
a copy in the same round.
"""

import ctypes
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.machine import last_level_cache

COPY = "copy of one tensor"  # the variant that tells the rate of the memory
PASS = (
    "one tensor negated in place"  # the same without the read of the target, which a processor adds to a copy unasked
)
Clock = Callable[[Callable[[], object], int], float]


@dataclass(frozen=True)
class Variant:
    """What is called, and how many bytes a call reads and writes, by count; None where nobody has counted.

    ``keeps``: what has to live as long as the variant, where ``run`` itself does not hold it.
    """

    run: Callable[[], object]
    bytes: float | None = None
    keeps: object = None


@dataclass(frozen=True)
class Timing:
    """What was found of one variant.

    ``seconds`` per call, ``ratio`` to the baseline of the same round: median, lower and upper quartile.
    """

    name: str
    seconds: tuple[float, float, float]
    ratio: tuple[float, float, float]
    interval: tuple[float, float]  # 95 % bootstrap interval of the median ratio
    rounds: int
    bytes: float | None
    share: float | None  # of the copy's rate, median over the rounds


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile)."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float(middle), float(low), float(high)


def bootstrap_interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the median (percentile method); the value itself where all are equal."""
    if min(values) == max(values):
        return values[0], values[0]
    found = stats.bootstrap(
        (values,), np.median, n_resamples=2000, method="percentile", rng=np.random.default_rng(seed)
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


ALLOWED = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def pin(threads: int) -> bool:
    """Sets torch's threads, and the cores they may use to as many, where the system can; returns whether it could.

    The cores are set first: torch's threads come to be with the first work that needs them, and inherit what their
    maker may use.
    """
    chosen = sorted(ALLOWED)[-threads:]  # the first core serves most interrupts
    if chosen:
        running = (
            [int(thread.name) for thread in Path("/proc/self/task").iterdir()]
            if Path("/proc/self/task").exists()
            else [0]
        )
        for thread in running:
            os.sched_setaffinity(thread, chosen)
    torch.set_num_threads(threads)
    return bool(chosen)


def host_seconds(run: Callable[[], object], calls: int) -> float:
    """Seconds of ``calls`` calls, by the host's clock. On a GPU: until they are in its queue, which is empty before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start


def wall_seconds(run: Callable[[], object], calls: int) -> float:
    """As host_seconds, but to the end of the GPU's work."""
    if not torch.cuda.is_available():
        return host_seconds(run, calls)

    def waited() -> None:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()

    return host_seconds(waited, 1)


def cold(clock: Clock = host_seconds) -> Clock:
    """A CPU's clock that reads a buffer of four times the last-level cache before each call.

    Nothing of the call's own data is left there.
    """
    junk = torch.ones(4 * last_level_cache() // 8, dtype=torch.int64)

    def seconds(run: Callable[[], object], calls: int) -> float:
        total = 0.0
        for _ in range(calls):
            junk.sum()
            total += clock(run, 1)
        return total

    return seconds


def device_clock() -> Clock:
    """As host_seconds, by events on the current GPU's stream.

    A buffer of four times the L2 cache is read before, so that it holds nothing of the call's and nothing that has yet
    to be written back, and no call waits for the host.
    """
    junk = torch.ones(torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int32, device="cuda")

    def seconds(run: Callable[[], object], calls: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        junk.sum()
        torch.cuda._sleep(1_000_000)  # half a millisecond, in which the host puts the calls into the queue
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return seconds


def clock_of(device: torch.device) -> Clock:
    """How long the work takes: by events on a GPU, by the host's clock on a CPU."""
    return device_clock() if device.type == "cuda" else host_seconds


def compare(
    variants: dict[str, Variant],
    *,
    baseline: str,
    rounds: int,
    calls: int = 1,
    seed: int = 0,
    clock: Clock = host_seconds,
) -> list[Timing]:
    """Times every variant ``rounds`` times, after one untimed round.

    ``calls`` calls are one measurement, for variants that are short.
    """
    order = list(variants)
    shuffle = random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        shuffle(order)
        for name in order:
            seconds = clock(variants[name].run, calls)
            if turn > 0:
                times[name].append(seconds / calls)
    found = []
    for name, variant in variants.items():
        ratios = [mine / theirs for mine, theirs in zip(times[name], times[baseline], strict=True)]
        share = None
        if variant.bytes is not None and COPY in variants:
            rates = [
                variant.bytes * copied / (variants[COPY].bytes * mine)
                for mine, copied in zip(times[name], times[COPY], strict=True)
            ]
            share = quartiles(rates)[0]
        found.append(
            Timing(
                name,
                quartiles(times[name]),
                quartiles(ratios),
                bootstrap_interval(ratios),
                rounds,
                variant.bytes,
                share,
            )
        )
    return found


class _Operators(TorchDispatchMode):
    """Counts the operators that torch dispatches."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace != "profiler"
        return func(*args, **(kwargs or {}))


def launches(run: Callable[[], object], device: torch.device) -> int:
    """Kernels and copies that one call puts into a GPU's queue; on a CPU, operators that torch dispatches."""
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    with _Operators() as operators:
        run()
    return operators.count


def held_memory(device: torch.device) -> int:
    """Bytes that the process holds: on a GPU those of torch's tensors, else what the system counts as resident."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else psutil.Process().memory_info().rss


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that held_memory() would have said during the call.

    On a CPU Linux has to tell: it keeps a peak that can be reset.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # proc(5)
    run()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def return_memory_at_once() -> None:
    """Has the C library hand freed blocks back to the system, so that held_memory() says what is in use.

    That is glibc; with another library nothing happens.
    """
    threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(threshold, 2**16)
