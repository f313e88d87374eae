"""How good are the networks, every method tuned alike?    python -m benchmarks.accuracy [--quick]

Measures what is missing of the accuracy table (docs/accuracy.md), each cell on one thread, and writes each when it is
done: it can be stopped and started again. A cell is missing, too, where a base rule, a setting or a seed has come
since. `python -m benchmarks.report` makes the tables.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from benchmarks.accuracy import cells, score_tables, store
from benchmarks.accuracy.cells import Campaign
from benchmarks.accuracy.methods.method import WIDTHS
from benchmarks.accuracy.tasks import STARTS, TASKS

QUICK = Campaign(Path("build/accuracy-quick"), seeds=(0, 1, 2, 3, 4), tuning=1, length=0.5)
QUICK_CHOICE = {"tasks": ["digits-16", "digits-bn", "lm-gpt2"], "starts": ["scratch"], "widths": ["binary", "ternary"]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="ten minutes: few tasks, widths and seeds, half the steps; not for the table",
    )
    parser.add_argument("--again", action="store_true", help="measure cells that are there already once more")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each; default: 2")
    choices = {"tasks": list(TASKS), "starts": list(STARTS), "widths": list(WIDTHS), "methods": cells.names()}
    for name, known in choices.items():
        parser.add_argument(
            f"--{name}",
            nargs="+",
            choices=known,
            metavar=name[:-1].upper(),
            help=f"of {', '.join(known)}; default: all",
        )
    arguments = parser.parse_args()
    for name, known in choices.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, QUICK_CHOICE.get(name, known) if arguments.quick else known)
    return arguments


def main() -> None:
    arguments = parse()
    campaign = QUICK if arguments.quick else Campaign()
    wanted = list(cells.plans(arguments.tasks, arguments.starts, arguments.widths, arguments.methods))
    if arguments.again:
        for plan in wanted:
            store.remove(campaign.folder, cells.key(plan))
    missing = [cells.key(plan) for plan in wanted if cells.done(plan, campaign) is None]
    print(f"{len(wanted)} cells, {len(wanted) - len(missing)} of them are there", flush=True)
    failed, begun = 0, time.perf_counter()
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(cells.measure_in_own_process, each, campaign): each for each in missing}
        for finished, future in enumerate(as_completed(futures), 1):
            seconds, problem = future.result()
            failed += bool(problem)
            done = f"{(time.perf_counter() - begun) / 60:6.1f} min  {finished}/{len(missing)}"
            print(f"{done}  {' '.join(futures[future])}  {seconds:.1f} s  {problem}", flush=True)
    if arguments.quick:
        print(f"\nQUICK: {len(QUICK.seeds)} seeds, half the steps; figures of the full table are in docs/accuracy.md\n")
        print(score_tables.methods_table(campaign.folder, arguments.tasks, arguments.starts, arguments.widths))
    if failed:
        raise SystemExit(f"{failed} cells could not be measured")


if __name__ == "__main__":
    main()
