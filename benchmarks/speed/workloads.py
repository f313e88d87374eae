"""What is timed: the step of one tensor by the operators themselves, and whole optimizers, ours and those of today.

All work on random weights near the levels of the 4-bit codebook, half-way through the annealing, so that both branches
of the constraint are taken. Weights move while they are timed; nothing in a step depends on where they are.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

import askew_cuda as askew
from askew_cuda import backends as kernels
from askew_cuda.checks import Call, Learning
from benchmarks import machine
from benchmarks.speed import harness
from benchmarks.speed.harness import Variant
from benchmarks.speed.peers import authors_eager, binary_relax_eager, installed, straight_through

LR, MOMENTUM, SCALE = 1e-3, 0.9, 0.02
MIDWAY = 0.5  # epsilon, while annealing
COMPILED = "torch.compile of the foreach step"
LEVELS_4BIT = askew.Codebook.uniform(4).levels
CONSTRAINT = {"skew_at": "velocity", "recovery": 0.01, "alpha": None, "max_step": 0.5, "clip": True}
SGD = {"momentum": MOMENTUM, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
ADAMW = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False, "maximize": False}
STATES = {"sgd": 1, "adamw": 2}


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def backends(device: torch.device, dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
    """The compiled backends of a device, the one that "auto" takes first.

    Those that are absent come second, each with the reason.
    """
    names = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    absent = {f"askew {name}": kernels.absent(name, device, dtype) for name in names}
    return [name for name in names if not absent[f"askew {name}"]], {name: why for name, why in absent.items() if why}


def parameter(size: int, device: torch.device, seed: int = 0, columns: int = 1) -> nn.Parameter:
    """A float32 weight (size,) or (size / columns, columns) with its gradient."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (size,) if columns == 1 else (size // columns, columns)
    made = nn.Parameter(torch.randn(shape, generator=generator, device=device) * 0.05)
    made.grad = torch.randn(shape, generator=generator, device=device) * 0.01
    return made


