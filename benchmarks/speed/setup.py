"""What does it cost to begin, to evaluate and to end?    python -m benchmarks.speed.setup [--full] [--save [FOLDER]]

Estimating scales, quantized(), finalize(), a sample of the monitor and packed codes, beside an AdamW step of the same
weights: one float32 matrix. With one thread and with all. And bytes per weight that each holds at its peak, beyond what
it was given.
"""

import gc
from collections.abc import Callable, Iterator

import torch

import askew_cuda as askew
from askew_cuda.look import packed_codes
from benchmarks.speed import harness, script, workloads
from benchmarks.speed.harness import Variant
from benchmarks.speed.section import SETUP, SETUP_MEMORY, Section
from benchmarks.speed.workloads import LR, SCALE

BASELINE = "AskewAdamW step, 4 bit"
COLUMNS = 1024
# What the weights are quantized to where scales are estimated: codebook, granularity, size of a group.
SCALES: dict[str, tuple[str, str, int | None]] = {
    "scales, ternary per channel": ("ternary", "channel", None),
    "scales, 4 bit per group of 128": ("4bit", "group", 128),
    "scales, ternary per tensor": ("ternary", "tensor", None),
    "scales, 4 bit per tensor": ("4bit", "tensor", None),
    "scales, nf4 per group of 64": ("nf4", "group", 64),
    "scales, int8 per channel": ("int8", "channel", None),
}


def optimizer_of(
    size: int, device: torch.device, quantizer: askew.Quantizer, epsilon: float = workloads.MIDWAY
) -> askew.AskewAdamW:
    """Of one weight, with a gradient."""
    return askew.AskewAdamW(
        [workloads.parameter(size, device, columns=COLUMNS)], lr=LR, quantizer=quantizer, epsilon=epsilon
    )


def estimating(size: int, device: torch.device, name: str) -> Callable[[], None]:
    """prepare(), as often as it is called."""
    codebook, granularity, group = SCALES[name]
    optimizer = optimizer_of(size, device, askew.Quantizer(codebook, "mse", granularity, group), 1.0)

    def run() -> None:
        optimizer.state.clear()
        optimizer.prepare()

    return run


def evaluating(optimizer: askew.AskewAdamW) -> None:
    """In and out."""
    with optimizer.quantized():
        pass


def runs(size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """All that is compared, by name."""
    given = askew.Quantizer("4bit", scale=SCALE)
    stepped, ended = optimizer_of(size, device, given), optimizer_of(size, device, given)
    stepped.step()
    ended.prepare()
    (weight,) = stepped.param_groups[0]["params"]
    scale, watch = torch.tensor(SCALE, device=device), askew.monitor(stepped, every=10**9)
    return {
        BASELINE: stepped.step,
        **{name: estimating(size, device, name) for name in SCALES},
        "quantized(), in and out": lambda: evaluating(stepped),
        "finalize()": ended.finalize,
        "monitor, a sample": watch.sample,
        "codes, packed to 4 bits": lambda: packed_codes(weight, scale, given.codebook.levels, 16, 2),
    }


def peaks(size: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Bytes per weight that a call holds at its peak, beyond what was there before it."""
    found = {}
    for name, run in runs(size, device).items():
        run()
        gc.collect()
        before = harness.held_memory(device)
        found[name] = {"peak": (harness.peak_memory(run, device) - before) / size}
    return found


def measure(effort: script.Effort) -> Iterator[Section]:
    sizes = effort.pick((2**20, 19 * 2**20), (2**20, 2**22, 19 * 2**20, 2**26))
    for threads in effort.threads():
        harness.pin(threads)
        for size in sizes:
            variants = {name: Variant(run) for name, run in runs(size, effort.device).items()}
            rounds = effort.pick(5, 11) if size <= 2**25 else 3
            timings = harness.compare(variants, baseline=BASELINE, rounds=rounds)
            del variants
            yield Section(SETUP, {"weights": size, "threads": threads}, BASELINE, timings)
    harness.return_memory_at_once()  # last: it makes every allocation slow
    yield Section(SETUP_MEMORY, {"weights": sizes[-1]}, BASELINE, [], memory=peaks(sizes[-1], effort.device))


if __name__ == "__main__":
    script.main("setup", measure, __doc__)
