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

(E1)  constraint       h(t) = epsilon - (t^2 - 1)^2 >= 0, which is delta <= r inside the codebook and delta <= r_out
                       outside of it; r = root / (1 + sqrt(1 - root)), r_out = root / (1 + sqrt(1 + root)), root =
                       sqrt(epsilon)
(E2)  pull, interval   P = a r_h/4 (delta - r) (2 - s (delta + r)) (1 + root / (delta (2 - s delta))) / |t|, towards q:
                       the displacement at which h heals at the rate a; s = 1 inside, -1 outside (there r_out stands for
                       r)
(E3)  skew, interval   feasible, or t = 0: d. Else d where it heals at least as fast as P, else P, at most max_step r_h
(E2') pull, capture    P = min(min(a, 1) |e|, max_step r_h); |e| itself from |e| <= snap r_h on, so that it ends exactly
                       on the level: snap = 2^-16, or more where the storage would round a smaller move away
(E3') skew, capture    D = 1 - r. Captured when delta < D, or D = 1: towards q by P, or as fast as d when d goes there,
                       never past it. Else d
(E4)  base rule        SGD (momentum, dampening, nesterov, weight decay) or AdamW, by torch's formulas
(E5)  move             w + d, kept within the outermost levels (``clip``)
(E6)  code             index of the level nearest to the new weight; a tie goes to the lower one, NaN to 0
 ``interval`` is the paper's annealing: Leconte, Schechtman, Moulines, "ASkewSGD: an annealed interval-constrained
optimisation method to train quantized neural networks", AISTATS 2023, with the velocity constraint of Muehlebach &
Jordan, "On constraints in first-order optimization", JMLR 23, 2022. ``capture`` is ours: the dual set, which pins the
confident weights first and leaves the uncertain ones free to go on choosing; freezing the confident first has been
done, with a straight-through estimator, by INQ (2017), OFQ's confidence-guided annealing (ICML 2023) and StoMPP (2026).
 One arithmetic. Every operation rounds once, in the order written here, in float64 for float64 weights and in float32
for all others; 16-bit storage is widened on load and rounded to nearest even on store. Scalars are rounded to that type
first. So nothing below uses ``addcmul``, ``lerp``, ``add(alpha=)`` or a division by a Python number, which round
otherwise, and selects are written so that a NaN gets through. ``csrc/maths/step.h`` states the same operations in the
same order.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import rounding

Tensors = Sequence[Tensor]
Number = float | Tensor  # a tensor of one element


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The type that a step on weights of ``dtype`` is computed in, and its scales are stored in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
        weight: (...), not empty.
        shape: of its scale.

    >>> blocks(torch.arange(6).reshape(2, 3), (1, 3)).tolist()
    [[0, 3], [1, 4], [2, 5]]
    """
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
        self.below, self.above = (
            torch.cat((gaps[:1], gaps)),
            torch.cat((gaps, gaps[-1:])),
        )  # to the neighbour; at the ends, to the only one
        self.unit, self.lowest, self.highest = torch.ones_like(self.levels[0]), self.levels[0], self.levels[-1]

    def nearest(self, u: Tensor) -> Tensor:
        index = torch.zeros_like(u)
        for midpoint in self.midpoints:
            index = index + (u > midpoint)
        return index

    def level(self, index: Tensor) -> Tensor:
        return self.levels[index.long()]

    def gap(self, index: Tensor, e: Tensor) -> Tensor:
        return torch.where(e < 0, self.above[index.long()], self.below[index.long()])

    def inverse_gap(self, index: Tensor, e: Tensor) -> Tensor:
        return torch.where(e < 0, self.above.reciprocal()[index.long()], self.below.reciprocal()[index.long()])


Levels = UniformCodebook | TableCodebook


def codebook(levels: Sequence[float], like: Tensor) -> Levels:
    """The levels in the dtype and on the device of ``like``. (K,) strictly increasing float32 numbers, 2 <= K <=
    256.
    """
    return (UniformCodebook if UniformCodebook.fits(levels) else TableCodebook)(levels, like)


def locate(w: Tensor, unit: Tensor, book: Levels) -> SimpleNamespace:
    """The weight among its levels: index and value of the nearest, distance e to it, half the gap it lies in, and
    r_h.
    """
    index = book.nearest(w * unit.reciprocal())
    level = book.level(index)
    e = unit * level - w
    gap = book.gap(index, e)
    return SimpleNamespace(index=index, level=level, e=e, gap=gap, half=unit * gap)


def flip(x: Tensor, sign: Tensor) -> Tensor:
    """x with its sign turned where ``sign`` is negative."""
    return torch.where(torch.signbit(sign), -x, x)


def skew_capture(d: Tensor, w: Tensor, unit: Tensor, book: Levels, h: SimpleNamespace) -> Tensor:
    """(E2'), (E3'): the displacement of a weight under capture annealing."""
    at = locate(w, unit, book)
    distance = at.e.abs()
    cap = h.max_step * at.half
    pull = h.rate * distance
    pull = torch.where(pull < cap, pull, cap)
    pull = torch.where(distance <= h.snap * at.half, distance, pull)
    toward = flip(d, at.e)
    wanted = torch.where(toward > distance, distance, toward)
    move = torch.where(pull > wanted, pull, wanted)
    return torch.where(distance < h.capture_radius * at.half, flip(move, at.e), d)


def skew_interval(d: Tensor, w: Tensor, unit: Tensor, book: Levels, h: SimpleNamespace) -> Tensor:
    """(E2), (E3): the displacement of a weight under the paper's interval annealing."""
    at = locate(w, unit, book)
    distance = at.e.abs()
    outside = ((at.level == book.lowest) & (at.e > 0)) | ((at.level == book.highest) & (at.e < 0))
    middle = unit * (at.level - flip(at.gap, at.e))
    from_middle = torch.where(outside, distance + at.half, (w - middle).abs())
    per_half = unit.reciprocal() * book.inverse_gap(at.index, at.e)
    delta, t = distance * per_half, from_middle * per_half
    signed_delta = torch.where(outside, -delta, delta)
    width = torch.where(outside, h.half_width_outside, h.half_width)
    signed_width = torch.where(outside, -width, width)
    well = delta * (2 - signed_delta)
    pull = (
        h.rate * at.half * 0.25 * (delta - width) * (2 - (signed_delta + signed_width)) * (well + h.root) / (well * t)
    )
    cap = h.max_step * at.half
    keep = (delta <= width) | (from_middle == 0) | ~(flip(d, at.e) < pull)
    return torch.where(keep, d, flip(torch.where(pull < cap, pull, cap), at.e))


def hyper(dtype: torch.dtype, device: torch.device, levels: Sequence[float], **given: Any) -> SimpleNamespace:
    """The scalars of a step as 0-d tensors of the arithmetic type, each rounded once; flags as they are."""
    h = SimpleNamespace(**given)

    def number(x: float | Tensor) -> Tensor:
        return torch.as_tensor(float(x), dtype=torch.float64).to(device, arithmetic(dtype))

    for name, value in given.items():
        if isinstance(value, (int, float, Tensor)) and not isinstance(value, bool):
            setattr(h, name, number(value))
    h.half_width, h.half_width_outside, h.root = half_widths(h.epsilon)
    h.capture_radius = torch.where(1 - h.half_width < 1, 1 - h.half_width, math.inf)
    h.rate = h.recovery if h.alpha is None else h.alpha
    if h.skew_at == "gradient":
        h.max_step = h.max_step / h.lr  # the gradient is skewed per unit of lr
    elif h.alpha is not None:
        h.rate = h.lr * h.alpha
    if h.anneal == "capture":
        rate = given["recovery"] if given["alpha"] is None else float(given["lr"]) * given["alpha"]
        h.snap = number(snap_radius(dtype, levels, rate)) if rate else number(2.0**-16)  # rate 0: lr = 0 moves nothing
        h.rate = torch.where(h.rate < 1, h.rate, 1)
    grad_scale = torch.ones_like(h.lr) if h.grad_scale is None else h.grad_scale
    h.grad_factor = (-1 if h.maximize else 1) * grad_scale.reciprocal()
    return h


def snap_radius(dtype: torch.dtype, levels: Sequence[float], rate: float) -> float:
    """(E2'): the distance, in units of r_h, from which on a pull goes all the way: 2^-16, or where half a unit in the
    last place of the largest level is more than the pull, which would leave the weight a last bit short of its level
    for ever.
    """
    if not levels:
        return 2.0**-16
    gap = min(upper - lower for lower, upper in itertools.pairwise(levels))
    largest = max(abs(levels[0]), abs(levels[-1]))
    return max(2.0**-16, torch.finfo(dtype).eps * largest / gap / min(rate, 1))


def sgd_displacement(g: Tensor, w: Tensor, buffer: Tensor | None, h: SimpleNamespace) -> tuple[Tensor, Tensor | None]:
    """(E4), SGD: the displacement and the new momentum buffer."""
    if h.weight_decay != 0:
        g = g + h.weight_decay * w
    if buffer is not None and h.momentum != 0:
        buffer = h.momentum * buffer + h.one_minus_dampening * g
        g = g + h.momentum * buffer if h.nesterov else buffer
    return -h.lr * g, buffer


def adamw_displacement(
    g: Tensor, w: Tensor, mean: Tensor, square: Tensor, largest: Tensor | None, step: float, h: SimpleNamespace
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(E4), AdamW: the displacement and the new moments. ``step`` counts this one; bias corrections are computed in
    double.
    """
    mean = h.beta1 * mean + h.one_minus_beta1 * g
    square = h.beta2 * square + h.one_minus_beta2 * (g * g)
    if largest is not None:
        largest = torch.where(largest > square, largest, square)
    first = w.new_tensor(1 / (1 - h.double_beta1**step))
    second = w.new_tensor(1 / math.sqrt(1 - h.double_beta2**step))
    direction = (mean * first) / (sqrt(square if largest is None else largest) * second + h.adam_eps)
    return -h.lr * (direction + h.weight_decay * w), mean, square, largest


def step_weight(
    w: Tensor,
    g: Tensor,
    scale: Tensor | None,
    levels: Sequence[float],
    h: SimpleNamespace,
    displacement: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor | None, Levels | None]:
    """One weight tensor, one step, in the arithmetic type: (new weight, unit of the codebook, codebook).
    ``displacement`` takes the gradient to what (E4) makes of it, and keeps the state.
    """
    skew = skew_capture if h.anneal == "capture" else skew_interval
    g = g * h.grad_factor
    if scale is None:
        d = displacement(g)
        return (w + d if h.lr != 0 else w), None, None
    book = codebook(levels, w)
    scale = spread(scale, w)
    unit = scale * book.unit
    if h.skew_at == "gradient" and h.lr != 0:
        g = -skew(-g, w, unit, book, h)
    d = displacement(g)
    if h.lr == 0:
        return w, unit, book
    if h.skew_at == "velocity":
        d = skew(d, w, unit, book, h)
    moved = w + d
    if h.clip:
        live = scale > 0
        moved = torch.where((moved < unit * book.lowest) & live, unit * book.lowest, moved)
        moved = torch.where((moved > unit * book.highest) & live, unit * book.highest, moved)
    return moved, unit, book


def write_outputs(
    weight: Tensor, unit: Tensor | None, book: Levels | None, codes: Tensor | None, snapped: Tensor | None
) -> None:
    """(E6), from what its storage made of the weight: codes and snapped weights where wanted."""
    if unit is None or book is None or (codes is None and snapped is None):
        return
    index = book.nearest(weight.to(arithmetic(weight.dtype)) * unit.reciprocal())
    if codes is not None:
        codes.copy_(index)
    if snapped is not None:
        snapped.copy_(unit * book.level(index))


@torch.no_grad()
def sgd_(weights: Tensors, grads: Tensors, momentum_buffers: Tensors, scales: Tensors, levels: Sequence[float],
         codes: Tensors, snapped: Tensors, *, lr: Number, momentum: float, dampening: float, weight_decay: float,
         nesterov: bool, maximize: bool, epsilon: Number, anneal: str, skew_at: str, recovery: float | None,
         alpha: float | None, max_step: float, clip: bool, grad_scale: Number | None = None,
         found_inf: Number | None = None, remainders: Tensors = (), seed: Tensor | int | None = None,
         streams: Sequence[int] = (), first_elements: Sequence[int] = ()) -> None:  # fmt: skip
    """One askew SGD step of every weight, in place: the reference of the operator ``askew_cuda::sgd_``.

       Args:
           weights: N x (...), float32, float64, bfloat16 or float16, on one device and of one dtype. Mutated.
           grads: N x (...), as the weights. Never written.
           momentum_buffers: N x (...), the weights' dtype or float32; or empty, when momentum is 0. Mutated.
           scales: N x a shape that :func:`spread` takes, of the arithmetic type, >= 0, weight units per level unit;
               0 leaves the weight unclipped. Empty without levels.
           levels: K strictly increasing float32 numbers, 2 <= K <= 256, level units; or empty: the base rule alone.
           codes: N x (...), uint8, receives the index of each weight's level; or empty.
           snapped: N x (...), any float dtype, receives scale * level; or empty.
           lr, epsilon, grad_scale, found_inf: float or 0-d tensor. epsilon in [0, 1]; lr = 0 moves no weight.
           anneal: "capture" or "interval". skew_at: "velocity", or "gradient" (interval and alpha only).
           recovery, alpha: one of them. Share of the distance removed per step, or the paper's rate per unit of lr.
           max_step: cap on the pull in units of half the level distance, > 0.
           remainders: N x (...), int16, what rounding takes from 16-bit weights; or empty. Mutated.
           seed: int64, of stochastic rounding of 16-bit weights; or None. streams: N numbers of the weights,
               first_elements: N numbers of their first elements, where they are parts of larger weights; random bits
               depend on these three and the element alone.
    A NaN gradient makes its own weight NaN and no other. found_inf != 0 leaves everything as it is. Empty tensors are
       fine.
    """
    if found_inf is not None and found_inf != 0:
        return
    storage = rounding.Storage(remainders, seed, streams, first_elements)
    for i, weight in enumerate(weights):
        h = hyper(storage.dtype(weight), weight.device, levels, lr=lr, weight_decay=weight_decay, maximize=maximize,
                  grad_scale=grad_scale, momentum=momentum, one_minus_dampening=1 - dampening, nesterov=nesterov,
                  epsilon=epsilon, anneal=anneal, skew_at=skew_at, recovery=recovery, alpha=alpha, max_step=max_step,
                  clip=clip)  # fmt: skip
        wide = arithmetic(weight.dtype)
        w, g = storage.load(i, weight), grads[i].to(wide)
        buffer = [momentum_buffers[i].to(wide) if momentum_buffers else None]

        def displacement(
            g: Tensor, w: Tensor = w, h: SimpleNamespace = h, buffer: list[Tensor | None] = buffer
        ) -> Tensor:
            d, buffer[0] = sgd_displacement(g, w, buffer[0], h)
            return d

        moved, unit, book = step_weight(w, g, scales[i] if scales else None, levels, h, displacement)
        if buffer[0] is not None:
            momentum_buffers[i].copy_(buffer[0])
        storage.store(i, weight, moved)
        write_outputs(weight, unit, book, codes[i] if codes else None, snapped[i] if snapped else None)


@torch.no_grad()
def adamw_(weights: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, max_exp_avg_sqs: Tensors,
           steps: Tensors, scales: Tensors, levels: Sequence[float], codes: Tensors, snapped: Tensors, *, lr: Number,
           beta1: float, beta2: float, eps: float, weight_decay: float, amsgrad: bool, maximize: bool, epsilon: Number,
           anneal: str, skew_at: str, recovery: float | None, alpha: float | None, max_step: float, clip: bool,
           grad_scale: Number | None = None, found_inf: Number | None = None, remainders: Tensors = (),
           seed: Tensor | int | None = None, streams: Sequence[int] = (), first_elements: Sequence[int] = ()) -> None:  # fmt: skip
    """One askew AdamW step (decoupled weight decay) of every weight, in place: the reference of ``askew_cuda::adamw_``.

    Args:
        exp_avgs, exp_avg_sqs: N x (...), the weights' dtype or float32. Mutated.
        max_exp_avg_sqs: the same with amsgrad, else empty. Mutated.
        steps: N x (), float32 or float64, steps taken so far. Each is increased by one. lr, beta1, beta2, eps,
        weight_decay: torch.optim.AdamW's; ``epsilon`` is the annealed number, not Adam's ``eps``. All others: as in
        :func:`sgd_`.
    """
    if found_inf is not None and found_inf != 0:
        return
    storage = rounding.Storage(remainders, seed, streams, first_elements)
    for i, weight in enumerate(weights):
        h = hyper(storage.dtype(weight), weight.device, levels, lr=lr, weight_decay=weight_decay, maximize=maximize,
                  grad_scale=grad_scale, beta1=beta1, one_minus_beta1=1 - beta1, beta2=beta2,
                  one_minus_beta2=1 - beta2, adam_eps=eps, epsilon=epsilon, anneal=anneal, skew_at=skew_at,
                  recovery=recovery, alpha=alpha, max_step=max_step, clip=clip)  # fmt: skip
        h.double_beta1, h.double_beta2 = beta1, beta2
        wide = arithmetic(weight.dtype)
        w, g = storage.load(i, weight), grads[i].to(wide)
        lists = [exp_avgs, exp_avg_sqs, *([max_exp_avg_sqs] if amsgrad else [])]
        state = [each[i].to(wide) for each in lists]
        step = float(steps[i]) + 1

        def displacement(
            g: Tensor, w: Tensor = w, h: SimpleNamespace = h, state: list[Tensor] = state, step: float = step
        ) -> Tensor:
            mean, square, *largest = state
            d, *new = adamw_displacement(g, w, mean, square, largest[0] if largest else None, step, h)
            state[:] = [each for each in new if each is not None]
            return d

        moved, unit, book = step_weight(w, g, scales[i] if scales else None, levels, h, displacement)
        for kept, new in zip(lists, state, strict=True):
            kept[i].copy_(new)
        steps[i].add_(1)
        storage.store(i, weight, moved)
        write_outputs(weight, unit, book, codes[i] if codes else None, snapped[i] if snapped else None)