@dataclasses.dataclass
class Tensors:
    """One weight with all that a step of ``rule`` needs."""

    rule: str
    size: int
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(0)

        def random(std: float) -> Tensor:
            return (torch.randn(self.size, generator=generator, device=self.device) * std).to(self.dtype)

        self.weight, self.grad = random(0.05), random(0.01)
        self.states = [random(0.01).abs_() for _ in range(STATES[self.rule])]
        self.counter = [torch.tensor(10.0)]
        self.counted = [torch.tensor(11.0, device=self.device)]  # torch's kernel is told the number of this step
        self.source = self.weight.new_empty(self.moved // (2 * self.dtype.itemsize)).uniform_(
            -1, 1, generator=generator
        )
        self.target = torch.zeros_like(self.source)

    @property
    def moved(self) -> int:
        """Bytes that a fused step reads and writes: weight and state both ways, the gradient one way."""
        return (3 + 2 * STATES[self.rule]) * self.dtype.itemsize * self.size

    def copy(self) -> Variant:
        """Of a tensor so large that it moves as many bytes as the step."""
        return Variant(lambda: self.target.copy_(self.source), 2 * self.source.nbytes)

    def negation(self) -> Variant:
        return Variant(self.target.neg_, 2 * self.target.nbytes)

    def torch_fused(self) -> Variant:
        weight, grad, *states = ([each] for each in (self.weight, self.grad, *self.states))
        common = {"lr": LR, "grad_scale": None, "found_inf": None}
        if self.rule == "sgd":
            return Variant(
                lambda: torch._fused_sgd_(weight, grad, *states, is_first_step=False, **SGD, **common), self.moved
            )
        return Variant(
            lambda: torch._fused_adamw_(weight, grad, *states, [], self.counted, **ADAMW, **common), self.moved
        )

    def torch_foreach(self) -> Variant:
        weight, grad, *states = ([each] for each in (self.weight, self.grad, *self.states))
        if self.rule == "sgd":  # momentum times, plus the gradient, weight plus: 2 + 3 + 3 tensors
            moved = 8 * self.dtype.itemsize * self.size
            return Variant(lambda: sgd(weight, grad, *states, lr=LR, foreach=True, **SGD), moved)
        return Variant(lambda: adamw(weight, grad, *states, [], self.counter, lr=LR, foreach=True, **ADAMW))

    def ours(
        self,
        backend: str,
        levels: tuple[float, ...] = LEVELS_4BIT,
        anneal: str = "capture",
        granularity: int | None = None,
        codes: bool = False,
        snapped: torch.dtype | None = None,
        learns: bool = False,
    ) -> Variant:
        """``granularity``: weights under one scale; None: all of them. ``learns``: the scales do."""
        groups = 1 if granularity is None else self.size // granularity
        scale = torch.full(
            (groups,), SCALE, dtype=torch.float64 if self.dtype == torch.float64 else torch.float32, device=self.device
        )
        weight, grad, *states = ([each] for each in (self.weight, self.grad, *self.states))
        scales = [scale.view(()) if granularity is None else scale.view(groups, 1)] if levels else []
        if granularity is not None:  # scales are per row
            weight, grad, *states = ([each[0].view(groups, granularity)] for each in (weight, grad, *states))
        outputs = [
            [torch.empty_like(weight[0], dtype=dtype)] if wanted else []
            for wanted, dtype in ((codes, torch.uint8), (snapped is not None, snapped))
        ]
        more = (codes + (snapped.itemsize if snapped else 0)) * self.size + scale.nbytes
        settings = {"lr": LR, "epsilon": MIDWAY, "anneal": anneal, **CONSTRAINT}
        operators = kernels.operators(backend)
        if self.rule == "sgd":
            name, operator, lists = "sgd_", operators.sgd_, (weight, grad, *states, scales, list(levels), *outputs)
            settings |= SGD
        else:
            lists = (weight, grad, *states, [], self.counter, scales, list(levels), *outputs)
            name, operator = "adamw_", operators.adamw_
            settings |= ADAMW
        if not learns:
            return Variant(lambda: operator(*lists, **settings), self.moved + more)
        settings["growths"] = [torch.ones_like(each) for each in scales]
        settings["sums"] = [scale.new_zeros(len(states) + 1, groups, dtype=torch.float64)]
        learning = Learning([torch.zeros_like(each) for each in scales], [self.size // groups], 0.1)
        learn = kernels.ready_to_learn(backend, Call.of(name, *lists, **settings), learning)

        def run() -> None:
            operator(*lists, **settings)
            learn()

        return Variant(run, self.moved + more)


Step = Callable[[], object]
Maker = Callable[[list[nn.Parameter]], Step]
Made = TypeVar("Made")


def optimizers() -> dict[str, Maker]:
    """SGD with momentum: torch's, ours and those of today, each from its parameters to its step."""
    base = {"lr": LR, "momentum": MOMENTUM}
    ours = {"quantizer": askew.Quantizer("4bit", scale=SCALE), "epsilon": MIDWAY, "recovery": 0.01}

    def step_of(make) -> Maker:
        return lambda parameters: make(parameters).step

    def compiled(parameters: list[nn.Parameter]) -> Step:
        torch._dynamo.reset()  # else the ninth one in a process would not be compiled any more
        return torch.compile(torch.optim.SGD(parameters, foreach=True, **base).step)

    def straight(parameters: list[nn.Parameter]) -> Step:
        return straight_through.make_step(parameters, SCALE, torch.optim.SGD(parameters, fused=True, **base))

    def relaxed(parameters: list[nn.Parameter]) -> Step:
        kept = [(each.data, each.grad, *binary_relax_eager.first_state(each)) for each in parameters]
        return lambda: [binary_relax_eager.step(*each, SCALE, strength=1.0, **base) for each in kept]

    def eager(parameters: list[nn.Parameter]) -> Step:
        kept = [(each.data, each.grad, torch.zeros_like(each.data)) for each in parameters]
        return lambda: [authors_eager.step(*each, SCALE, epsilon=MIDWAY / 16, alpha=1.0, **base) for each in kept]

    return {
        "torch SGD(fused=True)": step_of(lambda p: torch.optim.SGD(p, fused=True, **base)),
        "torch SGD(foreach=True)": step_of(lambda p: torch.optim.SGD(p, foreach=True, **base)),
        "torch SGD(foreach=False)": step_of(lambda p: torch.optim.SGD(p, foreach=False, **base)),
        COMPILED: compiled,
        "AskewSGD unquantized": step_of(lambda p: askew.AskewSGD(p, **base)),
        "AskewSGD 4 bit": step_of(lambda p: askew.AskewSGD(p, **base, **ours)),
        "AskewSGD 4 bit, codes": step_of(lambda p: askew.AskewSGD(p, outputs=("codes",), **base, **ours)),
        "AskewSGD 4 bit, backend reference": step_of(lambda p: askew.AskewSGD(p, backend="reference", **base, **ours)),
        "STE, fake-quantize + fused SGD": straight,
        "BinaryRelax, eager": relaxed,
        "torchao PARQ 4 bit, fused base": step_of(lambda p: installed.parq(p, **base)),
        "authors' eager formula": eager,
        "bitsandbytes SGD, 32-bit state": step_of(lambda p: installed.bitsandbytes(p, "SGD", 32, **base)),
        "bitsandbytes SGD, 8-bit state": step_of(lambda p: installed.bitsandbytes(p, "SGD", 8, **base)),
        "FlashSGD, 8-bit state": step_of(lambda p: installed.flashoptim(p, **base)),
        "FlashSGD, unfused, full state": step_of(lambda p: installed.flashoptim_unfused(p, **base)),
    }


def attempt(name: str, make: Callable[[], Made]) -> tuple[Made | None, str]:
    """What ``make`` makes and "", or None and why a peer can't take part on this machine. Ours have to."""
    try:
        return make(), ""
    except Exception as reason:  # packages have many ways to refuse
        if name.startswith("Askew"):
            raise
        return None, str(reason) or type(reason).__name__


def build(
    makers: dict[str, Maker], parameters: Callable[[], list[nn.Parameter]]
) -> tuple[dict[str, Variant], dict[str, str]]:
    """Every optimizer on parameters of its own, after two steps; peers that can't take part with the reason."""
    variants, absent = {}, {}
    for name, make in makers.items():

        def after_two_steps(make: Maker = make) -> Step:
            step = make(parameters())
            step()
            step()
            return step

        step, why = attempt(name, after_two_steps)
        if step is None:
            absent[name] = why
        else:
            variants[name] = Variant(step)
    return variants, absent


def launches_of_each(variants: dict[str, Variant], device: torch.device) -> dict[str, int]:
    """harness.launches() of each, but for compiled steps, which counting would trace anew."""
    return {name: harness.launches(variant.run, device) for name, variant in variants.items() if name != COMPILED}


def threads_to_try() -> list[int]:
    """One, and all cores."""
    return sorted({1, machine.cores()})
