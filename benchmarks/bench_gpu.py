"""Is the fused step as fast as the GPU's memory?    python -m benchmarks.bench_gpu [--quick] [--save]

One large tensor, against torch's fused optimizers and the device's own copy rate; 1,000 small tensors, whole optimizers, host time
and launches apart; a replayed graph; the authors' eager formula. Without a GPU it says so and measures nothing.
"""

import argparse
import dataclasses

import torch

import askew_cuda as askew
from askew_cuda import ops
from benchmarks import harness
from benchmarks.peers import authors_eager

LEVELS_4BIT = askew.Codebook.uniform(4).levels
MIDWAY = 0.5  # epsilon, while annealing: both branches of the constraint are taken
CONSTRAINT = {"skew_at": "velocity", "recovery": 0.01, "alpha": None, "max_step": 0.5, "clip": True}
SGD = {"momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
ADAMW = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False, "maximize": False}


def backends() -> dict[str, ops.Operators]:
    """Those that this GPU can run; what is absent is printed with its reason."""
    found = {}
    for name in ("cuda", "triton"):
        reason = ops.absent(name, torch.device("cuda", torch.cuda.current_device()), torch.float32)
        if reason:
            print(f"{name} is absent: {reason}")
        else:
            found[name] = ops.operators(name)
    return found


def random(size: int, count: int, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [[torch.randn(size, generator=generator, device="cuda").mul_(0.01).to(dtype)] for _ in range(count)]


def sgd(size: int, dtype: torch.dtype, rounds: int) -> tuple[list[harness.Timing], dict[str, float]]:
    """The operators, momentum 0.9; bytes per weight of each variant, by count."""
    weight, grad, buffer, target = random(size, 4, dtype)
    item = dtype.itemsize
    codes, snapped = [torch.empty(size, dtype=torch.uint8, device="cuda")], [torch.empty(size, dtype=torch.bfloat16, device="cuda")]
    scale = [torch.tensor(0.002, device="cuda")]
    fused = {"momentum": 0.9, "weight_decay": 0.0, "lr": 1e-3, "dampening": 0.0, "nesterov": False, "maximize": False}
    variants = {
        "torch fused SGD": lambda: torch._fused_sgd_(weight, grad, buffer, is_first_step=False, grad_scale=None, found_inf=None, **fused),
        "copy of one tensor": lambda: target[0].copy_(weight[0]),
    }
    moved = {"torch fused SGD": 5 * item, "copy of one tensor": 2 * item}
    nf4 = askew.Codebook.named("nf4").levels
    for name, operators in backends().items():

        def ours(levels=LEVELS_4BIT, anneal="capture", codes=(), snapped=(), sgd_=operators.sgd_):
            lists = (weight, grad, buffer, scale if levels else [], list(levels), list(codes), list(snapped))
            return lambda: sgd_(*lists, lr=1e-3, epsilon=MIDWAY, anneal=anneal, **SGD, **CONSTRAINT)

        mine = {
            "4 bit, capture": (ours(), 0),
            "unquantized": (ours(levels=()), 0),
            "4 bit, interval": (ours(anneal="interval"), 0),
            "nf4 (table), capture": (ours(levels=nf4), 0),
            "4 bit + codes": (ours(codes=codes), 1),
            "4 bit + codes + bf16 copy": (ours(codes=codes, snapped=snapped), 3),
        }
        variants |= {f"{name} {label}": run for label, (run, _) in mine.items()}
        moved |= {f"{name} {label}": 5 * item + more for label, (_, more) in mine.items()}
    return harness.compare(variants, baseline="torch fused SGD", rounds=rounds, clock=harness.device_clock()), moved


def adamw(size: int, rounds: int) -> tuple[list[harness.Timing], dict[str, float]]:
    """The operators, float32."""
    weight, grad, mean, square, target = random(size, 5, torch.float32)
    square[0].abs_()
    scale, steps = [torch.tensor(0.002, device="cuda")], [torch.tensor(10.0, device="cuda")]
    here = [torch.tensor(10.0)]
    fused = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "eps": 1e-8, "amsgrad": False, "maximize": False}
    variants = {
        "torch fused AdamW": lambda: torch._fused_adamw_(weight, grad, mean, square, [], steps, grad_scale=None, found_inf=None, **fused),
        "copy of one tensor": lambda: target[0].copy_(weight[0]),
    }
    moved = {"torch fused AdamW": 28, "copy of one tensor": 8}
    for name, operators in backends().items():
        for anneal in ("capture", "interval"):
            lists = (weight, grad, mean, square, [], here, scale, LEVELS_4BIT, [], [])
            variants[f"{name} 4 bit, {anneal}"] = lambda lists=lists, anneal=anneal, adamw_=operators.adamw_: adamw_(
                *lists, lr=1e-3, epsilon=MIDWAY, anneal=anneal, **ADAMW, **CONSTRAINT
            )
            moved[f"{name} 4 bit, {anneal}"] = 28
    return harness.compare(variants, baseline="torch fused AdamW", rounds=rounds, clock=harness.device_clock()), moved


def parameters(count: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.nn.Parameter(torch.randn(size, device="cuda") * 0.05) for size in torch.randint(1000, 16001, (count,), generator=generator)
    ]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter) * 0.01
    return made


