"""The tables of speed in README and docs, from the committed results.

FIGURES: name of a figure -> a function that gives its Markdown.
"""

from collections.abc import Callable
from typing import Any

from benchmarks import results
from benchmarks.markdown import markdown_table
from benchmarks.speed.harness import COPY
from benchmarks.speed.section import (
    DEVICE_TIME,
    HOST_TIME,
    HOST_TIME_TINY,
    LOADING,
    REPLAYED,
    SAVING,
    SETUP,
    SETUP_MEMORY,
)

NOT_YET = "Not yet run on a GPU."
Json = dict[str, Any]


def provenance(data: Json) -> str:
    """Where and with what the figures were made."""
    where = data["environment"]
    hardware = where["gpu"]["name"] if data.get("device") == "cuda" else f"{where['processor']}, {where['cores']} cores"
    kernel = f", {where['cpu_kernel']}" if where["cpu_kernel"] else ""
    changed = " with changes" if "changes" in where["commit"] else ""
    mode = f", {data['mode']} mode" if "mode" in data else ""
    return f"{hardware}{kernel}, torch {where['torch']}, commit {where['commit'][:7]}{changed}, {where['date']}{mode}."


def three_digits(value: float) -> str:
    """Three digits that mean something: 0.0123, 1.23, 12.3, 123."""
    decimals = 4 if value < 0.1 else 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{decimals}f}"


def ratio(timing: Json) -> str:
    """Median of the paired ratios with its interval."""
    low, high = timing["interval"]
    middle = timing["ratio"][0]
    return "1" if low == high == 1 else f"{three_digits(middle)} ({three_digits(low)} - {three_digits(high)})"


def milliseconds(timing: Json) -> str:
    return three_digits(timing["seconds"][0] * 1e3)


def sections_of(data: Json, title: str, **about: Any) -> list[Json]:
    """Those of the title whose ``about`` says so."""
    return [
        s
        for s in data["sections"]
        if s["title"] == title and all(s["about"].get(key) == value for key, value in about.items())
    ]


def only_section(data: Json, title: str, **about: Any) -> Json:
    """The only such section."""
    (found,) = sections_of(data, title, **about)
    return found


def thread_counts(data: Json) -> list[int]:
    return sorted({section["about"]["threads"] for section in data["sections"]})


