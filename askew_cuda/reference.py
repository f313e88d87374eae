"""START HERE. The method, first in words, then in PyTorch: the specification that every backend is held to, bit for
bit.

A network is to end with every weight on one of the values ``scale * level``, for a few sorted ``levels`` (the
codebook). There is no straight-through estimator, no latent copy and no projection: the trained weight itself is
steered. A feasible set, intervals around the levels, shrinks from everything to the levels alone while training goes
on; a weight outside of it has its displacement *skewed* towards its level. The forward pass always uses the trained
weights.

Around a weight ``w`` lie two levels. ``r_h`` is half their distance (weight units), ``q`` the nearer one, ``e = q -
w``, ``delta = |e| / r_h`` (0 on a level, 1 half-way), ``t`` the position with -1 and +1 on the two levels. ``d`` is the
displacement, in weight units, that the base rule asks for. ``epsilon`` in [0, 1] is the annealed number, 1 free, 0
levels only.

(E1)  constraint       h(t) = epsilon - (t^2 - 1)^2 >= 0, which is v <= root; v = |t^2 - 1| = delta (2 - s delta) with
                       s = 1 inside the codebook and -1 outside of it, root = sqrt(epsilon). That is delta <= r inside
                       and delta <= r_out outside; r = root / (1 + sqrt(1 - root)), r_out = root / (1 + sqrt(1 + root))
(E2)  pull, interval   P = a r_h/4 (v - root) (v + root) / (v |t|), towards q: the displacement at which h heals at the
                       rate a
(E3)  skew, interval   feasible, or t = 0: d. Else d where it heals at least as fast as P, else P, at most max_step r_h
(E2') pull, capture    P = min(min(a, 1) |e|, max_step r_h); |e| itself from |e| <= snap r_h on, so that it ends exactly
                       on the level: snap = 2^-16, or more where the storage would round a smaller move away
(E3') skew, capture    D = 1 - r. Captured when delta < D, or D = 1: towards q by P, or as fast as d when d goes there,
                       never past it. Else d
(E4)  base rule        SGD (momentum, dampening, nesterov, weight decay) or AdamW, by torch's formulas
(E5)  move             w + d, kept within the outermost levels (``clip``)
(E6)  code             index of the level nearest to the new weight; a tie goes to the lower one, NaN to 0. The snapped
                       weight is that level; NaN of NaN, so that a network that diverged does not look well
(E7)  scale            while all are free (epsilon = 1), a scale s may learn. With the codes held, dL / d log s is the
                       radial part of the gradient, sum(g w): G = sum(g w) / sum(w^2) over the weights of the scale, as
                       they are when the gradient is taken; AdamW divides it by the root of the mean of its corrected
                       second moments. v = momentum v + (1 - dampening) G, in AdamW with beta1 for both;
                       x = scale_lr lr v, within +-0.05; growth f = (2 - x) / (2 + x), which is exp(-x) to a part in
                       100,000. The next step begins with w f and s f, which moves no code. From the first step with
                       epsilon < 1 on, f = 1 for good

``interval`` is the paper's annealing: Leconte, Schechtman, Moulines, "ASkewSGD: an annealed interval-constrained
optimisation method to train quantized neural networks", AISTATS 2023, with the velocity constraint of Muehlebach &
Jordan, "On constraints in first-order optimization", JMLR 23, 2022. ``capture`` is ours: the dual set, which pins the
confident weights first and leaves the uncertain ones free to go on choosing; freezing the confident first has been
done, with a straight-through estimator, by INQ (2017), OFQ's confidence-guided annealing (ICML 2023) and StoMPP (2026).
(E7) is ours, too: no constant box serves one network and the next. It takes the gradient apart as weight normalisation
does (Salimans, Kingma, NIPS 2016); LSQ (ICLR 2020) learns a scale by the gradient at the snapped weights instead.

One arithmetic. Every operation rounds once, in the order written here, in float64 for float64 weights and in float32
for all others; 16-bit storage is widened on load and rounded to nearest even on store. Scalars are rounded to that type
first, as torch does with a Python number that meets a tensor. So nothing below uses ``addcmul``, ``lerp``,
``add(alpha=)`` or a division by a Python number, which round otherwise, and selects are written so that a NaN gets
through. ``csrc/maths/step.h`` states the same operations in the same order. What a scale learns by (E7) is summed in
the order of :mod:`askew_cuda.summation`, computed in float64 and rounded to the scale's type at its end.

All of it can be traced: ``torch.compile(sgd_, fullgraph=True)`` makes one graph of a step. Python branches on flags and
on Python numbers, which become part of the graph; a number that comes in a tensor may change without a new one, since
it is not read by Python, but selected on by ``torch.where``. (Steps are read in eager mode: see ``bias_corrections``.)
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import summation
from .rounding import Number, Storage

MAX_GROWTH = 0.05  # (E7): of the logarithm of a scale, in a step
Tensors = Sequence[Tensor]


class Settings(NamedTuple):
    """The scalars of a step, as they are given. A rule's own have defaults, since the other rule's calls lack them."""

    lr: Number  # learning rate, >= 0; 0 moves no weight
    weight_decay: float  # >= 0; of AdamW the decoupled one
    maximize: bool  # go up the gradient
    epsilon: Number  # the annealed number, in [0, 1]: 1 free, 0 levels only
    anneal: str  # "capture" or "interval"
    skew_at: str  # "velocity": the displacement is skewed; "gradient": the gradient (interval and alpha only)
    recovery: float | None  # a of (E2), (E2'): share of the violation, or distance, healed per step, > 0; or None
    alpha: float | None  # where there is no recovery: the paper's rate per unit of lr, a = lr alpha, > 0
    max_step: float  # cap on the pull, in units of r_h, > 0
    clip: bool  # no weight leaves the outermost levels
    grad_scale: Number | None = None  # what AMP multiplied the gradients by, > 0; None: 1
    # SGD
    momentum: float = 0.0  # share of the buffer that a step keeps, in [0, 1]
    dampening: float = 0.0  # share of the gradient that the buffer does not take, in [0, 1]
    nesterov: bool = False  # look one step of the buffer ahead
    # AdamW
    beta1: float = 0.0  # share of the first moment that a step keeps, in [0, 1)
    beta2: float = 0.0  # the same of the second
    eps: float = 0.0  # Adam's, beside the root of the second moment, >= 0; not epsilon
    amsgrad: bool = False  # divide by the largest second moment so far


class Now(NamedTuple):
    """What follows from the settings: 0-d tensors of the arithmetic type, each rounded once."""

    lr: Tensor
    grad_factor: Tensor  # 1 / grad_scale, negated to maximize
    root: Tensor  # (E1)
    capture_radius: Tensor  # (E3'): D in units of r_h, infinity once it is 1
    rate: Tensor  # a of (E2), (E2')
    max_step: Tensor  # in units of r_h
    snap: Tensor  # (E2'), in units of r_h


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The type that a step on weights of ``dtype`` is computed in, and its scales are stored in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounded(x: Number, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a 0-d tensor of that type; of any type before, it is rounded once."""
    if isinstance(x, Tensor):
        return x.reshape(()).to(device, dtype)
    return torch.tensor(x, dtype=dtype, device=device)


