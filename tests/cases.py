"""One table of cases for all backends. A case is plain data; tensors are built afresh, from its own seed, at each run.

The table is a covering selection: every pair of values of two factors occurs together in some case, and so does every
triple of the factors in TRIPLES; what can't go together is listed in FORBIDDEN. A new backend is one more entry in
BACKENDS.
"""

import functools
import itertools
import math
import os
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from askew_cuda import reference, rounding
from askew_cuda.checks import Call, check_call
from tests.tensors import Guarded, draw_gradient, draw_weight, guarded, same_layout

# Tests of the compiled operators need them: no extension is an error, unless the build was told to make none.
EXTENSION = None
if os.environ.get("ASKEW_BUILD") != "none":
    from askew_cuda import _C as EXTENSION


def _float32(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(torch.tensor(values, dtype=torch.float32).tolist())


def _nf4() -> tuple[float, ...]:
    positive = (
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
    )
    negative = (
        0.09105003625154495,
        0.18477343022823334,
        0.28444138169288635,
        0.39491748809814453,
        0.5250730514526367,
        0.6961928009986877,
    )
    return (-1.0, *(-x for x in reversed(negative)), 0.0, *positive, 0.7229568362236023, 1.0)


CODEBOOKS: dict[str, tuple[float, ...]] = {
    "none": (),
    "binary": (-1.0, 1.0),
    "ternary": (-1.0, 0.0, 1.0),
    "2bit": (-1.5, -0.5, 0.5, 1.5),
    "4bit": tuple(k - 7.5 for k in range(16)),
    "int4": tuple(float(k) for k in range(-8, 8)),
    "nf4": _nf4(),
    "fp4": (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    "pow2": (-1.0, -0.5, -0.25, -0.125, 0.0, 0.125, 0.25, 0.5, 1.0),
    "8bit": tuple(k - 127.5 for k in range(256)),
    "table17": _float32([math.sinh(k / 4) for k in range(-8, 9)]),  # one level more than a small table holds
    "table256": _float32([math.sinh((k - 127.5) / 64) for k in range(256)]),
    "unit_bit": (0.0, 1.0),
    "thirds": _float32((0.0, 0.3, 0.6)),  # evenly spaced, but not by a power of two
}

_ADAM = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
_SGD = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
RULES: dict[str, dict[str, float | bool]] = {
    "sgd": _SGD,
    "momentum": _SGD | {"momentum": 0.9},
    "nesterov": _SGD | {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "dampening": _SGD | {"momentum": 0.9, "dampening": 0.3},
    "maximize": _SGD | {"maximize": True, "weight_decay": 0.1},
    "adamw": _ADAM | {"weight_decay": 0.01},
    "amsgrad": _ADAM | {"amsgrad": True, "maximize": True, "eps": 1e-3},
}

_RECOVERY = {"skew_at": "velocity", "recovery": 0.5, "alpha": None, "max_step": 0.5}
_ALPHA = {
    "skew_at": "velocity",
    "recovery": None,
    "alpha": 5.0,
    "max_step": 0.25,
}  # lr alpha is above 1 with one of the two lr
ANNEALINGS: dict[str, dict[str, object]] = {
    "capture": {"anneal": "capture"} | _RECOVERY,
    "capture_alpha": {"anneal": "capture"} | _ALPHA,
    "interval": {"anneal": "interval"} | _RECOVERY,
    "interval_alpha": {"anneal": "interval"} | _ALPHA,
    "gradient": {"anneal": "interval"} | _ALPHA | {"skew_at": "gradient", "max_step": math.inf},
}


STATES = ("momentum_buffers", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")


class Case(NamedTuple):
    """What one call of an operator is given."""

    dtype: torch.dtype
    layout: str
    size: int  # weights that share a scale
    rule: str
    codebook: str
    granularity: str
    annealing: str
    epsilon: float
    outputs: tuple[object, ...]  # () | ("codes",) | ("codes", dtype of the snapped weights)
    clip: bool
    wide_state: bool  # float32 state for 16-bit weights
    grad_scale: float | None
    values: str  # "finite", or "hostile": with NaN and infinities
    lr: float
    rounding: str = "nearest"  # of 16-bit weights
    wide_grad: bool = False  # float32 gradients of 16-bit weights
    learns: bool = False  # whether its scales do
    seed: int = 0

    @property
    def levels(self) -> tuple[float, ...]:
        return CODEBOOKS[self.codebook]

    @property
    def is_adamw(self) -> bool:
        return "beta1" in RULES[self.rule]

    @property
    def states(self) -> tuple[str, ...]:
        if not self.is_adamw:
            return STATES[:1]
        return STATES[1:] if RULES[self.rule]["amsgrad"] else STATES[1:3]


# Below, at and above the widths of the vectors and of two of them. The last: two chunks of 2^15 and less than a vector,
# so that of two threads one starts inside the tensor.
SIZES = (0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, (2 << 15) + 7)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FACTORS: dict[str, tuple] = {
    "dtype": DTYPES,
    "layout": ("contiguous", "misaligned", "transposed", "channels_last", "strided", "mixed"),
    "size": SIZES,
    "rule": tuple(RULES),
    "codebook": tuple(CODEBOOKS),
    "granularity": ("tensor", "channel", "group", "column", "column_group"),  # the last two: the output is dimension 1
    "annealing": tuple(ANNEALINGS),
    "epsilon": (0.0, 1e-6, 0.3, 0.96, 1.0),
    "outputs": ((), ("codes",), *(("codes", dtype) for dtype in DTYPES)),
    "clip": (True, False),
    "wide_state": (False, True),
    "grad_scale": (None, 1024.0, 3.0),
    "values": ("finite", "hostile"),
    "lr": (0.25, 0.037),
    "rounding": ("nearest", "remainder", "stochastic"),
    "wide_grad": (False, True),
}
TRIPLES = (("dtype", "codebook", "annealing"), ("dtype", "rule", "annealing"), ("codebook", "annealing", "epsilon"))
# Pairs of values that can't go together.
FORBIDDEN: tuple[tuple[str, Callable, str, Callable], ...] = (
    ("dtype", lambda dtype: dtype.itemsize > 2, "wide_state", lambda wide: wide),
    ("dtype", lambda dtype: dtype.itemsize > 2, "wide_grad", lambda wide: wide),
    ("dtype", lambda dtype: dtype.itemsize > 2, "rounding", lambda rounding: rounding != "nearest"),
    ("codebook", lambda name: name == "none", "granularity", lambda granularity: granularity != "tensor"),
    ("codebook", lambda name: name == "none", "outputs", lambda outputs: outputs != ()),
)


def required() -> tuple[list[str], list[frozenset]]:
    """The names of the factors, and all that must be covered: each item is a set of (factor, value) indices that have
    to occur together in some case.
    """
    names = list(FACTORS)
    forbidden = set()
    for one, is_one, other, is_other in FORBIDDEN:
        for (i, a), (j, b) in itertools.product(enumerate(FACTORS[one]), enumerate(FACTORS[other])):
            if is_one(a) and is_other(b):
                forbidden.add(frozenset(((names.index(one), i), (names.index(other), j))))
    groups = [*itertools.combinations(names, 2), *TRIPLES]
    wanted = []
    for group in groups:
        axes = [[(names.index(name), k) for k in range(len(FACTORS[name]))] for name in group]
        for choice in itertools.product(*axes):
            pairs = {frozenset(pair) for pair in itertools.combinations(choice, 2)}
            if not pairs & forbidden:
                wanted.append(frozenset(choice))
    return names, wanted


def covering() -> list[Case]:
    """A small set of cases with everything in required(), built greedily; the same at each call."""
    names, wanted = required()
    allowed = {pair for pair in wanted if len(pair) == 2}
    left = dict.fromkeys(wanted)
    holding = {}  # (factor, value) -> what it is part of
    for item in wanted:
        for cell in item:
            holding.setdefault(cell, []).append(item)
    source = random.Random(0)
    cases = []
    while left:
        chosen = set(next(iter(left)))
        fixed = {factor for factor, _ in chosen}
        others = [factor for factor in range(len(names)) if factor not in fixed]
        source.shuffle(others)
        for factor in others:
            best, best_gain = None, -1.0
            for value in range(len(FACTORS[names[factor]])):
                cell = (factor, value)
                if not all(frozenset((cell, other)) in allowed for other in chosen):
                    continue
                now = chosen | {cell}
                # ties are broken by chance
                gain = sum(item in left and item <= now for item in holding[cell]) + source.random() / 2
                if gain > best_gain:
                    best, best_gain = cell, gain
            chosen.add(best)
        for size in (2, 3):
            for item in itertools.combinations(sorted(chosen), size):
                left.pop(frozenset(item), None)
        cases.append(Case(*(FACTORS[names[factor]][value] for factor, value in sorted(chosen)), seed=len(cases)))
    return cases


def case_id(case: Case) -> str:
    """A name that says it all."""

    def short(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    words = [
        short(case.dtype),
        case.layout,
        case.size,
        case.rule,
        case.codebook,
        case.granularity,
        case.annealing,
        f"eps{case.epsilon:g}",
    ]
    words += [name if isinstance(name, str) else short(name) for name in case.outputs]
    words += [
        word
        for word, there in (("noclip", not case.clip), ("wide", case.wide_state), ("hostile", case.values == "hostile"))
        if there
    ]
    words += [f"scaled{case.grad_scale:g}"] if case.grad_scale else []
    words += [case.rounding] if case.rounding != "nearest" else []
    words += [word for word, there in (("float32 gradients", case.wide_grad), ("learns", case.learns)) if there]
    return "-".join(map(str, [*words, f"lr{case.lr:g}", case.seed]))


COVERING = covering()
# A small case without surprises.
PLAIN = Case(
    dtype=torch.float32, layout="contiguous", size=33, rule="momentum", codebook="ternary", granularity="channel",
    annealing="capture",
    epsilon=0.3, outputs=("codes", torch.float32), clip=True, wide_state=False, grad_scale=None, values="finite",
    lr=0.25,
)  # fmt: skip
# lr = 0 moves nothing, the box included, but state and outputs are brought up to date.
STANDING = [
    PLAIN._replace(rule=rule, annealing=annealing, granularity="tensor", lr=0.0, seed=1000 + k)
    for k, (rule, annealing) in enumerate(itertools.product(RULES, ("capture", "interval", "gradient")))
]
# Scales that learn: every second quantized case once more, so that every value of every factor is among them.
LEARNING = [case._replace(learns=True, seed=2000 + case.seed) for case in COVERING if case.levels][::2]
CASES = COVERING + STANDING + LEARNING


def shape_of(case: Case) -> tuple[int, ...]:
    runs = {"tensor": 1, "channel": 3, "group": 6, "column": 3, "column_group": 6}[case.granularity]
    size = case.size if case.size < 1000 else -(-case.size // runs)  # the last size is that of the whole tensor
    if case.layout == "channels_last":
        rows = 6 if case.granularity == "column_group" else 3
        return (rows, size, 1, 2)  # per channel and per group: two weights of each input channel
    if case.granularity == "group":
        return (2, 3 * size)
    if case.granularity == "column_group":
        return (6, size)
    if case.granularity in ("channel", "column") or case.layout in ("transposed", "mixed"):
        return (3, size)
    return (size,)


def draw_scale(case: Case, generator: torch.Generator) -> Tensor:
    """float64 numbers that float32 holds: powers of two, where levels and midpoints are exact, and others; now and then
    a zero.
    """
    shape = shape_of(case)
    if case.granularity == "tensor":
        scale_shape = ()
    elif case.granularity.startswith("column"):
        scale_shape = (1 if case.granularity == "column" else 2, shape[1], *(1 for _ in shape[2:]))
    elif case.granularity == "channel":
        scale_shape = (3, *(1 for _ in shape[1:]))
    else:
        scale_shape = (shape[0], 2 if len(shape) == 4 else 3)
    choices = torch.tensor([0.25, 0.0371, 2.0, 0.5, 1.7, 0.0], dtype=torch.float32).double()
    return choices[torch.randint(0, 5 if scale_shape == () else 6, scale_shape, generator=generator)]


class Drawn(NamedTuple):
    """The values of one tensor of a list of the operator's signature."""

    name: str
    values: Tensor
    layout: str


@functools.lru_cache(maxsize=2)  # all backends take their turn on a case before the next one comes
def draw(case: Case) -> tuple[list[Drawn], list[Tensor]]:
    """All that a case is given, as values: the case's own tensors, empty ones, and small ones; and the scales."""
    generator = torch.Generator().manual_seed(case.seed)
    hostile, drawn, scales = case.values == "hostile", [], []
    for which, shape in enumerate([shape_of(case), (0,), (5,)]):
        layout = case.layout if which == 0 else same_layout(case.layout, len(shape))
        layouts = (
            itertools.cycle(["transposed", "contiguous", "strided", "misaligned"])
            if layout == "mixed"
            else itertools.repeat(layout)
        )
        scale = draw_scale(case if which == 0 else case._replace(granularity="tensor"), generator)
        values = {
            "weights": draw_weight(generator, shape, scale, case.levels, case.dtype, hostile).to(case.dtype),
            "grads": (draw_gradient(generator, shape, hostile) * (case.grad_scale or 1.0)).to(
                torch.float32 if case.wide_grad else case.dtype
            ),
        }
        for name in case.states:
            moment = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3
            values[name] = (moment.square() if name.endswith("sqs") else moment).to(
                torch.float32 if case.wide_state else case.dtype
            )
        if case.rounding == "remainder":  # the weights are those of a float32 training
            values["weights"], values["remainders"] = rounding.split(
                values["weights"].float() * (1 + 2**-12), case.dtype
            )
        if "codes" in case.outputs:
            values["codes"] = torch.full(shape, 77, dtype=torch.uint8)
        if len(case.outputs) > 1:
            values["snapped"] = torch.full(shape, 77, dtype=case.outputs[1])
        drawn += [Drawn(name, value, next(layouts)) for name, value in values.items()]
        scales += [scale.to(reference.arithmetic(case.dtype))] if case.levels else []
    return drawn, scales


class Built(NamedTuple):
    """The tensors of a case: lists by their names in the operator's signature, and the guarded buffers that most of
    them lie in.
    """

    lists: dict[str, list[Tensor]]
    buffers: list[tuple[str, Guarded]]


def build(case: Case, device: str = "cpu") -> Built:
    """Fresh tensors."""
    drawn, scales = draw(case)
    lists = {name: [] for name in ("weights", "grads", *STATES, "steps", "codes", "snapped", "remainders")}
    lists["scales"] = [scale.clone().to(device) for scale in scales]
    lists["growths"], lists["sums"] = [], []
    if case.learns:
        generator, kinds = torch.Generator().manual_seed(case.seed), 3 if case.is_adamw else 2
        for scale in lists["scales"]:  # some stay, some grow, some shrink
            growth = 1 + torch.randint(-1, 2, scale.shape, generator=generator) * 0.05
            lists["growths"].append(growth.to(scale))
            lists["sums"].append(torch.full((kinds, scale.numel()), 77, dtype=torch.float64, device=device))
    buffers = []
    for name, values, layout in drawn:
        buffer = guarded(values, layout, device)
        buffers.append((f"{name}[{len(lists[name])}]", buffer))
        lists[name].append(buffer.view)
    if case.is_adamw:  # torch keeps them in float32, or in float64 where that is the default
        dtype = torch.float64 if case.seed % 2 else torch.float32
        lists["steps"] = [
            torch.tensor(case.seed % 5 * 37 + which, dtype=dtype) for which in range(len(lists["weights"]))
        ]
    return Built(lists, buffers)


class Backend(NamedTuple):
    """Operators with the arguments of askew_cuda.reference, and the device that they work on."""

    sgd_: Callable[..., None]
    adamw_: Callable[..., None]
    device: str = "cpu"


def _compiled(operator: Callable[..., None], capability: str) -> Callable[..., None]:
    """A compiled operator on a given instruction set. Numbers that change from step to step go in as 0-d tensors."""

    def call(*lists, lr, epsilon, grad_scale=None, found_inf=None, **settings) -> None:
        scalars = {"lr": lr, "epsilon": epsilon, "grad_scale": grad_scale, "found_inf": found_inf}
        tensors = {
            key: torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else value
            for key, value in scalars.items()
        }
        at_the_end = [settings.pop(name, ()) for name in ("remainders", "growths", "sums")]
        rounds = {"seed": None, "streams": [], "first_elements": []}
        rounds |= {key: settings.pop(key) for key in rounds if key in settings}
        before = EXTENSION.set_cpu_capability(capability)
        try:
            operator(*lists, *at_the_end, **tensors, **settings, **rounds)
        finally:
            EXTENSION.set_cpu_capability(before)

    return call


CAPABILITIES = EXTENSION.cpu_capabilities() if EXTENSION else ()
REFERENCE = Backend(reference.sgd_, reference.adamw_)
COMPILED = {
    f"cpu-{name}": Backend(_compiled(torch.ops.askew_cuda.sgd_, name), _compiled(torch.ops.askew_cuda.adamw_, name))
    for name in CAPABILITIES
}
BACKENDS = {"reference": REFERENCE, **COMPILED}


def _planned(operator: str) -> Callable[..., None]:
    """The plan of the extension, which the optimizers go through: another way in, not another way to compute."""

    def call(*lists, **settings) -> None:
        given = Call.of(operator, *lists, **settings)
        check_call(given)
        plan = EXTENSION.Plan([(operator, given.arguments())])
        plan.lay_out()
        plan.run()

    return call


PLANNED = {"planned": Backend(_planned("sgd_"), _planned("adamw_"))} if EXTENSION else {}

# Where there is a GPU and the extension has kernels for it.
ON_GPU = torch.cuda.is_available() and EXTENSION is not None and EXTENSION.build_info()["cuda"] is not None
CUDA = {"cuda": COMPILED[f"cpu-{CAPABILITIES[0]}"]._replace(device="cuda")} if ON_GPU else {}


def on_threads(count: int, backend: Backend) -> Backend:
    """The backend on so many threads; what surrounds it stays on one, since two that share a core wait for each
    other.
    """

    def on(operator: Callable[..., None]) -> Callable[..., None]:
        def call(*lists, **settings) -> None:
            before = torch.get_num_threads()
            torch.set_num_threads(count)
            try:
                operator(*lists, **settings)
            finally:
                torch.set_num_threads(before)

        return call

    return backend._replace(sgd_=on(backend.sgd_), adamw_=on(backend.adamw_))


def call(case: Case, lists: dict[str, list[Tensor]], backend: Backend, **changes: object) -> None:
    """One step of the case's tensors."""
    settings = {"lr": case.lr, "epsilon": case.epsilon, "clip": case.clip, "grad_scale": case.grad_scale}
    for name in ("remainders", "growths", "sums"):
        if lists[name]:
            settings[name] = lists[name]
    if case.rounding == "stochastic":  # weights have numbers and are parts of larger ones; one crosses element 2^32
        settings |= {"seed": torch.tensor(case.seed), "streams": [7, 8, 9], "first_elements": [2**32 - 20, 0, 5]}
    settings |= {"levels": case.levels} | RULES[case.rule] | ANNEALINGS[case.annealing] | changes
    operator, names = (backend.adamw_, [*STATES[1:], "steps"]) if case.is_adamw else (backend.sgd_, STATES[:1])
    state = [lists[name] for name in names]
    outputs = (settings.pop("levels"), lists["codes"], lists["snapped"])
    operator(lists["weights"], lists["grads"], *state, lists["scales"], *outputs, **settings)


def run(case: Case, backend: Backend, **changes: object) -> dict[str, Tensor]:
    """Makes one step of fresh tensors. Returns everything mutable, by name, as it is afterwards; fails where anything
    else was written to.
    """
    built = build(case, backend.device)
    before = [(name, buffer.outside().clone(), buffer.view.clone()) for name, buffer in built.buffers]
    call(case, built.lists, backend, **changes)
    after = {f"{name}[{i}]": each.cpu() for name in ("steps", "sums") for i, each in enumerate(built.lists[name])}
    for (name, outside, inside), (_, buffer) in zip(before, built.buffers, strict=True):
        if not torch.equal(buffer.outside(), outside):
            raise AssertionError(f"{case_id(case)}: memory beside {name} was written to")
        if not name.startswith("grads"):
            after[name] = buffer.view.cpu()
        elif not torch.equal(buffer.view.nan_to_num(nan=12345.0), inside.nan_to_num(nan=12345.0)):
            raise AssertionError(f"{case_id(case)}: {name} was written to")
    return after
