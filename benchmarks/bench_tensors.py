"""What do many small tensors cost?    python -m benchmarks.bench_tensors [--full] [--save [FOLDER]]

optimizer.step() of whole optimizers on 1 to 2,000 tensors of 1 to 16 thousand weights: the host's time, operators or kernels of a step,
and on a GPU the device's time and that of a replayed graph. With one thread and with all.
"""

from collections.abc import Iterator

import torch

import askew_cuda as askew
from benchmarks import harness, script, workloads
from benchmarks.harness import Variant
from benchmarks.results import Section
from benchmarks.workloads import LR, MOMENTUM, SCALE

BASELINE = "torch SGD(fused=True)"
NAMES = (
    BASELINE,
    "torch SGD(foreach=True)",
    "torch SGD(foreach=False)",
    workloads.COMPILED,
    "AskewSGD unquantized",
    "AskewSGD 4 bit",
    "AskewSGD 4 bit, codes",
)
COMPILED_UP_TO = 30  # tensors: compiling 100 takes half a minute, 2,000 far more


def parameters(count: int, device: torch.device) -> list[torch.nn.Parameter]:
    """The same ``count`` tensors each time."""
    sizes = torch.randint(1_000, 16_001, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return [workloads.parameter(size, device, seed) for seed, size in enumerate(sizes)]


def makers(count: int, effort: script.Effort) -> tuple[dict[str, workloads.Maker], dict[str, str]]:
    """The optimizers that take part, and why one does not."""
    every = workloads.optimizers()
    chosen = {name: every[name] for name in NAMES}
    if count > COMPILED_UP_TO or not effort.full:
        chosen.pop(workloads.COMPILED)
        why = f"compiling takes minutes for {count:,} tensors" if count > COMPILED_UP_TO else script.TOO_LONG
        return chosen, {workloads.COMPILED: why}
    return chosen, {}


def graphs(count: int, device: torch.device) -> dict[str, Variant]:
    """A GPU's steps captured and replayed, ours with a tensor for epsilon, as a graph that anneals needs it."""
    base = {"lr": LR, "momentum": MOMENTUM}
    found = {}
    for name, make in {
        BASELINE: lambda p: torch.optim.SGD(p, fused=True, **base),
        "torch SGD(foreach=True)": lambda p: torch.optim.SGD(p, foreach=True, **base),
        "AskewSGD 4 bit": lambda p: askew.AskewSGD(
            p,
            quantizer=askew.Quantizer("4bit", scale=SCALE),
            epsilon=torch.tensor(workloads.MIDWAY, device=device, dtype=torch.float64),
            recovery=0.01,
            **base,
        ),
    }.items():
        optimizer = make(parameters(count, device))
        with torch.cuda.stream(torch.cuda.Stream()):
            optimizer.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        found[name] = Variant(graph.replay)
    return found


def measure(effort: script.Effort) -> Iterator[Section]:
    gpu = effort.device.type == "cuda"
    for threads in effort.threads():
        harness.pin(threads)
        for count in effort.pick((1, 30, 300, 1000, 2000), (1, 3, 10, 30, 100, 300, 1000, 2000)):
            chosen, absent = makers(count, effort)
            variants, more = workloads.build(chosen, lambda count=count: parameters(count, effort.device))
            about = {"tensors": count, "threads": threads}
            rounds, calls = effort.pick(9, 41), max(1, 300 // count)
            timings = harness.compare(variants, baseline=BASELINE, rounds=rounds, calls=calls)
            launches = workloads.launches(variants, effort.device)
            yield Section("Host time of optimizer.step()", about, BASELINE, timings, absent | more, launches)
            if gpu:
                for title, timed in {"Device time of optimizer.step()": variants, "A replayed graph": graphs(count, effort.device)}.items():
                    timings = harness.compare(timed, baseline=BASELINE, rounds=rounds, clock=harness.device_clock())
                    yield Section(title, about, BASELINE, timings)


if __name__ == "__main__":
    script.main("tensors", measure, __doc__)
