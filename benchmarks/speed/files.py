"""What do writing and reading a packed file cost?    python -m benchmarks.speed.files [--full] [--save [FOLDER]]

save_packed and load_packed beside the package safetensors with the same network in float32: its save_file, and its
load_file and load_state_dict. Files lie in the system's cache.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

import askew_cuda as askew
from benchmarks.speed import harness, script
from benchmarks.speed.harness import Variant
from benchmarks.speed.section import LOADING, SAVING, Section

FLOATS = "safetensors, float32"
SPECS = ("binary", "ternary/channel", "4bit/group128", "8bit")
WIDTH = 2048


def network(weights: int) -> nn.Sequential:
    """Square matrices, as many weights in all."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(weights // WIDTH**2)))


def path_of(folder: Path, name: str) -> Path:
    return folder / f"{name.replace('/', '-')}.safetensors"


def runs(weights: int, folder: Path) -> tuple[dict[str, Callable[[], object]], dict[str, Callable[[], object]]]:
    """What writes, and what reads what was written, by name."""
    model, plain = network(weights), path_of(folder, FLOATS)
    save = {FLOATS: lambda: save_file(model.state_dict(), plain)}
    load: dict[str, Callable[[], object]] = {FLOATS: lambda: model.load_state_dict(load_file(plain))}
    for spec in SPECS:
        mine, path = network(weights), path_of(folder, spec)
        optimizer = askew.AskewSGD(askew.param_groups(mine, {"*": spec}, pretrained=True, verbose=False))
        optimizer.prepare()
        save[spec] = lambda mine=mine, optimizer=optimizer, path=path: askew.save_packed(mine, optimizer, path)
        load[spec] = lambda mine=mine, path=path: askew.load_packed(path, mine)
    return save, load


def measure(effort: script.Effort) -> Iterator[Section]:
    weights = effort.pick(2**24, 2**28)
    rounds = effort.pick(9, 5)
    for threads in effort.threads():
        harness.pin(threads)
        with tempfile.TemporaryDirectory() as folder:
            about = {"weights": weights, "threads": threads}
            for title, each in zip((SAVING, LOADING), runs(weights, Path(folder)), strict=True):
                variants = {name: Variant(run) for name, run in each.items()}
                timings = harness.compare(variants, baseline=FLOATS, rounds=rounds)
                sizes = {name: {"file": path_of(Path(folder), name).stat().st_size / weights} for name in each}
                yield Section(title, about, FLOATS, timings, memory=sizes)


if __name__ == "__main__":
    script.main("files", measure, __doc__)
