"""The keywords of a param group for readers and for type checkers, which find a wrong one in a script before it runs.

What holds while a script runs stands in keywords.py; a test keeps both lists the same.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .quantizer import Quantizer


class _OfWeights(TypedDict, total=False):
    """What :func:`~askew_cuda.param_groups` says of weights by itself."""

    quantizer: "str | Quantizer | Mapping[str, Any] | None"
    pretrained: bool | Literal["packed"]
    channel_dim: int | Sequence[int]
    fan_in: int | Sequence[int | None] | None
    init_bound: float | Sequence[float | None] | None


class _OfTraining(TypedDict, total=False):
    """All others of ours."""

    normalized: bool | None
    trained_norms: bool
    quantize_frozen: bool
    total_steps: int | None
    hold: float | None
    end: float | None
    shape: Literal["quadratic", "geometric"] | Callable[[float], float]
    steps_done: int
    epsilon: float | Tensor
    anneal: Literal["capture", "interval"]
    skew_at: Literal["velocity", "gradient"]
    recovery: float | None
    alpha: float | None
    max_step: float
    scale_lr: float | None
    short_scales: bool | None
    clip: bool
    outputs: Collection[Literal["codes", "snapped"]]
    state_dtype: torch.dtype | Literal["float32"] | None
    low_precision: Literal["nearest", "remainder", "stochastic"]
    seed: int | Tensor
    backend: Literal["auto", "cuda", "triton", "cpu", "reference"]


class Keywords(_OfWeights, _OfTraining, total=False):
    """Keywords beyond torch.optim's, for all groups or in a group (which wins):

    quantizer: levels and scale of the weights: a name ("binary", "ternary/channel", "2bit/group128", ..), a
        :class:`~askew_cuda.Quantizer`, or None: not quantized, then the group does what torch's optimizer does.
    pretrained: True for weights that are trained already, "packed" for weights from a packed file. Chooses scale and
        annealing.
    normalized: whether the network has normalisation layers, which leave the scale to us. trained_norms: whether their
        gains are trained already; only a warning depends on it.
    channel_dim: the output dimension of the weights, 0 for (out, in, ..), 1 for (in, out), or those of expert and
        output. What has scales of its own, with a quantizer per channel or per group.
    fan_in: how many weights are summed up into one output; one number, or one for each weight.
    init_bound: where a layer starts with weights that are uniform in another interval than +-1 / sqrt(fan_in), the end
        of it: so fresh weights are known, which say nothing about their scale. One number, or one for each weight.
        :func:`~askew_cuda.param_groups` writes these five, from what it knows of the layers. Bare parameters get the
        defaults, whatever stands beside them: not normalised; the output first, all other dimensions inputs. And a
        quantizer takes EVERY parameter of its group, biases and gains of norms included, which networks are better off
        without: give those a group with quantizer None, or use param_groups, which does.
    quantize_frozen: whether weights that are frozen and were never stepped are snapped and coded, too. Else they keep
        their values, and are saved as they are; once they train, they are quantized like all others.
    total_steps: optimizer steps of the whole training, a whole number: then the optimizer anneals itself. None: epsilon
        is set from outside, by :class:`~askew_cuda.Anneal` or by hand. It is counted what is stepped; a step that the
        host sees skipped (found_inf on the CPU, a GradScaler that does not call step) is not, one that only a device
        knows of is.
    hold, end: shares of total_steps, 0 <= hold < end <= 1: r, the half-width around a level, is 1 until ``hold`` and 0
        from ``end`` on. None: as measured for the number of levels and ``pretrained`` (docs/recipes.md); in a training
        of fewer steps than some 340 earlier, so that the weights get there.
    shape: of the way between, "quadratic" or "geometric"; or a callable from progress in [0, 1] (of the whole training:
        hold and end don't act) to r in [0, 1], which must not rise.
    steps_done: the count, a whole number in each group; a checkpoint carries it. A group that is added later takes the
        others'. Give it to go on from a step.
    epsilon: the annealed number in [0, 1], 1 free, 0 levels only; a 0-d tensor is filled in place.
    anneal: "capture" (ours) or "interval" (the paper's). skew_at: what the constraint acts on, "velocity" or, as in the
        authors' code, "gradient" (interval only).
    scale_lr: learning rate of the scales, a multiple of lr, at least 0: while all weights are free (epsilon = 1), a
        scale learns how large the box of its levels is to be; once annealing has begun it stays. 0: it stays as it was
        estimated. None: as measured, 0.05 for two levels and 0.1 for more; 0 for weights that are trained already, and
        with ``normalized``.
    recovery: share in (0, 1] of the distance that a constrained weight makes up in a step. alpha: the paper's rate, per
        unit of lr, instead of it. Default: recovery 0.5, or alpha 1 with skew_at="gradient".
    short_scales: whether scales are rounded to 7 significant bits, so that formats that store them in 16 bits hold them
        (docs/export.md): when they are estimated, and where they learn once more, after the first step of their
        weights' annealing. Scales that are given as tensors, or found in packed weights, stay. None: where the
        quantizer is named after such a format ("gguf:q4_0").
    max_step: cap on the pull, in units of half the distance between levels. clip: keep weights within the outermost
        levels.
    outputs: "codes" and "snapped" are written by the step itself, to ``optimizer.outputs[p]``.
    state_dtype: torch.float32 keeps the state of 16-bit weights in float32.
    low_precision: what becomes of 16-bit weights' steps that are small against their last place. "nearest": they are
        lost. "remainder": 16 more bits per weight keep them, exactly as float32 weights (float16: from 2^-16 on).
        "stochastic": rounded up or down by chances whose mean is right; ``seed`` starts them and is advanced by every
        step, so that a run repeats itself, on every backend and number of threads. ``optimizer.first_elements[p]``
        tells where p begins when it is a part of a larger weight.
    backend: "auto", "cuda", "triton", "cpu" or "reference".
    fused, foreach: accepted as torch's are; every backend is fused. differentiable: not offered.

    State per weight: torch's, ``scale``, where that learns ``scale_velocity`` and ``scale_growth``, which are like it
    (a velocity of infinity: it has learned), and ``remainder`` (int16) where it is kept. Raises ValueError,
    TypeError or RuntimeError (a backend that is absent) with the argument, its value and the remedy.
    """


class TorchKeywords(TypedDict, total=False):
    """Those of torch.optim.SGD and torch.optim.AdamW."""

    lr: float | Tensor
    weight_decay: float
    momentum: float
    dampening: float
    nesterov: bool
    betas: tuple[float | Tensor, float | Tensor]
    eps: float
    amsgrad: bool
    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | None


class GroupKeywords(_OfTraining, TorchKeywords, total=False):
    """What :func:`~askew_cuda.param_groups` takes for every quantized group."""
