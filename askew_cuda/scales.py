"""Scale rules: one number per tensor, channel or group, estimated once from the weights, or from what is known of their
layer. PyTorch operations, float64 sums.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, fit, look, reference
from .quantizer import ChannelDim, Codebook, Quantizer, output_dims

# clip = a * rms - b * mean|w|, by number of levels. Choi et al., "Accurate and efficient 2-bit quantized neural
# networks", MLSys 2019, with the coefficients of IBM's fms-model-optimizer; 17 levels: those of LUQ and of the ASkewSGD
# authors.
_SAWB = {
    2: (0.0, -1.0), 3: (2.6, 1.71), 4: (3.12, 2.064), 8: (7.509, 6.892), 15: (12.035, 12.03), 16: (12.68, 12.80),
    17: (12.1, 12.2), 32: (17.74, 18.64), 127: (28.24, 30.81), 255: (31.76, 35.04), 256: (31.76, 35.04),
}  # fmt: skip


def estimate(
    weight: Tensor,
    quantizer: Quantizer,
    *,
    pretrained: bool | str,
    name: str,
    normalized: bool = False,
    channel_dim: ChannelDim = 0,
    fan_in: int | None = None,
    init_bound: float | None = None,
) -> Tensor:
    """The scale that a weight gets, by the quantizer's rule.

    Args:
        weight: (...), float32, float64, bfloat16 or float16. Not mutated.
        quantizer: levels, rule and granularity.
        pretrained: True where the weights are trained already, "packed" where they lie on levels; it matters to "auto".
        name: of the weight, for messages.
        normalized: whether the network has normalisation layers; it matters to "auto".
        channel_dim: the output dimension of the layer; for stacked experts those of expert and output.
        fan_in: how many weights are summed up into one output of the layer. None: nothing is known of the layer. Where
            "auto" goes by the shape, the output then comes first, and all other dimensions are inputs.
        init_bound: the layer's fresh weights are uniform within +- this; None: within +-1 / sqrt(fan_in). It matters to
            "auto".

    Returns: of the shape that ``quantizer.scale_shape`` says, float32 (float64 for float64 weights), > 0; weight units
        per level unit. A row of zeros gets the mean of the tensor's other scales, an empty tensor 1.

    Raises:
        ValueError: the weights hold NaN or infinity, or nothing but zeros where the layer does not say a scale either,
            or the shape does not fit the quantizer.

    >>> estimate(torch.tensor([-3.0, 1.0]), Quantizer("binary"), pretrained=True, name="w")
    tensor(2.2361)
    """
    quantizer.check(weight, name, channel_dim)
    there, weight = weight.device, reference.with_double(weight.detach())
    shape, dtype = quantizer.scale_shape(weight, channel_dim), reference.arithmetic(weight.dtype)
    if not isinstance(quantizer.scale, str):
        scale = torch.tensor(quantizer.scale, dtype=torch.float64, device="cpu")
        _check_range(scale, dtype, f"scale of {name}", "give another")
        scale = scale.to(there, dtype)
        return scale.expand(shape).clone() if scale.dim() == 0 else scale.reshape(shape)
    if weight.numel() == 0:
        return torch.ones(shape, dtype=dtype, device=there)
    bad = int(look.non_finite(weight))
    if bad:
        raise ValueError(
            f"{name} holds {bad} NaN or infinite weights: no scale can be estimated; repair them, or give "
            "Quantizer(scale=..)"
        )
    rows = reference.blocks(weight, shape).to(dtype)  # in logical order, whatever the layout
    if quantizer.scale == "auto":
        fans = _fans(weight, channel_dim, fan_in)
        default = not (pretrained or normalized) and is_torch_default(weight, fan_in, init_bound)
        scale = _auto(rows, weight, quantizer.codebook, pretrained, normalized, default, fans, fan_in is not None)
    else:
        scale = _by_rule(rows, quantizer.codebook, quantizer.scale, name)
    # A dead row, of zeros or of what weight decay left of it, says nothing.
    alive = (scale >= torch.finfo(dtype).tiny) & (
        bool(weight.count_nonzero()) | (fan_in is not None and quantizer.scale == "auto")
    )
    if not alive.any():
        raise ValueError(
            f"{name} holds nothing but zeros: no scale can be estimated; give it one, such as Quantizer(.., "
            "scale=0.05), or say fan_in, which askew_cuda.param_groups does for known layers and scale='auto' goes by"
        )
    scale = torch.where(alive, scale, scale[alive].mean())
    _check_range(
        scale,
        dtype,
        f"scale = {quantizer.scale!r} of {name}",
        "take levels of about the size of the weights, or give a scale",
    )
    return scale.to(dtype).reshape(shape).to(there)


def learning_rate(group: dict[str, Any], quantizer: Quantizer) -> float:
    """The rate at which the scales of a group learn (E7), a multiple of lr: its own, or, where it is None, as measured
    (docs/recipes.md): 0.05 for two levels, 0.1 for more; 0 where weights are trained already, which tell their scale,
    and between normalisation layers, where the output does not depend on it.
    """
    if group["scale_lr"] is not None:
        return float(group["scale_lr"])
    if group["pretrained"] or group["normalized"]:
        return 0.0
    return 0.05 if len(quantizer.codebook) == 2 else 0.1


def are_short(group: dict[str, Any], quantizer: Quantizer) -> bool:
    """Whether the scales of a group are rounded: it says so, or its quantizer is named after a format of others."""
    return bool(quantizer.blocks is not None if group["short_scales"] is None else group["short_scales"])


def short(scale: Tensor, bits: int = 7) -> Tensor:
    """Scales with so many significant bits, each the nearest to the one it replaces, at most 2^-bits of it away; a tie
    goes to the even one.

    Seven survive float16 and bfloat16, times a level of four bits survive float16: what formats of other runtimes
    store. A number that has no more keeps its value, so that rounding twice is rounding once.

    Args: scale: (...), any floating type. Not mutated. bits: 1 to the type's own.

    >>> short(torch.tensor([0.1, 0.75, 1.0])).tolist()
    [0.099609375, 0.75, 1.0]
    """
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)


def given(
    scales: Sequence[Tensor], params: Any, quantizer: Quantizer | None, channel_dim: ChannelDim
) -> list[tuple[Tensor, Tensor]]:
    """The scales that a param group brings along, each with its weight: copies, on the weights' devices.

    Args:
        scales: one for each weight, of the shape that ``quantizer.scale_shape`` says or with dimensions of size 1 left
            out, of any floating type that the arithmetic type holds exactly. Not mutated.
        params: a weight, or weights, or (name, weight) pairs; in the order of the scales.

    Raises: ValueError, TypeError: their number, a shape, a dtype or a value does not fit, or nothing is quantized.
    """
    params = [params] if isinstance(params, Tensor) else params
    if quantizer is None or not isinstance(scales, (list, tuple)) or len(scales) != len(params):
        count = len(scales) if isinstance(scales, (list, tuple)) else type(scales).__name__
        raise ValueError(
            f"scales = {count} for {len(params)} weights, quantizer = {quantizer and quantizer.plain()!r}; a list with "
            "a tensor for each weight of a quantized group is needed"
        )
    found = []
    for index, (item, scale) in enumerate(zip(params, scales, strict=True)):
        name, weight = item if isinstance(item, tuple) else (f"params[{index}]", item)
        if not isinstance(scale, Tensor):
            raise TypeError(f"scale of {name} = {scale!r}; a tensor is needed")
        dtype, shape = reference.arithmetic(weight.dtype), quantizer.scale_shape(weight, channel_dim)
        if torch.promote_types(scale.dtype, dtype) != dtype or not scale.is_floating_point():
            raise TypeError(f"scale of {name} is {scale.dtype}; {dtype} is needed")
        if tuple(scale.shape) not in (shape, tuple(size for size in shape if size != 1)):
            raise ValueError(f"scale of {name} has shape {tuple(scale.shape)}; {shape} is needed")
        if not scale.is_meta:
            _check_range(scale, dtype, f"scale of {name}", "give another")
        found.append((weight, scale.detach().reshape(shape).to(weight.device, dtype, copy=True)))
    return found


def _check_range(scale: Tensor, dtype: torch.dtype, what: str, remedy: str) -> None:
    """A scale that is 0, infinite or without a reciprocal in its dtype would make NaN of everything."""
    least, most = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    outside = ~((scale >= least) & (scale <= most))
    if outside.any():
        raise ValueError(
            f"{what}: {scale[outside][0].item()} is outside of {least:.3g} .. {most:.3g}, the range of {dtype}; "
            f"{remedy}"
        )


def is_torch_default(weight: Tensor, fan_in: int | None = None, init_bound: float | None = None) -> bool:
    """Whether a weight looks like torch's default initialisation of its layer, uniform in +-``init_bound``. Where that
    is None, it is Linear's and Conv's, 1 / sqrt(fan_in): of the fan-in that torch counts for its shape, or of the
    layer's own.
    """
    if weight.dim() < 2 or weight.numel() == 0:
        return False
    fans = {math.prod(weight.shape[1:]), fan_in or math.prod(weight.shape[1:])}
    bounds = [1 / math.sqrt(fan) for fan in fans] if init_bound is None else [init_bound]
    largest, rms = max(abs(float(each)) for each in weight.detach().aminmax()), None
    for bound in bounds:
        wanted = bound / math.sqrt(3)
        if not largest <= (1 + 2 * torch.finfo(weight.dtype).eps) * bound:
            continue
        rms = look.rms(weight) if rms is None else rms
        if abs(rms - wanted) <= (0.05 + 2 / math.sqrt(weight.numel())) * wanted:
            return True
    return False


def share_outside(weight: Tensor, scale: Tensor, levels: Sequence[float]) -> float:
    """Share of weights that lie outside of the outermost levels: what a clip would move. 0 for an empty tensor."""
    if weight.numel() == 0:
        return 0.0
    return look.outside(weight, scale, levels[0], levels[-1]) / weight.numel()


def share_of_zeros(weight: Tensor) -> float:
    """Share of weights that are exactly 0, of either sign. 0 for an empty tensor."""
    return 1 - int(torch.count_nonzero(weight.detach())) / weight.numel() if weight.numel() else 0.0


def _auto(
    rows: Tensor,
    weight: Tensor,
    codebook: Codebook,
    pretrained: bool | str,
    normalized: bool,
    default: bool,
    fans: tuple[float, float],
    known: bool,
) -> Tensor:
    """(rows,) float64; 0 for a row of zeros. Measured: docs/recipes.md.

    A trained network says its scale itself, and so does a deliberate init that is not small: that of the least squared
    error. torch's default init says nothing about it, nor do zeros: the shape does. Between normalisation layers no
    init says anything. Without them the signal must not fade: no scale of a fresh network is smaller than its shape's;
    in a trained one two levels are as large as the weights are in the mean square, which the least squared error is
    not, three are not set tighter, and where no level is 0, which would take them in, dead weights do not count.
    """
    zeros = known and not bool(weight.any())
    by_shape = normalized or zeros or default
    if weight.dim() >= 2 and by_shape and (zeros or not pretrained):
        scale = _of_torch_default(fans, codebook) if normalized else _by_shape(fans, codebook)
        return torch.full((len(rows),), scale, dtype=torch.float64, device=rows.device)
    if pretrained is not True:
        least = min_mse(rows, codebook)
        return least if pretrained or weight.dim() < 2 else least.clamp(min=_by_shape(fans, codebook))
    # weights that move on do better with less way to go
    tighter = 0.85 if len(codebook) in range(3 if normalized else 4, 8) else 1.0
    if normalized or len(codebook) >= 8 or 0 in codebook.levels:
        return tighter * min_mse(rows, codebook)
    pair = len(codebook) == 2 and codebook.levels[0] == -codebook.levels[1]
    return tighter * _dilution(rows) * (_rms(rows) / codebook.rms if pair else min_mse(rows, codebook))


def _by_rule(rows: Tensor, codebook: Codebook, rule: str, name: str) -> Tensor:
    """(rows,) float64; 0 for a row of zeros."""
    if rule == "absmean":
        return _mean_abs(rows) / codebook.mean_abs
    if rule == "absmax":
        return _largest(rows) / codebook.max_abs
    if rule == "sawb":
        return sawb_clip(rows, len(codebook), name) / codebook.max_abs
    return min_mse(rows, codebook)


def _mean_abs(rows: Tensor) -> Tensor:
    """(rows,) float64, as the next two; without a copy of the weights."""
    return torch.linalg.vector_norm(rows, 1, dim=1, dtype=torch.float64) / rows.shape[1]


def _rms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, 2, dim=1, dtype=torch.float64) / math.sqrt(rows.shape[1])


def _dilution(rows: Tensor) -> Tensor:
    """sqrt(2 / pi) rms(w) / mean|w|, at least 1: what weights near 0, as weight decay leaves those of dead inputs and
    units, take off the root mean square of the others. 1 for normal weights, 1 / sqrt(share) if only a share of them is
    alive.
    """
    mean = _mean_abs(rows)
    return torch.where(mean > 0, math.sqrt(2 / math.pi) * _rms(rows) / mean, 1).clamp(min=1)


def _largest(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, math.inf, dim=1, dtype=torch.float64)


def _fans(weight: Tensor, channel_dim: ChannelDim, fan_in: int | None) -> tuple[float, float]:
    """fan_in and fan_out. Of a known layer, whose fan-out is that of torch.nn.init: weights per input, of one expert;
    else both as torch.nn.init counts them.
    """
    if weight.dim() < 2 or weight.numel() == 0:
        return 1, 1
    field = math.prod(weight.shape[2:])
    if fan_in is None:
        return weight.shape[1] * field, weight.shape[0] * field
    kept = output_dims(channel_dim, weight.dim(), "the weight")
    experts = math.prod(weight.shape[dim] for dim in kept[:-1])
    inputs = next(size for dim, size in enumerate(weight.shape) if dim not in kept)
    return fan_in, weight.numel() / experts / inputs


def _of_torch_default(fans: tuple[float, float], codebook: Codebook) -> float:
    """1 / sqrt(3 fan_in) / rms(levels): levels as large as the weights of torch's default init are."""
    return 1 / math.sqrt(3 * fans[0]) / codebook.rms


