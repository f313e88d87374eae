"""The table of docs/minilm.md, from what examples/minilm.py has left in the results."""

from benchmarks.markdown import markdown_table
from benchmarks.results import RESULTS, load

FLOAT = "full precision"


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
    table = markdown_table(["", "test accuracy", "of full precision", "36 matrices", "learning rate", "training"], rows)
    made = [run["environment"] for run in runs]
    places = (
        sorted({each["processor"] for each in made}),
        sorted({f"torch {each['torch']}" for each in made}),
        [f"commit {', '.join(sorted({_short(each['commit']) for each in made}))}"],
        sorted({each["date"] for each in made}),
    )
    return f"{table}\n\n{'; '.join(', '.join(each) for each in places)}; {runs[0]['steps']} steps, one seed."


def _short(commit: str) -> str:
    return commit[:7] + (" with changes" if " with " in commit else "")


FIGURES = {"minilm": minilm_table}
