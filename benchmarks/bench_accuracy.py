"""How good are the networks, by the same loop, budget and tuning rule for every method?    python -m benchmarks.bench_accuracy

Measures what is missing of the accuracy table (docs/accuracy.md), each cell on one thread, and writes each when it is done: it can be
stopped and started again. A cell is missing, too, where a base rule, a setting or a seed has come since.
`python -m benchmarks.report` makes the tables.
"""

import argparse
import multiprocessing
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from benchmarks.peers.methods import WIDTHS
from benchmarks.referee import cells, table
from benchmarks.referee.cells import Effort
from benchmarks.referee.tasks import STARTS, TASKS

QUICK = Effort(Path("build/accuracy-quick"), seeds=(0, 1, 2, 3, 4), tuning=1, length=0.5)
QUICK_CHOICE = {"tasks": ["digits-16", "digits-bn", "lm-gpt2"], "starts": ["scratch"], "widths": ["binary", "ternary"]}


def measure(task: str, start: str, width: str, method: str, effort: Effort) -> tuple[float, str]:
    """Seconds of a core that one cell took and, where it could not be measured, why; in a process of its own, on one thread."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*(clipping to the outermost levels)")
    (plan,) = cells.plans([task], [start], [width], [method])
    begun = time.process_time()
    try:
        cells.measure(plan, effort)
    except Exception as error:  # the other cells don't depend on it, and the table says "not run"
        return time.process_time() - begun, f"{type(error).__name__}: {error}"
    return time.process_time() - begun, ""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ten minutes: few tasks, widths and seeds, half the steps; not for the table")
    parser.add_argument("--again", action="store_true", help="measure cells that are there already once more")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each; default: 2")
    choices = {"tasks": list(TASKS), "starts": list(STARTS), "widths": list(WIDTHS), "methods": cells.names()}
    for name, known in choices.items():
        parser.add_argument(f"--{name}", nargs="+", choices=known, metavar=name[:-1].upper(), help=f"of {', '.join(known)}; default: all")
    arguments = parser.parse_args()
    for name, known in choices.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, QUICK_CHOICE.get(name, known) if arguments.quick else known)
    return arguments


def main() -> None:
    arguments = parse()
    effort = QUICK if arguments.quick else Effort()
    wanted = list(cells.plans(arguments.tasks, arguments.starts, arguments.widths, arguments.methods))
    if arguments.again:
        for plan in wanted:
            cells.path(effort.folder, *cells.key(plan)).unlink(missing_ok=True)
    missing = [cells.key(plan) for plan in wanted if cells.done(plan, effort) is None]
    print(f"{len(wanted)} cells, {len(wanted) - len(missing)} of them are there", flush=True)
    failed, begun = 0, time.perf_counter()
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(measure, *each, effort): each for each in missing}
        for number, future in enumerate(as_completed(futures), 1):
            seconds, problem = future.result()
            failed += bool(problem)
            minutes = (time.perf_counter() - begun) / 60
            print(f"{minutes:6.1f} min  {number}/{len(missing)}  {' '.join(futures[future])}  {seconds:.1f} s  {problem}", flush=True)
    if arguments.quick:
        print(f"\nQUICK: {len(QUICK.seeds)} seeds, half the steps; figures of the full table are in docs/accuracy.md\n")
        print(table.scores(effort.folder, arguments.tasks, arguments.starts, arguments.widths))
    if failed:
        raise SystemExit(f"{failed} cells could not be measured")


if __name__ == "__main__":
    main()
