"""The table of docs/export.md, how far logits of llama.cpp lie from PyTorch's: ``python -m
tests.runtimes.divergence_table`` measures and writes it."""

import re
import tempfile
from pathlib import Path

from benchmarks.machine import environment
from tests.packed.export.table import PAGE
from tests.runtimes.test_tiny_llama import COUNT, TYPES, compared

MARK = r"(<!-- table: python -m tests.runtimes.divergence_table -->\n).*?(<!-- end -->)"


def table() -> str:
    """A row for each type, and where the figures come from."""
    here = environment()
    rows = ["| type | blocks | the same weights in F32 |", "| --- | --- | --- |"]
    for type in TYPES:
        with tempfile.TemporaryDirectory() as folder:
            blocks, plain = compared(type, Path(folder))
        rows.append(f"| {type} | {blocks:.1e} | {plain:.1e} |")
    commit, processor = str(here["commit"])[:7], str(here["processor"]).partition(" (")[0]
    return "\n".join(
        [
            *rows,
            "",
            f"Nats a token, {COUNT} tokens; commit {commit}, llama.cpp b11434, {processor}, torch {here['torch']}.",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(re.sub(MARK, lambda match: f"{match[1]}{table()}\n{match[2]}", PAGE.read_text(), flags=re.DOTALL))
