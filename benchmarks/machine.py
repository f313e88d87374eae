"""The machine and the versions that a measurement belongs to."""

import functools
import os
import platform
import subprocess
import time
from pathlib import Path

import psutil
import torch

from askew_cuda import backends


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def last_level_cache() -> int:
    """Bytes of the largest cache of a core; 64 MiB where the system doesn't tell."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(size[:-1]) * unit[size[-1]] for size in sizes if size[-1:] in unit), default=2**26)


def _git(*arguments: str) -> str:
    """What git says; nothing where there is none, or no repository."""
    command = ["git", *arguments]
    try:
        said = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return said.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(
        line.split("\t: ", 1) for line in (line.replace("\t\t: ", "\t: ") for line in lines) if "\t: " in line
    )
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family')}, model {fields.get('model')})"


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


def _commit() -> str:
    """Of the checkout; where it is a copy without its history, as ASKEW_COMMIT says."""
    changed = [
        line
        for line in _git("status", "--porcelain", "--untracked-files=no").splitlines()
        if "benchmarks/results" not in line
    ]
    commit = _git("rev-parse", "HEAD") or os.environ.get("ASKEW_COMMIT") or "unknown"
    return commit + (" with uncommitted changes" if changed else "")


@functools.cache
def environment() -> dict[str, object]:
    """Commit, hardware, clocks and versions that the figures belong to; as they were when it was asked for first."""
    frequency = psutil.cpu_freq()
    return {
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": cores(),
        "clock_mhz": frequency and round(frequency.current),
        "last_level_cache_bytes": last_level_cache(),
        "load": psutil.getloadavg()[0],
        "cpu_kernel": backends.extension.cpu_capabilities()[0] if backends.extension is not None else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "build": backends.build_info(),
        "gpu": gpu(),
    }
