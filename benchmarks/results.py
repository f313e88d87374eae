"""What a benchmark leaves behind: <name>-<device>.json, with where and with what it was made.

The committed ones are in RESULTS.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.machine import environment

RESULTS = Path(__file__).parent / "results"


def save(name: str, data: dict[str, object], folder: Path = RESULTS) -> Path:
    """Writes the data and the environment to <folder>/<name>.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path, new = folder / f"{name}.json", folder / f"{name}.new"
    new.write_text(json.dumps({"environment": environment(), **data}, indent=1, default=dataclasses.asdict) + "\n")
    return new.replace(path)  # what is stopped meanwhile leaves the file from before


def where_made(environments: Iterable[dict[str, Any]]) -> str:
    """Machines, versions, commits and days of several measurements, each once."""
    every = list(environments)
    seen = {
        name: ", ".join(sorted({str(each[name]) for each in every}))
        for name in ("processor", "torch", "python", "date")
    }
    commits = sorted(each[:7] + " with changes" * ("changes" in each) for each in {each["commit"] for each in every})
    where = f"{seen['processor']}, torch {seen['torch']}, Python {seen['python']}"
    return f"{where}, commit {', '.join(commits)}, {seen['date']}"


def load(name: str) -> dict[str, Any] | None:
    """What save() wrote; None where it was never measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None