def with_double(x: Tensor) -> Tensor:
    """The tensor where there is float64: on the CPU, if its own device has none. No other place knows which have."""
    return x.cpu() if x.device.type == "mps" else x


def in_double(x: Number) -> Number:
    """A number to compute with in double; of a tensor on the CPU, since some devices can't."""
    return x.cpu().double() if isinstance(x, Tensor) else x


def sqrt(x: Tensor) -> Tensor:
    """The correctly rounded root of x >= 0. torch's own is not, on a CPU (MKL's vector library): float32 goes by way of
    float64, which is exact (53 >= 2 * 24 + 2 bits), float64 by way of complex numbers, whose root is the C
    library's.
    """
    if x.device.type != "cpu":
        return x.sqrt()
    if x.dtype == torch.float64:
        return torch.complex(x, torch.zeros_like(x)).sqrt().real
    return x.double().sqrt().to(x.dtype)


def half_widths(epsilon: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(E1): r, r_out and sqrt(epsilon), for a tensor ``epsilon`` in [0, 1], in its dtype."""
    root = sqrt(epsilon)
    return root / (1 + sqrt(1 - root)), root / (1 + sqrt(1 + root)), root


def is_scale_shape(scale: Sequence[int], weight: Sequence[int]) -> bool:
    """Whether a scale of this shape belongs to weights of that shape: see :func:`spread`."""
    if math.prod(scale) == 1 or math.prod(weight) == 0:
        return True
    if len(scale) == len(weight):
        return all(count > 0 and size % count == 0 for count, size in zip(scale, weight, strict=True))
    rows = len(scale) == 2 < len(weight) and scale[0] == weight[0] and scale[1] > 0
    return rows and math.prod(weight[1:]) % scale[1] == 0


def spread(scale: Tensor, weight: Tensor) -> Tensor:
    """A scale, broadcastable to the weight, in logical order.

    Args:
        scale: of one element; or with as many dimensions as the weight, each of which is 1, the weight's, or a divisor
            of it, which many consecutive indices then share; or (rows, groups) for a weight (rows, ..) of three or more
            dimensions, whose rows are flattened.
        weight: (...).

    Raises: ValueError: the scale has another shape.

    >>> spread(torch.tensor([[1.0], [2.0]]), torch.empty(4, 1)).flatten().tolist()
    [1.0, 1.0, 2.0, 2.0]
    """
    if weight.numel() == 0:
        return scale.new_ones(())  # scales of nothing may not broadcast
    if scale.numel() == 1:
        return scale.reshape(())
    if not is_scale_shape(scale.shape, weight.shape):
        raise ValueError(
            f"a scale of shape {tuple(scale.shape)} does not belong to a weight of shape {tuple(weight.shape)}; in "
            "each dimension 1, the weight's size or a divisor of it is needed, or (rows, groups)"
        )
    if scale.dim() != weight.dim():
        return scale.reshape(-1, 1).expand(-1, weight.numel() // scale.numel()).reshape(weight.shape)
    if all(count in (1, size) for count, size in zip(scale.shape, weight.shape, strict=True)):
        return scale
    each = [length for count in scale.shape for length in (count, 1)]
    runs = [length for count, size in zip(scale.shape, weight.shape, strict=True) for length in (count, size // count)]
    return scale.reshape(each).expand(runs).reshape(weight.shape)


def blocks(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """The weights of each scale, (scales, weights), in logical order; the inverse of :func:`spread`.

    Args:
        weight: (...).
        shape: of its scale.

    >>> blocks(torch.arange(6).reshape(2, 3), (1, 3)).tolist()
    [[0, 3], [1, 4], [2, 5]]
    """
    if weight.numel() == 0:
        return weight.reshape(math.prod(shape), 0)
    if len(shape) != weight.dim():
        return weight.reshape(math.prod(shape), -1)
    runs = [length for count, size in zip(shape, weight.shape, strict=True) for length in (count, size // count)]
    order = [*range(0, len(runs), 2), *range(1, len(runs), 2)]
    return weight.reshape(runs).permute(order).reshape(math.prod(shape), -1)


class UniformCodebook:
    """Levels (first + k) unit, k = 0 .. top, the unit a power of two: the nearest one by rounding. u is in these
    units.
    """

    def __init__(self, levels: Sequence[float], like: Tensor):
        unit = levels[1] - levels[0]
        self.unit, self.first, self.top = (like.new_tensor(x) for x in (unit, levels[0] / unit, len(levels) - 1))
        self.lowest, self.highest = self.first, self.first + self.top

    @staticmethod
    def fits(levels: Sequence[float]) -> bool:
        """Whether arithmetic reproduces the levels exactly: their distance is a power of two, and they are multiples of
        half of it.
        """
        unit = levels[1] - levels[0]
        first = levels[0] / unit
        power = math.frexp(unit)[0] == 0.5 and abs(first) <= 65536 and math.floor(2 * first) == 2 * first
        return power and all((first + k) * unit == level for k, level in enumerate(levels))

    def nearest(self, u: Tensor) -> Tensor:
        x = u + (-self.first - 0.5)
        x = torch.where(x > 0, x, 0)
        x = torch.where(x < self.top, x, self.top)
        return x.ceil()

    def level(self, index: Tensor) -> Tensor:
        return index + self.first

    def gap(self, index: Tensor, e: Tensor) -> Tensor:
        return torch.full_like(index, 0.5)

    def inverse_gap(self, index: Tensor, e: Tensor) -> Tensor:
        return torch.full_like(index, 2)


class TableCodebook:
    """Any sorted levels; the unit is 1."""

    def __init__(self, levels: Sequence[float], like: Tensor):
        self.levels = like.new_tensor(levels)
        self.midpoints = (self.levels[:-1] + self.levels[1:]) * 0.5
        gaps = (self.levels[1:] - self.levels[:-1]) * 0.5
        # To the neighbour on either side; at the ends, to the only one.
        self.below, self.above = torch.cat((gaps[:1], gaps)), torch.cat((gaps, gaps[-1:]))
        self.unit, self.lowest, self.highest = torch.ones_like(self.levels[0]), self.levels[0], self.levels[-1]

    def nearest(self, u: Tensor) -> Tensor:
        index = torch.bucketize(u.contiguous(), self.midpoints)  # how many midpoints lie below; all, of a NaN
        return torch.where(u.isnan(), 0, index).to(u.dtype)

    def level(self, index: Tensor) -> Tensor:
        return self.levels[index.long()]

    def gap(self, index: Tensor, e: Tensor) -> Tensor:
        return torch.where(e < 0, self.above[index.long()], self.below[index.long()])

    def inverse_gap(self, index: Tensor, e: Tensor) -> Tensor:
        return torch.where(e < 0, self.above.reciprocal()[index.long()], self.below.reciprocal()[index.long()])


AnyCodebook = UniformCodebook | TableCodebook


def codebook(levels: Sequence[float], like: Tensor) -> AnyCodebook:
    """The levels in the dtype and on the device of ``like``. (K,) strictly increasing float32 numbers, 2 <= K <=
    256.
    """
    return (UniformCodebook if UniformCodebook.fits(levels) else TableCodebook)(levels, like)


class Grid(NamedTuple):
    """What all weights under one scale share."""

    scale: Tensor  # weight units per level unit, broadcastable to the weight
    unit: Tensor  # weight units per unit of the codebook
    book: AnyCodebook


def make_grid(scale: Tensor, w: Tensor, book: AnyCodebook) -> Grid:
    scale = spread(scale, w)
    return Grid(scale, scale * book.unit, book)


class Place(NamedTuple):
    """A weight among its levels."""

    code: Tensor  # index of the nearest level
    level: Tensor  # its value, units of the codebook
    e: Tensor  # signed distance to it, q - w; weight units
    gap: Tensor  # half the distance between the two levels around the weight, units of the codebook
    half: Tensor  # the same in weight units: r_h


def locate(w: Tensor, unit: Tensor, book: AnyCodebook) -> Place:
    code = book.nearest(w * unit.reciprocal())
    level = book.level(code)
    e = unit * level - w
    gap = book.gap(code, e)
    return Place(code, level, e, gap, unit * gap)


def flip(x: Tensor, sign: Tensor) -> Tensor:
    """x with its sign turned where ``sign`` is negative."""
    return torch.where(torch.signbit(sign), -x, x)


def skew_capture(d: Tensor, w: Tensor, unit: Tensor, book: AnyCodebook, now: Now) -> Tensor:
    """(E2'), (E3'): the displacement of a weight under capture annealing."""
    at = locate(w, unit, book)
    distance = at.e.abs()
    cap = now.max_step * at.half
    pull = now.rate * distance
    pull = torch.where(pull < cap, pull, cap)
    pull = torch.where(distance <= now.snap * at.half, distance, pull)
    toward = flip(d, at.e)
    wanted = torch.where(toward > distance, distance, toward)
    move = torch.where(pull > wanted, pull, wanted)
    return torch.where(distance < now.capture_radius * at.half, flip(move, at.e), d)


def skew_interval(d: Tensor, w: Tensor, unit: Tensor, book: AnyCodebook, now: Now) -> Tensor:
    """(E2), (E3): the displacement of a weight under the paper's interval annealing."""
    at = locate(w, unit, book)
    distance = at.e.abs()
    inwards = torch.where(w < unit * book.lowest, -distance, distance)  # outside of the codebook it is negative
    inwards = torch.where(w > unit * book.highest, -distance, inwards)
    from_middle = at.half - inwards
    per_half = unit.reciprocal() * book.inverse_gap(at.code, at.e)
    delta = inwards * per_half
    well = delta.abs() * (2 - delta)
    pull = 0.25 * now.rate * at.half * (well - now.root) * (well + now.root) / (well * (from_middle * per_half))
    pull = torch.where(well > now.root, pull, -math.inf)
    pull = torch.where(from_middle > 0, pull, -math.inf)
    cap = now.max_step * at.half
    return torch.where(flip(d, at.e) < pull, flip(torch.where(pull < cap, pull, cap), at.e), d)


def radial_sums(g: Tensor, w: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """(E7): sum(g w) and sum(w^2) over the weights of each scale, (scales,) float64; without those that are not finite,
    or whose gradient is not.

    Args: g, w: (...). shape: of the weight's scale.
    """
    g, w = with_double(g), with_double(w)
    finite = g.isfinite() & w.isfinite()
    g, w = torch.where(finite, g, 0), torch.where(finite, w, 0)
    return [summation.total(blocks(terms, shape)) for terms in (g * w, w * w)]


def grow(w: Tensor, scale: Tensor, growth: Tensor) -> tuple[Tensor, Tensor]:
    """(E7): the weight and its scale as a step begins with them."""
    return w * spread(growth, w), scale * growth


def derive(s: Settings, levels: Sequence[float], dtype: torch.dtype, device: torch.device) -> Now:
    """The numbers of a step of weights that are as exact as ``dtype``."""

    def scalar(x: Number) -> Tensor:
        return rounded(x, arithmetic(dtype), device)

    share: Number = s.recovery or s.alpha or 0.0  # one of them is given
    lr, rate, max_step = scalar(s.lr), scalar(share), scalar(s.max_step)
    if s.skew_at == "gradient":
        max_step = max_step / lr  # the gradient is skewed per unit of lr
    elif s.alpha is not None:
        rate, share = lr * rate, in_double(s.lr) * s.alpha
    if s.anneal == "capture":
        rate = torch.where(rate < 1, rate, 1)
    half_width, _, root = half_widths(scalar(s.epsilon))
    return Now(
        lr=lr,
        grad_factor=(-1 if s.maximize else 1) * scalar(1.0 if s.grad_scale is None else s.grad_scale).reciprocal(),
        root=root,
        capture_radius=torch.where(1 - half_width < 1, 1 - half_width, math.inf),
        rate=rate,
        max_step=max_step,
        snap=scalar(snap_radius(dtype, levels, share)),
    )


def snap_radius(dtype: torch.dtype, levels: Sequence[float], rate: Number) -> Number:
    """(E2'): the distance, in units of r_h, from which on a pull goes all the way: 2^-16, or where half a unit in the
    last place of the largest level is more than the pull, which would leave the weight a last bit short of its level
    for ever. ``rate`` is a float or in float64; where it is 0, nothing moves.
    """
    if not levels:
        return 2.0**-16
    gap = min(upper - lower for lower, upper in itertools.pairwise(levels))
    largest = max(abs(levels[0]), abs(levels[-1]))
    last_bit = torch.finfo(dtype).eps * largest / gap
    if isinstance(rate, Tensor):
        return (torch.full_like(rate, last_bit) / rate.clamp(max=1)).clamp(min=2.0**-16)
    return max(2.0**-16, last_bit / min(rate, 1)) if rate else 2.0**-16


def gradient(g: Tensor, w: Tensor, grid: Grid | None, s: Settings, now: Now) -> Tensor:
    """The gradient as the base rule takes it: without AMP's factor, to be descended, and skewed where that is wanted of
    it.
    """
    g = g * now.grad_factor
    if grid is None or s.skew_at != "gradient":
        return g
    return torch.where(now.lr != 0, -skew(-g, w, grid, s, now), g)


def skew(d: Tensor, w: Tensor, grid: Grid, s: Settings, now: Now) -> Tensor:
    """(E3) or (E3')."""
    return (skew_capture if s.anneal == "capture" else skew_interval)(d, w, grid.unit, grid.book, now)


def sgd_displacement(
    g: Tensor, w: Tensor, buffer: Tensor | None, s: Settings, now: Now
) -> tuple[Tensor, Tensor | None]:
    """(E4), SGD: the displacement and the new momentum buffer."""
    if s.weight_decay != 0:
        g = g + s.weight_decay * w
    if buffer is not None and s.momentum != 0:
        buffer = s.momentum * buffer + (1 - s.dampening) * g
        g = g + s.momentum * buffer if s.nesterov else buffer
    return -now.lr * g, buffer


def adamw_displacement(
    g: Tensor, w: Tensor, mean: Tensor, square: Tensor, largest: Tensor | None, step: Tensor, s: Settings, now: Now
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(E4), AdamW: the displacement and the new moments. ``step`` counts the steps so far."""
    mean = s.beta1 * mean + (1 - s.beta1) * g
    square = s.beta2 * square + (1 - s.beta2) * (g * g)
    if largest is not None:
        largest = torch.where(largest > square, largest, square)
    first, second = (rounded(x, w.dtype, w.device) for x in bias_corrections(step, s.beta1, s.beta2))
    direction = (mean * first) / (sqrt(square if largest is None else largest) * second + s.eps)
    return -now.lr * (direction + s.weight_decay * w), mean, square, largest


def second_moments(square: Tensor, step: Tensor, s: Settings, shape: Sequence[int]) -> Tensor:
    """(E7): the sum of the corrected second moments over the weights of each scale, (scales,) float64; without those
    that are not finite. ``square`` (...) is the state after the step, ``step`` the count before it.
    """
    square = with_double(square)
    root = rounded(bias_corrections(step, s.beta1, s.beta2)[1], square.dtype, square.device).double()
    return summation.total(blocks(torch.where(square.isfinite(), square, 0), shape), root * root)


def bias_corrections(step: Tensor, beta1: float, beta2: float) -> tuple[Number, Number]:
    """1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t) of the step after so many, in double."""
    if torch.compiler.is_compiling():  # a trace knows no values; torch's power may be a last bit away from C's
        t = in_double(step) + 1
        return 1 / (1 - beta1**t), 1 / (1 - beta2**t) ** 0.5
    t = float(step) + 1
    return 1 / (1 - beta1**t), 1 / math.sqrt(1 - beta2**t)


def move(w: Tensor, d: Tensor, grid: Grid | None, s: Settings, now: Now) -> Tensor:
    """(E3) and (E5): the new weight."""
    if grid is not None and s.skew_at == "velocity":
        d = skew(d, w, grid, s, now)
    moved = w + d
    if grid is not None and s.clip:
        low, high, live = grid.unit * grid.book.lowest, grid.unit * grid.book.highest, grid.scale > 0
        moved = torch.where((moved < low) & live, low, moved)
        moved = torch.where((moved > high) & live, high, moved)
    return torch.where(now.lr != 0, moved, w)


def write_outputs(
    weight: Tensor, grid: Grid | None, codes: Tensor | None, snapped: Tensor | None, storage: Storage
) -> None:
    """(E6), from what its storage made of the weight: codes and snapped weights where wanted."""
    if grid is None or (codes is None and snapped is None):
        return
    w = weight.to(arithmetic(weight.dtype))
    index = grid.book.nearest(w * grid.unit.reciprocal())
    if codes is not None:
        storage.write(codes, index)
    if snapped is not None:
        storage.write(snapped, torch.where(w.isnan(), w, grid.unit * grid.book.level(index)))


@torch.no_grad()
def sgd_(
    weights: Tensors, grads: Tensors, momentum_buffers: Tensors, scales: Tensors, levels: Sequence[float],
    codes: Tensors, snapped: Tensors, *, found_inf: Number | None = None, remainders: Tensors = (),
    seed: Tensor | int | None = None, streams: Sequence[int] = (), first_elements: Sequence[int] = (),
    growths: Tensors = (), sums: Tensors = (), **settings: Any,
) -> None:  # fmt: skip
    """One askew SGD step of every weight, in place: the reference of the operator ``askew_cuda::sgd_``.

    Args:
        weights: N x (...), float32, float64, bfloat16 or float16, on one device and of one dtype. Mutated.
        grads: N x (...), the weights' dtype, or float32 for 16-bit weights. Never written.
        momentum_buffers: N x (...), the weights' dtype or float32; or empty, when momentum is 0. Mutated.
        scales: N x a shape that :func:`spread` takes, of the arithmetic type, >= 0, weight units per level unit;
            0 leaves the weight unclipped. Empty without levels.
        levels: K strictly increasing float32 numbers, 2 <= K <= 256, level units; or empty: the base rule alone.
        codes: N x (...), uint8, receives the index of each weight's level; or empty.
        snapped: N x (...), any float dtype, receives scale * level; or empty.
        found_inf: float or 0-d tensor; where it is not 0, everything stays as it is. AMP's.
        remainders: N x (...), int16, what rounding takes from 16-bit weights; or empty. Mutated.
        seed: int64, of stochastic rounding of 16-bit weights; or None. streams: N numbers of the weights,
            first_elements: N numbers of their first elements, where they are parts of larger weights; random bits
            depend on these three and the element alone.
        growths: N tensors like the scales, f of (E7): weights and scales are multiplied by them first; or empty.
        sums: N x (2, scales of the weight), float64, with growths: receives sum(g w) and sum(w^2) of (E7), of the
            weights before that, for :func:`learn_scales_`. Mutated.
        settings: the fields of :class:`Settings`, but for AdamW's. A Number may be a 0-d tensor.

    A NaN gradient makes its own weight NaN and no other. Empty tensors are fine.
    """
    s, storage = Settings(**settings), Storage(remainders, seed, streams, first_elements, found_inf)
    if not weights or storage.is_closed:
        return
    now = derive(s, levels, storage.dtype(weights[0]), weights[0].device)
    book = codebook(levels, now.lr) if levels else None
    for i, weight in enumerate(weights):
        w, g = storage.load(i, weight), grads[i].to(arithmetic(weight.dtype))
        scale = scales[i] if scales else None
        if growths:
            storage.write(sums[i], torch.stack(radial_sums(g, w, scales[i].shape)))
            w, scale = grow(w, scales[i], growths[i])
        grid = None if book is None or scale is None else make_grid(scale, w, book)
        buffer = momentum_buffers[i].to(w.dtype) if momentum_buffers else None
        g = gradient(g, w, grid, s, now)
        d, buffer = sgd_displacement(g, w, buffer, s, now)
        if buffer is not None:
            storage.write(momentum_buffers[i], buffer)
        storage.store(i, weight, move(w, d, grid, s, now))
        write_outputs(weight, grid, codes[i] if codes else None, snapped[i] if snapped else None, storage)


@torch.no_grad()
def adamw_(
    weights: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, max_exp_avg_sqs: Tensors, steps: Tensors,
    scales: Tensors, levels: Sequence[float], codes: Tensors, snapped: Tensors, *, found_inf: Number | None = None,
    remainders: Tensors = (), seed: Tensor | int | None = None, streams: Sequence[int] = (),
    first_elements: Sequence[int] = (), growths: Tensors = (), sums: Tensors = (), **settings: Any,
) -> None:  # fmt: skip
    """One askew AdamW step (decoupled weight decay) of every weight, in place: the reference of ``askew_cuda::adamw_``.

    Args:
        exp_avgs, exp_avg_sqs: N x (...), the weights' dtype or float32. Mutated.
        max_exp_avg_sqs: the same with amsgrad, else empty. Mutated.
        steps: N x (), float32 or float64, steps taken so far. Each is increased by one.
        sums: N x (3, scales of the weight); the third receives the sum of the corrected second moments, which the
            direction is divided by the roots of.
        settings: the fields of :class:`Settings`, but for SGD's.

    All others: as in :func:`sgd_`.
    """
    s, storage = Settings(**settings), Storage(remainders, seed, streams, first_elements, found_inf)
    if not weights or storage.is_closed:
        return
    now = derive(s, levels, storage.dtype(weights[0]), weights[0].device)
    book = codebook(levels, now.lr) if levels else None
    for i, weight in enumerate(weights):
        w, g = storage.load(i, weight), grads[i].to(arithmetic(weight.dtype))
        scale = scales[i] if scales else None
        radial = radial_sums(g, w, scales[i].shape) if growths else []
        if growths:
            w, scale = grow(w, scales[i], growths[i])
        grid = None if book is None or scale is None else make_grid(scale, w, book)
        mean, square = exp_avgs[i].to(w.dtype), exp_avg_sqs[i].to(w.dtype)
        largest = max_exp_avg_sqs[i].to(w.dtype) if s.amsgrad else None
        g = gradient(g, w, grid, s, now)
        d, mean, square, largest = adamw_displacement(g, w, mean, square, largest, steps[i], s, now)
        storage.write(exp_avgs[i], mean)
        storage.write(exp_avg_sqs[i], square)
        if largest is not None:
            storage.write(max_exp_avg_sqs[i], largest)
        if growths:
            divisor = (max_exp_avg_sqs if s.amsgrad else exp_avg_sqs)[i]
            radial.append(second_moments(divisor.to(w.dtype), steps[i], s, scales[i].shape))
            storage.write(sums[i], torch.stack(radial))
        storage.write(steps[i], steps[i] + 1)
        storage.store(i, weight, move(w, d, grid, s, now))
        write_outputs(weight, grid, codes[i] if codes else None, snapped[i] if snapped else None, storage)


@torch.no_grad()
def learn_scales_(
    scales: Tensors, velocities: Tensors, growths: Tensors, sums: Tensors, counts: Sequence[int], *, lr: Number,
    epsilon: Number, scale_lr: float, momentum: float, dampening: float, maximize: bool = False,
    grad_scale: Number | None = None, found_inf: Number | None = None,
) -> None:  # fmt: skip
    """(E7), what follows from the sums of a step: scales take over the growth that it began with, and get the next one.
    The reference of ``askew_cuda::learn_scales_``.

    Args:
        scales: N tensors, float32 or float64, as the step was given them. Mutated.
        velocities: N tensors like the scales, v; infinity: this scale learns no more. Mutated.
        growths: N tensors like the scales, f, as the step was given them. Mutated.
        sums: N x (2 or 3, numel of the scale), float64, as the step left them; three of AdamW's.
        counts: N numbers, weights that share a scale.
        lr, epsilon, maximize, grad_scale, found_inf: those of the step; a Number may be a 0-d tensor.
        scale_lr: learning rate of the scales, a multiple of lr, >= 0.
        momentum, dampening: SGD's; AdamW's beta1 for both.

    Computed in float64, whatever the scales are in. A scale whose weights are all 0, or whose sums are not finite, has
    G = 0; one that would leave the normal numbers of its dtype does not grow.
    """
    storage = Storage((), None, (), (), found_inf)
    if not scales or storage.is_closed:
        return
    device = sums[0].device
    rate, number, amplified = (
        rounded(each, torch.float64, device) for each in (lr, epsilon, 1.0 if grad_scale is None else grad_scale)
    )
    rate = scale_lr * rate
    factor = (-1 if maximize else 1) / amplified
    for scale, velocity, growth, radial, count in zip(scales, velocities, growths, sums, counts, strict=True):
        part = factor * radial[0] / radial[1]
        if len(radial) == 3:
            part = part / sqrt(radial[2] / count)
        part = torch.where(part.isfinite(), part, 0).reshape(scale.shape)
        before = velocity.to(device).double()
        v = momentum * before + (1 - dampening) * part
        x = rate * v
        x = torch.where(x > MAX_GROWTH, MAX_GROWTH, torch.where(x < -MAX_GROWTH, -MAX_GROWTH, x))
        f, taken = (2 - x) / (2 + x), scale * growth
        after, limits = taken.to(device).double() * f, torch.finfo(scale.dtype)
        over = (number < 1) | before.isinf()
        storage.write(growth, torch.where((after >= limits.tiny) & (after <= limits.max) & ~over, f, 1))
        storage.write(velocity, torch.where(over, math.inf, v))
        storage.write(scale, taken)
