"""What does the step of one large tensor cost?    python -m benchmarks.speed.step [--full] [--save [FOLDER]]

Backend, rule, codebook, dtype, granularity and outputs, varied one at a time, against torch's optimizers and a copy of
the same tensor; then whole optimizers on equal work, today's ways among them. With one thread and with all; on a GPU
where there is one.
"""

from collections.abc import Iterator

import torch

import askew_cuda as askew
from benchmarks.speed import harness, script, workloads
from benchmarks.speed.harness import COPY, PASS, Variant
from benchmarks.speed.section import Section
from benchmarks.speed.workloads import Tensors

LEVELS = {
    "binary": askew.Codebook.named("binary").levels,
    "ternary": askew.Codebook.named("ternary").levels,
    "8 bit": askew.Codebook.uniform(8).levels,
    "nf4 (table of 16)": askew.Codebook.named("nf4").levels,
    "table of 64": tuple(k * abs(k) / 64 for k in range(-32, 32)),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WARM = (
    16_384,
    49_152,
)  # weights that stay in a core's own cache, with all that belongs to them; the difference has no call in it


def our_variants(tensors: Tensors, backend: str, everything: bool) -> dict[str, Variant]:
    """Our variants: a few that every rule and dtype has, or all of them."""
    found = {
        "unquantized": tensors.ours(backend, levels=()),
        "4 bit, capture": tensors.ours(backend),
        "4 bit, interval": tensors.ours(backend, anneal="interval"),
    }
    found["4 bit, a scale that learns"] = tensors.ours(backend, learns=True)
    if everything:
        found |= {f"{name}, capture": tensors.ours(backend, levels=levels) for name, levels in LEVELS.items()}
        found["nf4 (table of 16), interval"] = tensors.ours(
            backend, levels=LEVELS["nf4 (table of 16)"], anneal="interval"
        )
        found |= {f"4 bit, a scale per {count}": tensors.ours(backend, granularity=count) for count in (128, 1024)}
        found["4 bit, a scale per 128 that learns"] = tensors.ours(backend, granularity=128, learns=True)
        found["4 bit + codes"] = tensors.ours(backend, codes=True)
        found["4 bit + bf16 copy"] = tensors.ours(backend, snapped=torch.bfloat16)
        found["4 bit + codes + bf16 copy"] = tensors.ours(backend, codes=True, snapped=torch.bfloat16)
    return {f"askew {backend} {name}": variant for name, variant in found.items()}


def large(rule: str, dtype: torch.dtype, effort: script.Effort) -> Section:
    """One tensor that no cache holds, by the operators."""
    device = effort.device
    tensors = Tensors(rule, 2**26 if effort.full or device.type == "cuda" else 2**24, dtype, device)
    names, absent = workloads.backends(device, dtype)
    variants = {COPY: tensors.copy(), PASS: tensors.negation()}
    if rule == "sgd" and dtype.itemsize == 2 and device.type == "cpu":
        absent["torch fused"] = (
            "torch 2.13's fused SGD leaves most 16-bit weights on a CPU as they are (pytorch#191763)"
        )
    else:
        variants["torch fused"] = tensors.torch_fused()
    variants["torch foreach"] = tensors.torch_foreach()
    for name in names:
        variants |= our_variants(tensors, name, everything=(rule, dtype) == ("sgd", torch.float32))
    baseline = "torch fused" if "torch fused" in variants else "torch foreach"
    timings = harness.compare(variants, baseline=baseline, rounds=effort.pick(9, 41), clock=harness.clock_of(device))
    about = {
        "rule": rule,
        "dtype": str(dtype).removeprefix("torch."),
        "weights": tensors.size,
        "threads": torch.get_num_threads(),
    }
    return Section(f"One tensor, {rule}", about, baseline, timings, absent)


def difference(run, calls: int) -> float:
    """A clock: what the second of two functions takes beyond the first."""
    few, many = run()
    return harness.host_seconds(many, calls) - harness.host_seconds(few, calls)


def in_cache(rule: str, effort: script.Effort) -> Section:
    """What the instructions take by themselves: seconds of 32,768 weights that lie in a core's own cache.

    One thread of a CPU.
    """
    sizes = []
    for size in WARM:
        tensors = Tensors(rule, size, torch.float32, torch.device("cpu"))
        sizes.append({"torch fused": tensors.torch_fused()} | our_variants(tensors, "cpu", everything=rule == "sgd"))
    pairs = {name: Variant(lambda pair=(few.run, sizes[1][name].run): pair) for name, few in sizes[0].items()}
    timings = harness.compare(pairs, baseline="torch fused", rounds=effort.pick(15, 61), calls=50, clock=difference)
    about = {
        "rule": rule,
        "dtype": "float32",
        "weights": WARM[1] - WARM[0],
        "threads": torch.get_num_threads(),
        "caches": "warm",
    }
    return Section(f"In a core's cache, {rule}", about, "torch fused", timings)


def ways_of_today(effort: script.Effort) -> Section:
    """Whole optimizers on one matrix, 4 bit, momentum 0.9."""
    size = effort.pick(2**20, 2**22)
    parameters = lambda: [workloads.parameter(size, effort.device, columns=1024)]  # noqa: E731
    makers = workloads.optimizers()
    if not effort.full:
        del makers[workloads.COMPILED]
    variants, absent = workloads.build(makers, parameters)
    absent |= {} if effort.full else {workloads.COMPILED: script.TOO_LONG}
    rounds = effort.pick(5, 15)
    timings = harness.compare(variants, baseline="AskewSGD 4 bit", rounds=rounds, clock=harness.clock_of(effort.device))
    launches = workloads.launches_of_each(variants, effort.device)
    about = {"rule": "sgd", "dtype": "float32", "weights": size, "threads": torch.get_num_threads()}
    return Section("Optimizers on one matrix", about, "AskewSGD 4 bit", timings, absent, launches)


def measure(effort: script.Effort) -> Iterator[Section]:
    for threads in effort.threads():
        harness.pin(threads)
        yield from (large(rule, dtype, effort) for rule in ("sgd", "adamw") for dtype in DTYPES)
        yield ways_of_today(effort)
        if threads == 1 and effort.device.type == "cpu":
            yield from (in_cache(rule, effort) for rule in ("sgd", "adamw"))


if __name__ == "__main__":
    script.main("step", measure, __doc__)
