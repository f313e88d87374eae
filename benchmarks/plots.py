"""Every plot of README and docs, from the committed results: path of an SVG file -> a function that draws it.

The digest of the data that were drawn lies in the file, so that a test can tell whether they are the committed ones,
whatever version of matplotlib or of a font drew them.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable
from typing import Any

from benchmarks import results
from benchmarks.accuracy.score_tables import gains
from benchmarks.speed.timing_tables import plural

Series = dict[
    str, dict[str, list[float]]
]  # title of a panel -> name of a line -> x, y alternating; or one number; or it and its error


def scaling_lines() -> Series:
    """Nanoseconds per weight against weights: a panel for each number of threads and state of the caches."""
    panels: Series = {}
    for section in results.load("scaling-cpu")["sections"]:
        about = section["about"]
        for caches in ("warm", "cold") if about["caches"] == "too small" else (about["caches"],):
            lines = panels.setdefault(f"{plural(about['threads'])}, caches {caches}", {})
            for timing in section["timings"]:
                lines.setdefault(timing["name"], []).extend(
                    (about["weights"], timing["seconds"][0] * 1e9 / about["weights"])
                )
    return panels


def optimizer_bars() -> Series:
    """Time relative to AskewSGD, per way of training: one panel, one bar each."""
    data = results.load("step-cpu")
    section = next(
        s for s in data["sections"] if s["title"] == "Optimizers on one matrix" and s["about"]["threads"] == 1
    )
    return {
        "time of a step relative to AskewSGD 4 bit": {
            timing["name"]: [timing["ratio"][0]] for timing in section["timings"]
        }
    }


def svg_of(panels: Series) -> str:
    """SVG text.

    Lines where there are points, bars where there is one number each, points with errors where there are two.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "askew_cuda", "svg.fonttype": "none", "font.size": 9}):
        across = min(2, len(panels))
        figure, axes = pyplot.subplots(
            -(-len(panels) // across), across, figsize=(9, 3.2 * -(-len(panels) // across)), squeeze=False
        )
        for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
            axis.set_title(title)
            _fill(axis, lines)
            axis.grid(alpha=0.3)
        figure.tight_layout()
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Description": digest(panels)})
        pyplot.close(figure)
    return re.sub(r"[ \t]+$", "", text.getvalue(), flags=re.MULTILINE)


def _fill(axis: Any, lines: dict[str, list[float]]) -> None:
    longest = max(map(len, lines.values()), default=0)
    if longest == 1:
        axis.barh(list(lines), [line[0] for line in lines.values()])
        axis.set_xscale("log")
        axis.invert_yaxis()
    elif longest == 2:
        axis.errorbar(
            [line[0] for line in lines.values()], list(lines), xerr=[2 * line[1] for line in lines.values()], fmt="o"
        )
        axis.axvline(0, color="grey")
        axis.invert_yaxis()
    elif longest > 2:
        for name, line in lines.items():
            axis.loglog(line[::2], line[1::2], marker=".", label=name)
        axis.set(xlabel="weights", ylabel="ns per weight")
        axis.legend()


def digest(data: Any) -> str:
    """Of the numbers that a plot shows."""
    return "data sha256 " + hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


PLOTS: dict[str, Callable[[], Series]] = {
    "docs/scaling.svg": scaling_lines,
    "docs/today.svg": optimizer_bars,
    "docs/accuracy.svg": gains,
}
