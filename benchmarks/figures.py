"""Every table of README and docs, from the committed results: name of a figure -> a function that gives its Markdown."""

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks import results
from benchmarks.harness import COPY

NOT_YET = "Not yet run on a GPU."
Row = dict[str, Any]


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def provenance(data: Row) -> str:
    """Where and with what the figures were made."""
    where = data["environment"]
    hardware = where["gpu"]["name"] if data.get("device") == "cuda" else f"{where['processor']}, {where['cores']} cores"
    kernel = f", {where['cpu_kernel']}" if where["cpu_kernel"] else ""
    changed = " with changes" if "changes" in where["commit"] else ""
    mode = f", {data['mode']} mode" if "mode" in data else ""
    return f"{hardware}{kernel}, torch {where['torch']}, commit {where['commit'][:7]}{changed}, {where['date']}{mode}."


def number(value: float) -> str:
    """Three digits that mean something: 0.0123, 1.23, 12.3, 123."""
    decimals = 4 if value < 0.1 else 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{decimals}f}"


def ratio(timing: Row) -> str:
    """Median of the paired ratios with its interval."""
    low, high = timing["interval"]
    middle = timing["ratio"][0]
    return "1" if low == high == 1 else f"{number(middle)} ({number(low)} - {number(high)})"


def milliseconds(timing: Row) -> str:
    return number(timing["seconds"][0] * 1e3)


def sections(data: Row, title: str, **about: Any) -> list[Row]:
    """Those of the title whose ``about`` says so."""
    return [s for s in data["sections"] if s["title"] == title and all(s["about"].get(key) == value for key, value in about.items())]


def one(data: Row, title: str, **about: Any) -> Row:
    """The only such section."""
    (found,) = sections(data, title, **about)
    return found


def thread_counts(data: Row) -> list[int]:
    return sorted({section["about"]["threads"] for section in data["sections"]})


