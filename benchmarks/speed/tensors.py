"""What do many small tensors cost?    python -m benchmarks.speed.tensors [--full] [--save [FOLDER]]

optimizer.step() of whole optimizers on 1 to 2,000 tensors, in one param group and in the usual two: the host's time,
operators or kernels of a step, and on a GPU the device's time and that of a replayed graph. Small tensors have 1 to 16
thousand weights; tiny ones have 64, so that hardly anything but the host's time is left. With one thread and with all.
"""

from collections.abc import Iterator

import torch
from torch import nn

import askew_cuda as askew
from benchmarks.speed import harness, script, workloads
from benchmarks.speed.harness import Variant
from benchmarks.speed.section import DEVICE_TIME, HOST_TIME, HOST_TIME_TINY, REPLAYED, Section
from benchmarks.speed.workloads import LR, MOMENTUM, SCALE, Maker

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
TINY = 64  # weights
BASE = {"lr": LR, "momentum": MOMENTUM}


def small(count: int, device: torch.device) -> list[nn.Parameter]:
    """The same ``count`` tensors each time."""
    sizes = torch.randint(1_000, 16_001, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return [workloads.parameter(size, device, seed) for seed, size in enumerate(sizes)]


def tiny(count: int, device: torch.device) -> list[nn.Parameter]:
    """The same ``count`` tensors each time."""
    return [workloads.parameter(TINY, device, seed) for seed in range(count)]


def in_two_groups(parameters: list[nn.Parameter], **first: object) -> list[dict[str, object]]:
    """Every other tensor in the first group, with keywords of its own, as weights and biases follow each other."""
    return [{"params": parameters[::2], **first}, {"params": parameters[1::2]}]


def two_groups() -> dict[str, Maker]:
    """torch's fused step and ours, whose first group is quantized and whose second is not."""
    ours = {"quantizer": askew.Quantizer("4bit", scale=SCALE), "epsilon": workloads.MIDWAY, "recovery": 0.01}
    return {
        f"{BASELINE}, 2 groups": lambda p: torch.optim.SGD(in_two_groups(p), fused=True, **BASE).step,
        "AskewSGD 4 bit and unquantized, 2 groups": lambda p: askew.AskewSGD(in_two_groups(p, **ours), **BASE).step,
    }


def makers(count: int, effort: script.Effort) -> tuple[dict[str, Maker], dict[str, str]]:
    """The optimizers that take part, and why one does not."""
    every = workloads.optimizers()
    chosen, absent = {name: every[name] for name in NAMES}, {}
    if count > COMPILED_UP_TO or not effort.full:
        del chosen[workloads.COMPILED]
        why = f"compiling takes minutes for {count:,} tensors" if count > COMPILED_UP_TO else script.TOO_LONG
        absent[workloads.COMPILED] = why
    return chosen | (two_groups() if count > 1 else {}), absent


def graphs(count: int, device: torch.device) -> dict[str, Variant]:
    """A GPU's steps captured and replayed, ours with a tensor for epsilon, as a graph that anneals needs it."""
    found = {}
    for name, make in {
        BASELINE: lambda p: torch.optim.SGD(p, fused=True, **BASE),
        "torch SGD(foreach=True)": lambda p: torch.optim.SGD(p, foreach=True, **BASE),
        "AskewSGD 4 bit": lambda p: askew.AskewSGD(
            p,
            quantizer=askew.Quantizer("4bit", scale=SCALE),
            epsilon=torch.tensor(workloads.MIDWAY, device=device, dtype=torch.float64),
            recovery=0.01,
            **BASE,
        ),
    }.items():
        optimizer = make(small(count, device))
        torch.cuda.synchronize()  # the side stream does not wait for what made the tensors
        with torch.cuda.stream(torch.cuda.Stream()):
            optimizer.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        found[name] = Variant(graph.replay, keeps=optimizer)  # whose weights and state a replay reads and writes
    return found


def measure(effort: script.Effort) -> Iterator[Section]:
    gpu = effort.device.type == "cuda"
    for threads in effort.threads():
        harness.pin(threads)
        for count in effort.pick((1, 4, 30, 300, 1000, 2000), (1, 4, 10, 30, 100, 300, 1000, 2000)):
            chosen, absent = makers(count, effort)
            rounds, calls = effort.pick(9, 41), max(1, 300 // count)
            for title, draw in {HOST_TIME: small, HOST_TIME_TINY: tiny}.items():
                if draw is tiny and count == 1:
                    continue
                about = {"tensors": count, "threads": threads} | ({"weights of each": TINY} if draw is tiny else {})
                variants, more = workloads.build(chosen, lambda count=count, draw=draw: draw(count, effort.device))
                timings = harness.compare(variants, baseline=BASELINE, rounds=rounds, calls=calls)
                launches = workloads.launches_of_each(variants, effort.device)
                yield Section(title, about, BASELINE, timings, absent | more, launches)
                if gpu and draw is small:
                    on_device = {DEVICE_TIME: variants, REPLAYED: graphs(count, effort.device)}
                    for device_title, timed in on_device.items():
                        clock = harness.device_clock()
                        timings = harness.compare(timed, baseline=BASELINE, rounds=rounds, clock=clock)
                        yield Section(device_title, about, BASELINE, timings)


if __name__ == "__main__":
    script.main("tensors", measure, __doc__)
