"""The table of docs/minilm.md, from what examples/minilm.py has left in the results."""

from benchmarks.accuracy.score_tables import FLOAT
from benchmarks.markdown import markdown_table
from benchmarks.results import RESULTS, load, where_made


def minilm_table() -> str:
    """One line for each training, the largest matrices first, and where they were made."""
    runs = [run for path in RESULTS.glob("minilm-*.json") if (run := load(path.stem)) is not None]
    runs.sort(key=lambda run: (-run["matrix_bytes"], run["way"]))
    full = next(run["tested"] for run in runs if run["way"] == FLOAT)
    rows = [
        [
            run["way"],
            f"{run['tested']:.2f} %",
            f"{run['tested'] / full:.1%}",
            f"{run['matrix_bytes'] / 1e6:.2f} MB",
            f"{run['lr']:g}",
        ]
        for run in runs
    ]
    table = markdown_table(["", "test accuracy", "of full precision", "36 matrices", "learning rate"], rows)
    steps = ", ".join(sorted({f"{run['steps']:,}" for run in runs}))
    return f"{table}\n\n{where_made(run['environment'] for run in runs)}; {steps} steps, one seed."


FIGURES = {"minilm": minilm_table}
