"""Scale rules: one number per tensor, channel or group, estimated once from the weights. PyTorch operations, float64 sums."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .quantizer import Codebook, Quantizer

# clip = a * rms - b * mean|w|, by number of levels. Choi et al., "Accurate and efficient 2-bit quantized neural networks", MLSys
# 2019, with the coefficients of IBM's fms-model-optimizer; 17 levels: those of LUQ and of the ASkewSGD authors.
_SAWB = {
    2: (0.0, -1.0), 3: (2.6, 1.71), 4: (3.12, 2.064), 8: (7.509, 6.892), 15: (12.035, 12.03), 16: (12.68, 12.80), 17: (12.1, 12.2),
    32: (17.74, 18.64), 127: (28.24, 30.81), 255: (31.76, 35.04), 256: (31.76, 35.04),
}  # fmt: skip
_GRID = 96  # candidates of the min-MSE search
_REFITS = 4  # least-squares refits of the best one


def estimate(weight: Tensor, quantizer: Quantizer, *, pretrained: bool | str, name: str) -> Tensor:
    """The scale that a weight gets, by the quantizer's rule.

    Args:
        weight: (...), float32, float64, bfloat16 or float16. Not mutated.
        quantizer: levels, rule and granularity.
        pretrained: True or "packed" where the weights are trained already; it matters to "auto".
        name: of the weight, for messages.

    Returns:
        () | (channels, 1, ..) | (rows, groups), float32 (float64 for float64 weights), > 0; weight units per level unit. A row of
        zeros gets the mean of the tensor's other scales, an empty tensor 1.

    Raises:
        ValueError: the weights hold NaN, infinity or nothing but zeros, or the shape does not fit the quantizer.
    """
    quantizer.check(weight, name)
    shape, dtype = quantizer.scale_shape(weight), reference.arithmetic(weight.dtype)
    if isinstance(quantizer.scale, (int, float, tuple)):
        return torch.tensor(quantizer.scale, dtype=torch.float64).to(weight.device, dtype).expand(shape).clone()
    if weight.numel() == 0:
        return torch.ones(shape, dtype=dtype, device=weight.device)
    if not bool(weight.isfinite().all()):
        raise ValueError(f"{name} holds {int((~weight.isfinite()).sum())} NaN or infinite weights; no scale can be estimated from them")
    if not bool(weight.any()):
        raise ValueError(f"{name} holds nothing but zeros; give it a scale: Quantizer(..., scale=0.05)")
    rows = weight.detach().reshape(math.prod(shape), -1).to(dtype)
    scale = _by_rule(rows, weight, quantizer, pretrained, name)
    empty = ~(scale > 0)
    if bool(empty.any()):
        scale = torch.where(empty, scale[~empty].mean(), scale)
    return scale.to(dtype).reshape(shape)


def _by_rule(rows: Tensor, weight: Tensor, quantizer: Quantizer, pretrained: bool | str, name: str) -> Tensor:
    """(rows,) float64; 0 for a row of zeros."""
    levels, rule = quantizer.codebook.levels, quantizer.scale
    size = torch.tensor(levels, dtype=torch.float64).abs()
    if rule == "auto":
        if not pretrained and is_torch_default(weight):
            return torch.full((len(rows),), _by_shape(weight, quantizer.codebook), dtype=torch.float64, device=rows.device)
        if not pretrained and len(levels) <= 3:
            return 1.1 * _mean_abs(rows)
        rule = "mse"
    if rule == "absmean":
        return _mean_abs(rows) / size.mean().item()
    if rule == "absmax":
        return rows.abs().amax(1).double() / size.max().item()
    if rule == "sawb":
        return _sawb(rows, len(levels), name) / size.max().item()
    return min_mse(rows, levels)


def _mean_abs(rows: Tensor) -> Tensor:
    return rows.abs().mean(1, dtype=torch.float64)


def _fans(weight: Tensor) -> tuple[int, int]:
    """fan_in and fan_out as torch.nn.init counts them."""
    field = math.prod(weight.shape[2:])
    return weight.shape[1] * field, weight.shape[0] * field


def is_torch_default(weight: Tensor) -> bool:
    """Whether a weight looks like torch's default Linear or Conv initialisation, uniform in +-1 / sqrt(fan_in)."""
    if weight.dim() < 2 or weight.numel() == 0:
        return False
    fan_in, _ = _fans(weight)
    values = weight.detach()
    rms = values.to(reference.arithmetic(weight.dtype)).square().mean(dtype=torch.float64).sqrt().item()
    bound = (1 + 2 * torch.finfo(weight.dtype).eps) / math.sqrt(fan_in)
    wanted = 1 / math.sqrt(3 * fan_in)
    return bool(values.abs().max() <= bound) and abs(rms - wanted) <= (0.05 + 2 / math.sqrt(weight.numel())) * wanted


