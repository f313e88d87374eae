"""What a measurement leaves behind: <name>-<device>.json, with where and with what it was made. The committed ones are RESULTS."""

import dataclasses
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from askew_cuda import ops
from benchmarks import harness
from benchmarks.harness import Timing

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Section:
    """Variants that were timed against each other. ``about``: threads, weights, caches, .., whatever tells this section from others.

    ``absent``: peers that could not take part, each with the reason.
    """

    title: str
    about: dict[str, Any]
    baseline: str
    timings: list[Timing]
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    launches: dict[str, int] = dataclasses.field(default_factory=dict)
    memory: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # bytes per weight


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
    """Commit, hardware, clocks and versions that the figures belong to."""
    changed = [line for line in _git("status", "--porcelain", "--untracked-files=no").splitlines() if "benchmarks/results" not in line]
    frequency = psutil.cpu_freq()
    return {
        "commit": _git("rev-parse", "HEAD") + (" with uncommitted changes" if changed else ""),
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": harness.cores(),
        "clock_mhz": frequency and round(frequency.current),
        "last_level_cache_bytes": harness.last_level_cache(),
        "load": psutil.getloadavg()[0],
        "cpu_kernel": ops.extension.cpu_capabilities()[0] if ops.extension is not None else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "build": ops.build_info(),
        "gpu": gpu(),
    }


def save(name: str, data: dict[str, object], folder: Path = RESULTS) -> Path:
    """Writes the data and the environment to <folder>/<name>.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **data}, indent=1, default=dataclasses.asdict) + "\n")
    return path


def load(name: str) -> dict[str, Any] | None:
    """What save() wrote; None where it was never measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def text(section: Section) -> str:
    """A section as a table for the terminal."""
    width = max(map(len, (*(timing.name for timing in section.timings), *section.memory, *section.absent)))
    about = ", ".join(f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in section.about.items())
    lines = [f"{section.title} ({about})"]
    if section.timings:
        lines.append(f"{'':{width}}  {'ms':>10} {'quartiles':>21}  {'ratio':>8} {'95 % interval':>17}  of the copy")
    for timing in section.timings:
        (middle, low, high), ratio = timing.seconds, timing.ratio[0]
        seconds = f"{middle * 1e3:10.4f} {low * 1e3:10.4f}-{high * 1e3:10.4f}"
        share = "" if timing.share is None else f"{timing.share:10.1%}"
        count = f"  {section.launches[timing.name]} launches" if timing.name in section.launches else ""
        lines.append(f"{timing.name:{width}}  {seconds}  {ratio:8.3f} {timing.interval[0]:8.3f}-{timing.interval[1]:8.3f}  {share}{count}")
    for name, row in section.memory.items():
        lines.append(f"{name:{width}}  " + ", ".join(f"{key} {value:.2f}" for key, value in row.items()))
    return "\n".join([*lines, *(f"{name:{width}}  absent: {reason}" for name, reason in section.absent.items())])