def plural(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def absent(section: Row) -> str:
    """A line for each peer that could not take part."""
    lines = [f"- Absent: {name}: {reason.rstrip('.')}." for name, reason in section["absent"].items()]
    return "\n".join(["\n", *lines]) if lines else ""


def step(device: str = "cpu") -> str:
    """One float32 tensor, SGD: every variant."""
    data = results.load(f"step-{device}")
    if data is None:
        return NOT_YET
    columns = [one(data, "One tensor, sgd", dtype="float32", threads=threads) for threads in thread_counts(data)]
    weights = columns[0]["about"]["weights"]
    header = [f"{weights // 2**20} Mi float32 weights, momentum", "bytes per weight"]
    for section in columns:
        header += [f"{plural(section['about']['threads'])}: ms", "ratio to torch's", "of the copy rate"]
    rows = []
    for same in zip(*(section["timings"] for section in columns), strict=True):
        cells = [same[0]["name"], number(same[0]["bytes"] / weights).rstrip("0").rstrip(".")]
        for timing in same:
            cells += [milliseconds(timing), ratio(timing), f"{timing['share']:.0%}"]
        rows.append(cells)
    return table(header, rows) + "\n\n" + provenance(data) + absent(columns[0])


def dtypes(device: str = "cpu") -> str:
    """Both rules in every dtype: ratio to torch's optimizer of the same."""
    data = results.load(f"step-{device}")
    if data is None:
        return NOT_YET
    threads = thread_counts(data)
    rows, why = [], ""
    for rule in ("sgd", "adamw"):
        for dtype in ("float32", "float64", "bfloat16", "float16"):
            found = [one(data, f"One tensor, {rule}", dtype=dtype, threads=each) for each in threads]
            for same in zip(*(section["timings"] for section in found), strict=True):
                name = same[0]["name"]
                if name.endswith((" unquantized", " 4 bit, capture", " 4 bit, interval")) or name == COPY:
                    rows.append([rule, dtype, name, found[0]["baseline"], *(ratio(timing) for timing in same)])
            why = why or absent(found[0])
    return table(["rule", "dtype", "", "ratio to", *map(plural, threads)], rows) + "\n\n" + provenance(data) + why


def today(device: str = "cpu") -> str:
    """Whole optimizers on equal work, with their memory."""
    data, memory = results.load(f"step-{device}"), results.load(f"memory-{device}")
    if data is None or memory is None:
        return NOT_YET
    title = "Optimizers on one matrix"
    columns = [one(data, title, threads=threads) for threads in thread_counts(data)]
    held = memory["sections"][0]["memory"]
    weights = columns[0]["about"]["weights"]
    header = [f"{weights / 2**20:g} Mi weights in one matrix, `optimizer.step()`"]
    for section in columns:
        header += [f"{plural(section['about']['threads'])}: ms", "ratio to AskewSGD"]
    rows = []
    for same in zip(*(section["timings"] for section in columns), strict=True):
        name = same[0]["name"]
        kept = [number(max(0.0, held[name][key])) if name in held else "-" for key in ("between steps", "peak")]
        launches = columns[0]["launches"].get(name, "-")
        rows.append([name, *(cell for timing in same for cell in (milliseconds(timing), ratio(timing))), str(launches), *kept])
    header += ["operators" if device == "cpu" else "kernels", "bytes kept", "bytes at the peak"]
    return table(header, rows) + "\n\n" + provenance(data) + absent(columns[0])


def tensors(device: str = "cpu", title: str = "Host time of optimizer.step()") -> str:
    """Optimizers in rows, numbers of tensors in columns: milliseconds and ratio."""
    data = results.load(f"tensors-{device}")
    if data is None:
        return NOT_YET
    blocks = []
    for threads in thread_counts(data):
        found = sections(data, title, threads=threads)
        names = [timing["name"] for timing in found[0]["timings"]]
        rows = []
        for name in names:
            timings = [next((timing for timing in section["timings"] if timing["name"] == name), None) for section in found]
            launches = str(found[-1]["launches"].get(name, "-"))
            rows.append([name, *("-" if t is None else f"{milliseconds(t)}: {ratio(t)}" for t in timings), launches])
        counts = [f"{section['about']['tensors']:,}" for section in found]
        blocks.append(table([f"tensors, {plural(threads)}", *counts, f"launches, {counts[-1]}"], rows))
    return "\n\n".join(blocks) + "\n\n" + provenance(data) + absent(found[-1])


def train(device: str = "cpu") -> str:
    """Networks and rules in rows, ways of training in columns."""
    data = results.load(f"train-{device}")
    if data is None:
        return NOT_YET
    rows = []
    for section in data["sections"]:
        about, timings = section["about"], section["timings"]
        cells = [f"{about['network']}, {about['weights'] / 1e6:.1f} M weights", about["rule"], milliseconds(timings[0])]
        for start in ("Askew", "STE", "torchao"):
            cells.append(next((f"{milliseconds(each)}: {ratio(each)}" for each in timings if each["name"].startswith(start)), "-"))
        rows.append(cells)
    header = ["training step", "rule", "torch, fused: ms", "askew_cuda 4 bit: ms, ratio", "STE: ms, ratio", "PARQ: ms, ratio"]
    return table(header, rows) + "\n\n" + plural(data["sections"][0]["about"]["threads"]) + ", " + provenance(data)


def gpu() -> str:
    """All that a GPU has to show."""
    if results.load("step-cuda") is None:
        return NOT_YET
    titles = ("Host time of optimizer.step()", "Device time of optimizer.step()", "A replayed graph")
    return "\n\n".join([step("cuda"), dtypes("cuda"), today("cuda"), *(f"{t}\n\n{tensors('cuda', t)}" for t in titles), train("cuda")])


FIGURES: dict[str, Callable[[], str]] = {
    "step": step, "dtypes": dtypes, "today": today, "tensors": tensors, "train": train, "gpu": gpu,
}  # fmt: skip
