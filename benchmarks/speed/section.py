"""What one comparison of a benchmark found, and how the terminal shows it."""

import dataclasses
from typing import Any

from benchmarks.speed.harness import Timing

# Titles of sections of the tensors benchmark, by which its tables find them.
HOST_TIME = "Host time of optimizer.step()"
HOST_TIME_TINY = "Host time of optimizer.step(), tiny tensors"
DEVICE_TIME = "Device time of optimizer.step()"
REPLAYED = "A replayed graph"
SETUP = "Beside the step"  # of the setup benchmark, as the next
SETUP_MEMORY = "Bytes per weight beside the step"
SAVING, LOADING = "Writing a file", "Reading a file"  # of the files benchmark


@dataclasses.dataclass(frozen=True)
class Section:
    """Variants that were timed against each other.

    ``about``: threads, weights, caches, .., whatever tells this section from others.
    ``absent``: peers that could not take part, each with the reason.
    """

    title: str
    about: dict[str, Any]
    baseline: str
    timings: list[Timing]
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    launches: dict[str, int] = dataclasses.field(default_factory=dict)
    memory: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # bytes per weight


def as_text(section: Section) -> str:
    """A section as a table for the terminal."""
    width = max(map(len, (*(timing.name for timing in section.timings), *section.memory, *section.absent)))
    about = ", ".join(
        f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in section.about.items()
    )
    lines = [f"{section.title} ({about})"]
    if section.timings:
        lines.append(f"{'':{width}}  {'ms':>10} {'quartiles':>21}  {'ratio':>8} {'95 % interval':>17}  of the copy")
    for timing in section.timings:
        (middle, low, high), ratio, (low_ratio, high_ratio) = timing.seconds, timing.ratio[0], timing.interval
        seconds = f"{middle * 1e3:10.4f} {low * 1e3:10.4f}-{high * 1e3:10.4f}"
        share = "" if timing.share is None else f"{timing.share:10.1%}"
        count = f"  {section.launches[timing.name]} launches" if timing.name in section.launches else ""
        lines.append(
            f"{timing.name:{width}}  {seconds}  {ratio:8.3f} {low_ratio:8.3f}-{high_ratio:8.3f}  {share}{count}"
        )
    for name, row in section.memory.items():
        lines.append(f"{name:{width}}  " + ", ".join(f"{key} {value:.2f}" for key, value in row.items()))
    return "\n".join([*lines, *(f"{name:{width}}  absent: {reason}" for name, reason in section.absent.items())])
