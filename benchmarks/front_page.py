"""README's one table, from the committed results: accuracy, memory, time and size in a few lines."""

from askew_cuda.packed.bits import width
from benchmarks import results
from benchmarks.accuracy import cells, store
from benchmarks.accuracy.loop import FULL
from benchmarks.accuracy.score_tables import CAN, FLOAT, NOT_RUN, OURS, PEERS, best_peer, compared, shown
from benchmarks.accuracy.tasks import TASKS
from benchmarks.markdown import markdown_table
from benchmarks.speed.timing_tables import milliseconds, only_section, three_digits

TASK, START, LEVELS = "letters", "scratch", ("binary", "ternary")
# Ways of today to train quantized weights, as the benchmarks call them, and as a reader does.
WAYS = {"STE": "STE", "BinaryRelax": "BinaryRelax", "torchao PARQ": "PARQ"}


def front_table() -> str:
    """Ours, the best of the others, and full precision."""
    rows = [*(_accuracy(level) for level in LEVELS), _minilm(), _kept(), _step(), _file()]
    return markdown_table(["", "askew_cuda", "best tuned peer", FLOAT], rows)


def _accuracy(level: str) -> list[str]:
    found = store.read(cells.CELLS_FOLDER)
    ours, peer = found.get((TASK, START, level, OURS)), best_peer(found, TASK, START, level)
    gain = f" ({compared(ours, peer)})" if ours and peer else ""
    missing = sum((TASK, START, level, name) not in found for name in PEERS if level in CAN[name])
    theirs = f"{shown(peer)}, {peer['method']}" if peer else ""
    theirs += f" ({missing} {NOT_RUN})" if missing else ""
    task = TASKS[TASK]
    full = shown(found.get((TASK, START, FULL, FLOAT)))
    return [f"{task.title}, {level}, test accuracy, {task.unit}", f"**{shown(ours)}**{gain}", theirs, full]


def _minilm() -> list[str]:
    ours, full = (results.load(f"minilm-{name}")["tested"] for name in ("askew_cuda-ternary", "full-precision"))
    return [
        "MiniLM, trained already, its 36 matrices ternary, test accuracy of one seed, %",
        f"**{ours:.2f}**",
        "-",
        f"{full:.2f}",
    ]


def _least(values: dict[str, float]) -> tuple[str, float]:
    """The best of the ways of today, by what they are called for a reader."""
    there = {WAYS[way]: value for name, value in values.items() for way in WAYS if name.startswith(way)}
    best = min(there, key=there.__getitem__)
    return best, there[best]


def _kept() -> list[str]:
    held = results.load("memory-cpu")["sections"][0]["memory"]
    kept = {name: each["between steps"] for name, each in held.items()}
    name, least = _least(kept)
    ours, torchs = kept["AskewSGD 4 bit"], kept["torch SGD(fused=True)"]
    what = "bytes kept per weight beside it and its gradient, momentum"
    return [what, f"**{ours:.0f}**", f"{least:.0f}, {name}", f"{torchs:.0f}"]


def _step() -> list[str]:
    section = only_section(results.load("step-cpu"), "Optimizers on one matrix", threads=1)
    timings = {each["name"]: each for each in section["timings"]}
    name, least = _least({name: each["seconds"][0] for name, each in timings.items()})
    what = f"one step of {section['about']['weights'] / 2**20:.0f} Mi weights, 4 bit, annealing, one thread, ms"
    ours, torchs = (milliseconds(timings[each]) for each in ("AskewSGD 4 bit", "torch SGD(fused=True)"))
    return [what, f"**{ours}**", f"{three_digits(least * 1e3)}, {name}", f"{torchs}, torch, fused"]


def _file() -> list[str]:
    """Counted: float32, and codes as they are packed."""
    return ["file, ternary, bytes per weight", f"**{width(levels=3) / 8:g}** and the scales", "-", "4"]


FIGURES = {"front": front_table}
