"""Is the fused step as fast as a plain fused optimizer on a CPU?    python -m benchmarks.bench_cpu [--quick] [--save]

One thread. Three questions: one large tensor, against torch's fused SGD and a copy; 300 small tensors, whole optimizers against
each other; and the ways that the field goes today, the authors' eager formula and torchao's PARQ.
"""

import argparse
import dataclasses
import resource

import torch

import askew_cuda as askew
from askew_cuda import ops
from benchmarks import harness
from benchmarks.peers import authors_eager

LEVELS_4BIT = askew.Codebook.uniform(4).levels
MIDWAY = 0.5  # epsilon, while annealing: both branches of the constraint are taken


def tensors(size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, gradient, momentum buffer."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(size, generator=generator) * std for std in (0.05, 0.01, 0.01))


def one_large_tensor(size: int, rounds: int) -> list[harness.Timing]:
    """The operators themselves, momentum 0.9, float32; torch's fused SGD is the baseline."""
    weight, grad, buffer = ([each] for each in tensors(size))
    target = torch.empty_like(weight[0])
    scale = [torch.tensor(0.02)]
    codes, snapped = [torch.empty(size, dtype=torch.uint8)], [torch.empty(size, dtype=torch.bfloat16)]
    fused = {"momentum": 0.9, "weight_decay": 0.0, "lr": 1e-3, "dampening": 0.0, "nesterov": False, "maximize": False}
    sgd_ = ops.operators("cpu").sgd_
    common = {"momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False, "lr": 1e-3, "epsilon": MIDWAY}
    constraint = {"skew_at": "velocity", "recovery": 0.01, "alpha": None, "max_step": 0.5, "clip": True}

    def ours(levels=LEVELS_4BIT, anneal="capture", codes=(), snapped=()):
        lists = (weight, grad, buffer, scale if levels else [], list(levels), list(codes), list(snapped))
        return lambda: sgd_(*lists, anneal=anneal, **common, **constraint)

    variants = {
        "torch fused SGD": lambda: torch._fused_sgd_(weight, grad, buffer, is_first_step=False, grad_scale=None, found_inf=None, **fused),
        "askew 4 bit, capture": ours(),
        "askew unquantized": ours(levels=()),
        "askew binary, capture": ours(levels=(-1.0, 1.0)),
        "askew 4 bit, interval": ours(anneal="interval"),
        "askew nf4 (table), capture": ours(levels=askew.Codebook.named("nf4").levels),
        "askew 4 bit + codes": ours(codes=codes),
        "askew 4 bit + codes + bf16 copy": ours(codes=codes, snapped=snapped),
        "copy of one tensor": lambda: target.copy_(weight[0]),
    }
    return harness.compare(variants, baseline="torch fused SGD", rounds=rounds)


def many_small_tensors(count: int, rounds: int) -> list[harness.Timing]:
    """optimizer.step() of whole optimizers, each on its own copy of the same ``count`` tensors of 1 to 16 thousand weights."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1_000, 16_001, (count,), generator=generator).tolist()

    def parameters() -> list[torch.nn.Parameter]:
        made = []
        for seed, size in enumerate(sizes):
            weight, grad, _ = tensors(size, seed)
            made.append(torch.nn.Parameter(weight))
            made[-1].grad = grad
        return made

    def quantized(**keywords):
        optimizer = askew.AskewSGD(
            parameters(), lr=1e-3, momentum=0.9, quantizer=askew.Quantizer("4bit", scale=0.02), epsilon=MIDWAY, recovery=0.01, **keywords
        )
        return optimizer.step

    variants = {
        "torch SGD(fused=True)": torch.optim.SGD(parameters(), lr=1e-3, momentum=0.9, fused=True).step,
        "torch SGD(foreach=True)": torch.optim.SGD(parameters(), lr=1e-3, momentum=0.9, foreach=True).step,
        "AskewSGD 4 bit, capture": quantized(),
        "AskewSGD 4 bit, capture, codes": quantized(outputs=("codes",)),
        "AskewSGD unquantized": askew.AskewSGD(parameters(), lr=1e-3, momentum=0.9).step,
    }
    return harness.compare(variants, baseline="torch SGD(fused=True)", rounds=rounds, calls=5)


def ways_of_today(size: int, rounds: int) -> list[harness.Timing]:
    """4 bit, momentum 0.9: our step is the baseline."""

    def parameter() -> torch.nn.Parameter:
        weight, grad, _ = tensors(size)
        made = torch.nn.Parameter(weight.view(1024, -1))
        made.grad = grad.view(1024, -1)
        return made

    ours = askew.AskewSGD(
        [parameter()], lr=1e-3, momentum=0.9, quantizer=askew.Quantizer("4bit", scale=0.02), epsilon=MIDWAY, recovery=0.01
    )
    weight, grad, buffer = tensors(size)
    variants = {
        "AskewSGD 4 bit": ours.step,
        "authors' eager formula": lambda: authors_eager.step(
            weight, grad, buffer, 0.02, epsilon=MIDWAY / 16, alpha=1.0, lr=1e-3, momentum=0.9
        ),
    }
    try:
        from torchao.prototype.parq.optim import ProxPARQ, QuantOptimizer
        from torchao.prototype.parq.quant import UnifQuantizer
    except ImportError as error:
        print(f"torchao's PARQ is absent ({error}); pip install --no-deps torchao")
    else:
        base = torch.optim.SGD([{"params": [parameter()], "quant_bits": 4}], lr=1e-3, momentum=0.9, fused=True)
        parq = QuantOptimizer(base, UnifQuantizer(), ProxPARQ(anneal_start=0, anneal_end=10**9))
        variants["torchao PARQ 4 bit, fused base"] = parq.step
    return harness.compare(variants, baseline="AskewSGD 4 bit", rounds=rounds, calls=1)


def temporaries(size: int) -> dict[str, float]:
    """By how many bytes per weight the process's peak memory grows in a step; the first step has allocated state and scale."""
    weight, grad, _ = tensors(size)
    parameter = torch.nn.Parameter(weight)
    parameter.grad = grad
    optimizer = askew.AskewSGD([parameter], lr=1e-3, momentum=0.9, quantizer=askew.Quantizer("4bit", scale=0.02), epsilon=MIDWAY)
    optimizer.step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    optimizer.step()
    return {"weights": size, "bytes_per_weight": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller tensors and fewer rounds: a look, not a figure")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    scale = 8 if arguments.quick else 1
    large, rounds = 2**26 // scale, 25 // scale + 4
    memory = temporaries(large)
    sections = {
        f"One tensor of {large // 2**20} Mi float32 weights, momentum 0.9": one_large_tensor(large, rounds),
        "300 tensors of 1 to 16 thousand weights, optimizer.step()": many_small_tensors(300, 4 * rounds),
        f"The ways of today, {2**22 // scale // 2**10} Ki weights": ways_of_today(2**22 // scale, 5),
    }
    for title, timings in sections.items():
        print(harness.table(title, timings), end="\n\n")
    print(f"Peak memory of a step: {memory['bytes_per_weight']:.3f} bytes per weight beyond weights, gradients and state")
    if arguments.save:
        data = {title: [dataclasses.asdict(timing) for timing in timings] for title, timings in sections.items()}
        print("written to", harness.save("cpu", {"sections": data, "temporaries": memory}))


if __name__ == "__main__":
    main()
