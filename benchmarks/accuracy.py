"""How good are the networks with the library's defaults?    python -m benchmarks.accuracy [--hidden 16 256] [--seeds 10] [--save]

Digits (examples/digits.py): full precision, a straight-through estimator at its lr 0.1, and askew_cuda with its defaults at lr
0.3, on the same seeds. Differences are paired: each seed's against the same seed's, with the standard error of their mean.
"""

import argparse
import functools
import statistics
from concurrent.futures import ProcessPoolExecutor

import torch
from tqdm import tqdm

from benchmarks import results
from examples import digits

WIDTHS = ("binary", "ternary", "2bit", "4bit")


def methods() -> dict[str, object]:
    """Name of a column to a function (hidden, seed) -> accuracy in per cent."""
    columns = {"full precision": digits.full_precision}
    for name in WIDTHS:
        columns[f"STE {name}"] = functools.partial(digits.straight_through, name)
        columns[f"askew {name}"] = functools.partial(digits.quantized, name)
    return columns


def run(method: str, hidden: int, seed: int) -> tuple[str, int, int, float]:
    """One training, in a process of its own pool: one thread each."""
    torch.set_num_threads(1)
    return method, hidden, seed, methods()[method](hidden, seed)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error of the mean."""
    return statistics.mean(values), (statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/accuracy.json")
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    jobs = [(method, hidden, seed) for hidden in arguments.hidden for method in methods() for seed in seeds]
    found: dict[tuple[int, str], dict[int, float]] = {}
    with ProcessPoolExecutor(max_workers=2) as pool:
        futures = [pool.submit(run, *job) for job in jobs]
        for future in tqdm(futures, unit="training"):
            method, hidden, seed, value = future.result()
            found.setdefault((hidden, method), {})[seed] = value
    rows = []
    for hidden in arguments.hidden:
        full = found[hidden, "full precision"]
        full_mean, _ = mean_and_error([*full.values()])
        print(f"\nMLP 64-{hidden}-{hidden}-10, seeds {seeds[0]}-{seeds[-1]}, test accuracy in %: full precision {full_mean:.2f}")
        print(f"{'':9}{'STE':>7}{'askew':>8}   askew - STE      askew - full precision   (paired, +- standard error)")
        for name in WIDTHS:
            ste, ours = found[hidden, f"STE {name}"], found[hidden, f"askew {name}"]
            ste_mean, ours_mean = statistics.mean(ste.values()), statistics.mean(ours.values())
            to_ste, to_full = (mean_and_error([ours[seed] - other[seed] for seed in seeds]) for other in (ste, full))
            rows.append({"hidden": hidden, "width": name, "full precision": full_mean, "STE": ste_mean, "askew": ours_mean})
            rows[-1] |= {"askew - STE": to_ste, "askew - full precision": to_full, "seeds": len(seeds)}
            differences = "   ".join(f"{difference:+6.2f} +- {error:.2f}" for difference, error in (to_ste, to_full))
            print(f"{name:9}{ste_mean:7.2f}{ours_mean:8.2f}   {differences}")
    if arguments.save:
        cells = {f"{method}, H={hidden}": values for (hidden, method), values in found.items()}
        print("written to", results.save("accuracy", {"rows": rows, "cells": cells}))


if __name__ == "__main__":
    main()
