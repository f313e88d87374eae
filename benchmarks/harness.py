"""Times variants against each other inside one process, and writes down where and with what.

Variants take turns, each round in another order, so that a drifting clock or a busy neighbour meets all of them alike. What is
reported are medians with quartiles, and ratios of paired times: a variant over the baseline of the same round.
"""

import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from askew_cuda import ops

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """One variant: seconds per call (median, quartiles) and its ratio to the baseline in the same round (median, quartiles)."""

    name: str
    seconds: tuple[float, float, float]
    ratio: tuple[float, float, float]
    rounds: int


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def host_seconds(run: Callable[[], None], calls: int) -> float:
    """Seconds of ``calls`` calls, by the host's clock."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start


def device_clock() -> Callable[[Callable[[], None], int], float]:
    """As host_seconds, by events on the current GPU's stream. The L2 cache is overwritten before, and no call waits for the host."""
    junk = torch.empty(4 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda")

    def seconds(run: Callable[[], None], calls: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        junk.zero_()
        torch.cuda._sleep(1_000_000)  # half a millisecond, in which the host puts the calls into the queue
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return seconds


def compare(
    variants: dict[str, Callable[[], None]],
    *,
    baseline: str,
    rounds: int,
    calls: int = 1,
    seed: int = 0,
    clock: Callable[[Callable[[], None], int], float] = host_seconds,
) -> list[Timing]:
    """Times every variant ``rounds`` times, after one untimed round; ``calls`` calls are one measurement of a short variant."""
    order = list(variants)
    shuffle = random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        shuffle(order)
        for name in order:
            seconds = clock(variants[name], calls)
            if turn > 0:
                times[name].append(seconds / calls)
    paired = {name: [mine / theirs for mine, theirs in zip(times[name], times[baseline], strict=True)] for name in variants}
    return [Timing(name, quartiles(times[name]), quartiles(paired[name]), rounds) for name in variants]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, check=False).stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split("\t: ", 1) for line in (line.replace("\t\t: ", "\t: ") for line in lines) if "\t: " in line)
    return f"{fields.get('model name', platform.machine())} (family {fields.get('cpu family')}, model {fields.get('model')})"


def gpu() -> dict[str, object] | None:
    """The current GPU, its driver and clocks; None where there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties()
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    except (OSError, subprocess.CalledProcessError):
        answer = []
    known = dict(zip(query.split(","), answer, strict=False))
    return {"name": properties.name, "bytes": properties.total_memory, "l2_bytes": properties.L2_cache_size, **known}


def environment() -> dict[str, object]:
    """Commit, hardware and versions that the figures belong to."""
    changed = [line for line in _git("status", "--porcelain", "--untracked-files=no").splitlines() if "benchmarks/results" not in line]
    return {
        "commit": _git("rev-parse", "HEAD") + (" with uncommitted changes" if changed else ""),
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": torch.get_num_threads(),
        "cpu_kernel": ops.extension.cpu_capabilities()[0] if ops.extension is not None else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "build": ops.build_info(),
        "gpu": gpu(),
    }


def save(name: str, sections: dict[str, object]) -> Path:
    """Writes the sections and the environment to benchmarks/results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **sections}, indent=1) + "\n")
    return path


def table(title: str, timings: list[Timing]) -> str:
    """A table of medians and quartiles."""
    width = max(len(timing.name) for timing in timings)
    lines = [title, f"{'':{width}}  {'ms':>9} {'quartiles':>19}  {'ratio':>7} {'quartiles':>15}"]
    for timing in timings:
        (middle, low, high), (ratio, ratio_low, ratio_high) = timing.seconds, timing.ratio
        seconds = f"{middle * 1e3:9.3f} {low * 1e3:9.3f}-{high * 1e3:9.3f}"
        lines.append(f"{timing.name:{width}}  {seconds}  {ratio:7.3f} {ratio_low:7.3f}-{ratio_high:7.3f}")
    return "\n".join(lines)
