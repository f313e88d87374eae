"""The roofline: what a step should take, from its bytes and from its instructions, against what it took.

A step of one thread needs at least the time that its bytes take at the memory's rate, and at least the time that its
instructions take when nothing has to be waited for. The rate is the better one of a copy and of a negation in place, in
the same round; the time of the instructions is measured on weights that lie in a core's own cache. The prediction is
the larger of the two.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks import results
from benchmarks.markdown import markdown_table
from benchmarks.speed.harness import COPY, PASS
from benchmarks.speed.timing_tables import (
    NOT_YET,
    only_section,
    plural,
    provenance,
    sections_of,
    thread_counts,
    three_digits,
)

FUSED_BYTES = {"sgd": 20, "adamw": 28}  # float32: weight, gradient and state; what is beyond are outputs and scales
GAP = 0.10  # what has to be explained
UNEXPLAINED = "not explained yet"


class Point(NamedTuple):
    """One variant; milliseconds, bytes and instructions per weight.

    ``vector``, ``instructions``: None where they were not counted.
    """

    name: str
    rule: str
    threads: int
    bytes: float
    outputs: float
    instructions: float | None
    vector: float | None
    by_bytes: float
    by_instructions: float
    measured: float

    @property
    def predicted(self) -> float:
        return max(self.by_bytes, self.by_instructions)

    @property
    def gap(self) -> float:
        return self.measured / self.predicted - 1


def points(device: str = "cpu") -> Iterator[Point]:
    """Every float32 variant that was timed in a cache as well, one thread first."""
    data, counted = results.load(f"step-{device}"), results.load(f"instructions-{device}")
    for threads in thread_counts(data):
        for rule, base in FUSED_BYTES.items():
            section = only_section(data, f"One tensor, {rule}", dtype="float32", threads=threads)
            cached = sections_of(data, f"In a core's cache, {rule}")  # a CPU's only
            warm = {timing["name"]: timing["seconds"][0] for each in cached for timing in each["timings"]}
            share = section["about"]["weights"] / cached[0]["about"]["weights"] / threads if cached else 0
            timings = {timing["name"]: timing for timing in section["timings"]}
            rate = max(timings[name]["bytes"] / timings[name]["seconds"][0] for name in (COPY, PASS))
            for name, timing in timings.items():
                if name in (COPY, PASS) or (cached and name not in warm):
                    continue
                kinds = counted["rules"][rule].get(name) if counted else None
                bytes_per_weight = timing["bytes"] / section["about"]["weights"]
                yield Point(
                    name=name,
                    rule=rule,
                    threads=threads,
                    bytes=bytes_per_weight,
                    outputs=max(0.0, round(bytes_per_weight - base)),
                    instructions=kinds and sum(kinds.values()),
                    vector=kinds and kinds["vector"],
                    by_bytes=timing["bytes"] / rate * 1e3,
                    by_instructions=warm.get(name, 0.0) * share * 1e3,
                    measured=timing["seconds"][0] * 1e3,
                )


def why(point: Point) -> str:
    """What explains a gap, from what is known of the variant; UNEXPLAINED where nothing here does."""
    low, high = sorted((point.by_bytes, point.by_instructions))
    if point.instructions is None and low <= 0.4 * high and point.gap > 0:
        return "a peer's step, whose instructions are not counted: what it waits for is not known here"
    if point.gap < 0 and point.by_bytes >= point.by_instructions:
        return "neither the copy nor the negation reaches the rate that the memory gives to more streams"
    if point.gap < 0:
        return "its instructions took longer in the cache than the whole step did here: the prediction is too high"
    causes = []
    if point.outputs:
        unasked = point.measured / max(point.by_instructions, point.by_bytes * (1 + point.outputs / point.bytes)) - 1
        causes.append(
            "outputs are written only, and the processor reads their lines first; with these reads the gap is "
            f"{unasked:+.0%}"
        )
    if low > 0.4 * high:
        shown = (point.measured - high) / low
        causes.append(
            f"the bounds are near each other, and {shown:.0%} of the smaller one's time is not hidden behind the larger"
        )
    return "; ".join(causes) or UNEXPLAINED


def roofline_table(device: str = "cpu") -> str:
    """The table of one thread and of all, with a column for the gap."""
    data = results.load(f"step-{device}")
    if data is None:
        return NOT_YET
    header = [
        "",
        "bytes",
        "instructions",
        "of them vector",
        "by bytes, ms",
        "by instructions, ms",
        "predicted, ms",
        "measured, ms",
        "gap",
    ]
    found = list(points(device))
    blocks = []
    for threads in thread_counts(data):
        rows = []
        for point in (point for point in found if point.threads == threads):
            counts = ["-" if each is None else f"{each:.2f}" for each in (point.instructions, point.vector)]
            times = map(three_digits, (point.by_bytes, point.by_instructions, point.predicted, point.measured))
            rows.append([f"{point.rule}: {point.name}", f"{point.bytes:.2f}", *counts, *times, f"{point.gap:+.0%}"])
        blocks.append(markdown_table([plural(threads), *header[1:]], rows))
    return "\n\n".join(blocks) + "\n\n" + provenance(data)


def explanations(device: str = "cpu") -> str:
    """A line for every gap above 10 %."""
    if results.load(f"step-{device}") is None:
        return NOT_YET
    lines = [
        f"- {p.rule}: {p.name}, {plural(p.threads)}, {p.gap:+.0%}: {why(p)}."
        for p in points(device)
        if abs(p.gap) > GAP
    ]
    return "\n".join(lines) or "No gap is above 10 %."


def bottlenecks_table(device: str = "cpu") -> str:
    """Where our step is surely more than 5 % above torch's fused one, or below 85 % of the copy's rate."""
    data = results.load(f"step-{device}")
    if data is None:
        return NOT_YET
    lines = []
    for section in data["sections"]:
        for timing in section["timings"]:
            slow, wasteful = timing["interval"][0] > 1.05, timing["share"] is not None and timing["share"] < 0.85
            if re.match("askew", timing["name"]) and section["title"].startswith("One tensor") and (slow or wasteful):
                about: dict[str, Any] = section["about"]
                where = f"{about['rule']}, {about['dtype']}, {plural(about['threads'])}"
                lines.append(
                    [
                        timing["name"],
                        where,
                        f"{timing['ratio'][0]:.2f} x {section['baseline']}",
                        f"{timing['share']:.0%}",
                    ]
                )
    return markdown_table(["", "where", "time", "of the copy rate"], lines) if lines else "Nowhere."