def plural(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def absent_lines(section: Json) -> str:
    """A line for each peer that could not take part."""
    lines = [f"- Absent: {name}: {reason.rstrip('.')}." for name, reason in section["absent"].items()]
    return "\n".join(["\n", *lines]) if lines else ""


def one_tensor_table(device: str = "cpu") -> str:
    """One float32 tensor, SGD: every variant."""
    data = results.load(f"step-{device}")
    if data is None:
        return NOT_YET
    columns = [
        only_section(data, "One tensor, sgd", dtype="float32", threads=threads) for threads in thread_counts(data)
    ]
    weights = columns[0]["about"]["weights"]
    header = [f"{weights // 2**20} Mi float32 weights, momentum", "bytes per weight"]
    for section in columns:
        header += [f"{plural(section['about']['threads'])}: ms", "ratio to torch's", "of the copy rate"]
    rows = []
    for same in zip(*(section["timings"] for section in columns), strict=True):
        entries = [same[0]["name"], three_digits(same[0]["bytes"] / weights).rstrip("0").rstrip(".")]
        for timing in same:
            entries += [milliseconds(timing), ratio(timing), f"{timing['share']:.0%}"]
        rows.append(entries)
    return markdown_table(header, rows) + "\n\n" + provenance(data) + absent_lines(columns[0])


def dtypes_table(device: str = "cpu") -> str:
    """Both rules in every dtype: ratio to torch's optimizer of the same."""
    data = results.load(f"step-{device}")
    if data is None:
        return NOT_YET
    threads = thread_counts(data)
    rows, why = [], ""
    for rule in ("sgd", "adamw"):
        for dtype in ("float32", "float64", "bfloat16", "float16"):
            found = [only_section(data, f"One tensor, {rule}", dtype=dtype, threads=each) for each in threads]
            for same in zip(*(section["timings"] for section in found), strict=True):
                name = same[0]["name"]
                if name.endswith((" unquantized", " 4 bit, capture", " 4 bit, interval")) or name == COPY:
                    rows.append([rule, dtype, name, found[0]["baseline"], *(ratio(timing) for timing in same)])
            why = why or absent_lines(found[0])
    return (
        markdown_table(["rule", "dtype", "", "ratio to", *map(plural, threads)], rows) + "\n\n" + provenance(data) + why
    )


def optimizers_table(device: str = "cpu") -> str:
    """Whole optimizers on equal work, with their memory."""
    data, memory = results.load(f"step-{device}"), results.load(f"memory-{device}")
    if data is None or memory is None:
        return NOT_YET
    title = "Optimizers on one matrix"
    columns = [only_section(data, title, threads=threads) for threads in thread_counts(data)]
    held = memory["sections"][0]["memory"]
    weights = columns[0]["about"]["weights"]
    header = [f"{weights / 2**20:g} Mi weights in one matrix, `optimizer.step()`"]
    for section in columns:
        header += [f"{plural(section['about']['threads'])}: ms", "ratio to AskewSGD"]
    rows = []
    for same in zip(*(section["timings"] for section in columns), strict=True):
        name = same[0]["name"]
        kept = [three_digits(max(0.0, held[name][key])) if name in held else "-" for key in ("between steps", "peak")]
        launches = columns[0]["launches"].get(name, "-")
        rows.append(
            [name, *(cell for timing in same for cell in (milliseconds(timing), ratio(timing))), str(launches), *kept]
        )
    header += ["operators" if device == "cpu" else "kernels", "bytes kept", "bytes at the peak"]
    return markdown_table(header, rows) + "\n\n" + provenance(data) + absent_lines(columns[0])


def tensors_blocks(data: Json, title: str, what: str) -> list[str]:
    """A table for each number of threads: optimizers in rows, numbers of tensors in columns, milliseconds and ratio."""
    blocks = []
    for threads in thread_counts(data):
        columns = sections_of(data, title, threads=threads)
        counts = [f"{section['about']['tensors']:,}" for section in columns]
        by_name = [{timing["name"]: timing for timing in section["timings"]} for section in columns]
        rows = []
        for name in dict.fromkeys(name for timings in by_name for name in timings):
            timings = [each.get(name) for each in by_name]
            launches = str(columns[-1]["launches"].get(name, "-"))
            rows.append([name, *("-" if t is None else f"{milliseconds(t)}: {ratio(t)}" for t in timings), launches])
        if columns:
            header = [f"{what}, {plural(threads)}", *counts, f"launches, {counts[-1]}"]
            blocks.append(markdown_table(header, rows))
    return blocks


def tensors_table(device: str = "cpu", title: str = HOST_TIME) -> str:
    """What many tensors cost; after the host's time, where it was measured, that of tiny ones."""
    data = results.load(f"tensors-{device}")
    if data is None:
        return NOT_YET
    blocks = tensors_blocks(data, title, "tensors")
    if title == HOST_TIME:
        blocks += tensors_blocks(data, HOST_TIME_TINY, "tiny tensors")
    return "\n\n".join(blocks) + "\n\n" + provenance(data) + absent_lines(sections_of(data, title)[-1])


def training_table(device: str = "cpu") -> str:
    """Networks and rules in rows, ways of training in columns."""
    data = results.load(f"train-{device}")
    if data is None:
        return NOT_YET
    rows = []
    for section in data["sections"]:
        about, timings = section["about"], section["timings"]
        entries = [
            f"{about['network']}, {about['weights'] / 1e6:.1f} M weights",
            about["rule"],
            milliseconds(timings[0]),
        ]
        for start in ("Askew", "STE", "torchao"):
            entries.append(
                next(
                    (f"{milliseconds(each)}: {ratio(each)}" for each in timings if each["name"].startswith(start)), "-"
                )
            )
        rows.append(entries)
    header = [
        "training step",
        "rule",
        "torch, fused: ms",
        "askew_cuda 4 bit: ms, ratio",
        "STE: ms, ratio",
        "PARQ: ms, ratio",
    ]
    return (
        markdown_table(header, rows)
        + "\n\n"
        + plural(data["sections"][0]["about"]["threads"])
        + ", "
        + provenance(data)
    )


def setup_table(device: str = "cpu") -> str:
    """Beside the step: what is called in rows, sizes in columns, milliseconds and ratio; memory last."""
    data = results.load(f"setup-{device}")
    if data is None:
        return NOT_YET
    memory = only_section(data, SETUP_MEMORY)["memory"]
    blocks = []
    for threads in sorted({section["about"]["threads"] for section in sections_of(data, SETUP)}):
        columns = sections_of(data, SETUP, threads=threads)
        rows = []
        for same in zip(*(section["timings"] for section in columns), strict=True):
            held = three_digits(max(0.0, memory[same[0]["name"]]["peak"]))
            rows.append([same[0]["name"], *(f"{milliseconds(timing)}: {ratio(timing)}" for timing in same), held])
        counts = [f"{section['about']['weights'] / 2**20:.0f} Mi" for section in columns]
        blocks.append(markdown_table([f"weights, {plural(threads)}", *counts, "bytes per weight at the peak"], rows))
    return "\n\n".join(blocks) + "\n\n" + provenance(data)


def files_table(device: str = "cpu") -> str:
    """Codebooks in rows; milliseconds and ratio to safetensors with the floats, and the size of the file."""
    data = results.load(f"files-{device}")
    if data is None:
        return NOT_YET
    blocks = []
    for threads in sorted({section["about"]["threads"] for section in data["sections"]}):
        (saving,), (loading,) = (sections_of(data, title, threads=threads) for title in (SAVING, LOADING))
        rows = [
            [
                written["name"],
                f"{milliseconds(written)}: {ratio(written)}",
                f"{milliseconds(read)}: {ratio(read)}",
                three_digits(saving["memory"][written["name"]]["file"]),
            ]
            for written, read in zip(saving["timings"], loading["timings"], strict=True)
        ]
        count = f"{saving['about']['weights'] / 2**20:.0f} Mi weights, {plural(threads)}"
        blocks.append(markdown_table([count, "write", "read", "bytes per weight"], rows))
    return "\n\n".join(blocks) + "\n\n" + provenance(data)


def gpu_tables() -> str:
    """All that a GPU has to show."""
    if results.load("step-cuda") is None:
        return NOT_YET
    titles = (HOST_TIME, DEVICE_TIME, REPLAYED)
    tables = [one_tensor_table("cuda"), dtypes_table("cuda"), optimizers_table("cuda")]
    tables += [f"{title}\n\n{tensors_table('cuda', title)}" for title in titles]
    return "\n\n".join([*tables, training_table("cuda")])


FIGURES: dict[str, Callable[[], str]] = {
    "step": one_tensor_table,
    "dtypes": dtypes_table,
    "today": optimizers_table,
    "tensors": tensors_table,
    "train": training_table,
    "setup": setup_table,
    "files": files_table,
    "gpu": gpu_tables,
}
