"""What the benchmark scripts have in common: the command line, and how much is measured."""

import argparse
import dataclasses
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks import results
from benchmarks.speed import harness, workloads
from benchmarks.speed.section import Section, as_text

Value = TypeVar("Value")
TOO_LONG = "compiling takes half a minute; --full does it"


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured, and where."""

    full: bool
    device: torch.device

    def pick(self, short: Value, full: Value) -> Value:
        """The value of the short mode, which gives a figure in seconds, or of the full one."""
        return full if self.full else short

    def threads(self) -> list[int]:
        """One and all on a CPU; a GPU's host needs one."""
        return [1] if self.device.type == "cuda" else workloads.threads_to_try()


def main(name: str, measure: Callable[[Effort], Iterable[Section]], description: str) -> None:
    """Measures, prints and, where wanted, writes <folder>/<name>-<device>.json."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="larger tensors, more peers and more rounds")
    where = f"write {name}-cpu.json, or -cuda.json on a GPU, there; default: benchmarks/results, what README shows"
    parser.add_argument("--save", type=Path, nargs="?", const=results.RESULTS, metavar="FOLDER", help=where)
    parser.add_argument(
        "--device", type=torch.device, default=workloads.default_device(), help="default: the GPU where there is one"
    )
    arguments = parser.parse_args()
    # Weights are random here, and nothing is learned.
    warnings.filterwarnings("ignore", ".*(clipping to the outermost levels|did not move in the first step)")
    mode, sections = "full" if arguments.full else "short", []
    data = {"device": arguments.device.type, "mode": mode, "pinned": bool(harness.ALLOWED), "sections": sections}
    path = None
    for section in measure(Effort(arguments.full, arguments.device)):
        print(as_text(section), end="\n\n", flush=True)
        sections.append(section)
        if arguments.save is not None:  # after each: what is stopped leaves what it has found
            path = results.save(f"{name}-{arguments.device.type}", data, arguments.save)
    if path is not None:
        print("written to", path)