def small_optimizers(count: int) -> dict[str, torch.optim.Optimizer]:
    keywords = {"quantizer": askew.Quantizer("4bit", scale=0.02), "epsilon": MIDWAY, "recovery": 0.01}
    found = {
        "torch SGD(fused=True)": torch.optim.SGD(parameters(count), lr=1e-3, momentum=0.9, fused=True),
        "torch SGD(foreach=True)": torch.optim.SGD(parameters(count), lr=1e-3, momentum=0.9, foreach=True),
    }
    for name in backends():
        found[f"AskewSGD {name}, 4 bit"] = askew.AskewSGD(parameters(count), lr=1e-3, momentum=0.9, backend=name, **keywords)
    return found


def launches(run) -> int:
    """Kernels of one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def many_small_tensors(count: int, rounds: int) -> tuple[list[harness.Timing], list[harness.Timing], dict[str, int]]:
    """optimizer.step(): host seconds (the queue is empty before and nothing is waited for), device seconds, launches."""
    optimizers = small_optimizers(count)
    for optimizer in optimizers.values():
        optimizer.step()

    def host(run, calls):
        torch.cuda.synchronize()
        return harness.host_seconds(run, calls)

    steps = {name: optimizer.step for name, optimizer in optimizers.items()}
    by_host = harness.compare(steps, baseline="torch SGD(fused=True)", rounds=rounds, clock=host)
    by_device = harness.compare(steps, baseline="torch SGD(fused=True)", rounds=rounds, clock=harness.device_clock())
    return by_host, by_device, {name: launches(step) for name, step in steps.items()}


def replayed_graphs(count: int, rounds: int) -> list[harness.Timing]:
    """The same steps captured and replayed, by the host's clock to the end of the device's work."""
    graphs = {}
    for name, optimizer in small_optimizers(count).items():
        if "AskewSGD" in name:
            for group in optimizer.param_groups:
                group["epsilon"] = torch.tensor(MIDWAY, device="cuda", dtype=torch.float64)
        with torch.cuda.stream(torch.cuda.Stream()):
            optimizer.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        graphs[name] = graph.replay
    return harness.compare(graphs, baseline="torch SGD(fused=True)", rounds=rounds, clock=harness.device_clock())


def eager_formula(size: int, rounds: int) -> list[harness.Timing]:
    """4 bit, momentum 0.9: the authors' formula in PyTorch against our step."""
    weight, grad, buffer = random(size, 3, torch.float32)
    scale = [torch.tensor(0.02, device="cuda")]
    name, operators = next(iter(backends().items()))
    variants = {
        f"{name} 4 bit": lambda: operators.sgd_(
            weight, grad, buffer, scale, LEVELS_4BIT, [], [], lr=1e-3, epsilon=MIDWAY, anneal="capture", **SGD, **CONSTRAINT
        ),
        "authors' eager formula": lambda: authors_eager.step(
            weight[0], grad[0], buffer[0], 0.02, epsilon=MIDWAY / 16, alpha=1.0, lr=1e-3, momentum=0.9
        ),
    }
    return harness.compare(variants, baseline=f"{name} 4 bit", rounds=rounds, clock=harness.device_clock())


def bandwidth(timings: list[harness.Timing], moved: dict[str, float], size: int) -> str:
    """Bytes by count, the rate that follows, and its share of the copy's in the same run."""
    rate = {timing.name: moved[timing.name] * size / timing.seconds[0] for timing in timings}
    width = max(map(len, rate))
    lines = [
        f"{name:{width}}  {moved[name]:4} B  {each / 1e12:6.3f} TB/s  {each / rate['copy of one tensor']:6.1%}"
        for name, each in rate.items()
    ]
    return "\n".join([f"{'':{width}}  per weight        rate  of the copy's", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller tensors and fewer rounds: a look, not a figure")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/gpu.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_gpu: no GPU that torch can use; nothing was measured")
    size, rounds, count = (2**22, 5, 100) if arguments.quick else (2**26, 40, 1000)
    data = {}
    for title, (timings, moved) in {
        f"SGD, {size // 2**20} Mi float32 weights": sgd(size, torch.float32, rounds),
        f"SGD, {size // 2**20} Mi bfloat16 weights": sgd(size, torch.bfloat16, rounds),
        f"AdamW, {size // 2**20} Mi float32 weights": adamw(size, rounds),
    }.items():
        print(harness.table(title, timings), bandwidth(timings, moved, size), sep="\n", end="\n\n")
        data[title] = {"weights": size, "bytes_per_weight": moved, "timings": [dataclasses.asdict(timing) for timing in timings]}
    by_host, by_device, launched = many_small_tensors(count, rounds)
    sections = {
        f"{count} tensors of 1 to 16 thousand weights, optimizer.step(): host time": by_host,
        f"{count} tensors of 1 to 16 thousand weights, optimizer.step(): device time": by_device,
        f"{count} tensors of 1 to 16 thousand weights, a replayed graph": replayed_graphs(count, rounds),
        f"The authors' eager formula, {size // 16 // 2**10} Ki weights": eager_formula(size // 16, 10),
    }
    for title, timings in sections.items():
        print(harness.table(title, timings), end="\n\n")
        data[title] = {"timings": [dataclasses.asdict(timing) for timing in timings]}
    print("kernels of one step:", ", ".join(f"{name} {number}" for name, number in launched.items()))
    if arguments.save:
        print("written to", harness.save("gpu", {"sections": data, "kernels_of_one_step": launched}))


if __name__ == "__main__":
    main()