def _by_shape(fans: tuple[float, float], codebook: Codebook) -> float:
    """sqrt(2 / fan_in) (16 / sqrt(fan_in fan_out))^(1/4) / rms(levels), from 8 levels on twice that: that init says
    nothing about the scale that a layer should have. Many levels can be further apart, and leave more room.
    """
    fan_in, fan_out = fans
    size = math.sqrt(2 / fan_in) * (16 / math.sqrt(fan_in * fan_out)) ** 0.25
    return (2 if len(codebook) >= 8 else 1) * size / codebook.rms


def sawb_clip(rows: Tensor, levels: int, name: str) -> Tensor:
    """(rows,) float64: the statistics-aware clipping point; max|w| where the formula leaves nothing (weights all of one
    size).
    """
    if levels not in _SAWB:
        raise ValueError(
            f"scale = 'sawb' of {name}: there are no coefficients for {levels} levels, only for "
            f"{', '.join(map(str, _SAWB))}; take 'mse'"
        )
    a, b = _SAWB[levels]
    clip = a * _rms(rows) - b * _mean_abs(rows)
    return torch.where(clip > 0, clip, _largest(rows))


def min_mse(rows: Tensor, codebook: Codebook) -> Tensor:
    """(rows,) float64: the scales s > 0 that minimise sum (w - s q(w / s))^2 row by row, q being the nearest level.

    Within 1 % of the least error, by the search that ``csrc/maths/fit.h`` describes; but for rows of less than 64
    weights on more than 17 levels, whose errors are small and jagged. The same bits whatever computes them: the
    kernels of CPU and CUDA, or :func:`askew_cuda.fit.fit_scales` where there are none. Weights on other devices are
    brought to the CPU, a block of rows at a time.
    """
    if backends.has_operators(rows.device):
        return torch.ops.askew_cuda.fit_scales(rows, codebook.levels)
    search = fit.fit_scales if backends.extension is None else torch.ops.askew_cuda.fit_scales
    if rows.device.type == "cpu" or not rows.numel():
        return search(rows.cpu(), codebook.levels).to(rows.device)
    blocks = rows.split(max(1, fit.AT_ONCE // rows.shape[1]))
    return torch.cat([search(block.cpu(), codebook.levels) for block in blocks]).to(rows.device)