def _by_shape(weight: Tensor, codebook: Codebook) -> float:
    """sqrt(2 / fan_in) (16 / sqrt(fan_in fan_out))^(1/4) / rms(levels): that init says nothing about the scale that a layer should have."""
    fan_in, fan_out = _fans(weight)
    rms = math.sqrt(sum(level * level for level in codebook.levels) / len(codebook))
    return math.sqrt(2 / fan_in) * (16 / math.sqrt(fan_in * fan_out)) ** 0.25 / rms


def _sawb(rows: Tensor, levels: int, name: str) -> Tensor:
    """The statistics-aware clipping point; max|w| where the formula leaves nothing (weights all of one size)."""
    if levels not in _SAWB:
        raise ValueError(
            f"scale = 'sawb' of {name}: there are no coefficients for {levels} levels, only for {', '.join(map(str, _SAWB))}; take 'mse'"
        )
    a, b = _SAWB[levels]
    clip = a * rows.square().mean(1, dtype=torch.float64).sqrt() - b * _mean_abs(rows)
    return torch.where(clip > 0, clip, rows.abs().amax(1).double())


def min_mse(rows: Tensor, levels: Sequence[float]) -> Tensor:
    """(rows,) float64: the scales s > 0 that minimise sum (w - s q(w / s))^2 row by row; exact for up to 3 levels.

    For an assignment of levels q the best scale is A / B with A = sum w q, B = sum q^2, and removes A^2 / B of the error. A row that
    no positive scale serves (levels of one sign, weights of the other) gets max|w| / max|level|.
    """
    best = _sweep(rows, levels) if len(levels) <= 3 else _search(rows, levels)
    largest = rows.abs().amax(1).double() / max(abs(level) for level in levels)
    return torch.where(best > 0, best, largest)


def _sweep(rows: Tensor, levels: Sequence[float]) -> Tensor:
    """Every assignment that some scale asks for: from 0 up, it changes only where w / scale crosses the middle between two levels."""
    w = rows.double()
    q = torch.tensor(levels, dtype=torch.float64, device=w.device)
    start = torch.where(w > 0, q[-1], torch.where(w < 0, q[0], q[q.abs().argmin()]))
    breaks, change_a, change_b = [], [], []
    for lower, upper in itertools.pairwise(q):
        middle = (lower + upper) / 2
        if middle == 0:
            continue  # w / scale keeps its sign: never crossed
        crossing = w / middle
        old, new = (upper, lower) if middle > 0 else (lower, upper)  # |w / scale| falls
        crossed = crossing > 0
        breaks.append(torch.where(crossed, crossing, math.inf))
        change_a.append(torch.where(crossed, w * (new - old), 0))
        change_b.append(torch.where(crossed, new * new - old * old, 0))
    a, b = (w * start).sum(1, keepdim=True), (start * start).sum(1, keepdim=True)
    if breaks:
        order = torch.cat(breaks, 1).argsort(1)
        a, b = (
            torch.cat((first, first + torch.cat(change, 1).gather(1, order).cumsum(1)), 1)
            for first, change in ((a, change_a), (b, change_b))
        )
    good = (a > 0) & (b > 0.5 * q.abs()[q != 0].min() ** 2)  # B is a sum of squared levels: below that, it is rounding
    removed = torch.where(good, a * a / b, -1)
    which = removed.argmax(1, keepdim=True)
    return torch.where(good, a / b, 0).gather(1, which).squeeze(1)


def _search(rows: Tensor, levels: Sequence[float]) -> Tensor:
    """The best of a logarithmic grid, refined by least squares.

    It reaches from 1.25 max|w| (all inside) down to 0.3 rms(w), per largest level: below that, most of the weights' energy is clipped.
    """
    book = reference.codebook(levels, rows)
    reach = max(abs(level) for level in levels)
    high = 1.25 * rows.abs().amax(1).double() / reach
    low = 0.3 * rows.square().mean(1, dtype=torch.float64).sqrt() / reach

    def fit(scale: Tensor) -> tuple[Tensor, Tensor]:
        """What the assignment at a scale removes of the error at its own best scale, and that scale."""
        unit = scale.to(rows.dtype).unsqueeze(1) * book.unit
        level = book.level(book.nearest(rows * unit.reciprocal())) * book.unit
        a, b = (rows * level).sum(1, dtype=torch.float64), (level * level).sum(1, dtype=torch.float64)
        good = (a > 0) & (b > 0)
        return torch.where(good, a * a / b, -1), torch.where(good, a / b, scale)

    removed, best = fit(high)
    for step in range(1, _GRID):
        gain, scale = fit(high * (low / high) ** (step / (_GRID - 1)))
        better = gain > removed
        removed, best = torch.where(better, gain, removed), torch.where(better, scale, best)
    for _ in range(_REFITS):
        gain, scale = fit(best)
        best = torch.where(gain >= removed, scale, best)
        removed = torch.maximum(gain, removed)
    return torch.where(removed > 0, best, 0)


def share_outside(weight: Tensor, scale: Tensor, levels: Sequence[float]) -> float:
    """Share of weights that lie outside of the outermost levels: what a clip would move."""
    if weight.numel() == 0:
        return 0.0
    wide = reference.spread(scale, weight)
    return float(((weight < wide * levels[0]) | (weight > wide * levels[-1])).double().mean())
