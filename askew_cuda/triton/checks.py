"""What can be wrong with a call of the Triton step, found before anything is written: its kernel takes addresses on
trust.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = Sequence[Tensor]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Lists(NamedTuple):
    """The lists of one call; those of ``state``, by name, are empty or have a tensor for each weight."""

    weights: Tensors
    grads: Tensors
    state: dict[str, Tensors]
    scales: Tensors
    levels: tuple[float, ...]
    codes: Tensors
    snapped: Tensors

    def beside_weights(self) -> dict[str, Tensors]:
        """The lists whose tensors have the shapes of the weights, by name."""
        return {"grads": self.grads, **self.state, "codes": self.codes, "snapped": self.snapped}


def by_channel(weight: Tensor, scale: Tensor) -> bool:
    """Whether there is a scale for each index of the weight's first dimension, (channels, 1, ..)."""
    return (
        scale.numel() > 1
        and weight.dim() > 0
        and scale.dim() == weight.dim()
        and scale.numel() == weight.shape[0] == scale.shape[0]
    )


def _by_group(weight: Tensor, scale: Tensor) -> bool:
    rows = scale.numel() > 1 and weight.dim() > 1 and scale.dim() == 2 and scale.shape[0] == weight.shape[0]
    return rows and weight.numel() // scale.shape[0] % scale.shape[1] == 0


def _check_tensors(name: str, tensors: Tensors, lists: Lists) -> None:
    """Number, shapes, devices and layouts of a list beside the weights'."""
    weights = lists.weights
    if name != "grads" and not tensors:
        return
    if len(tensors) != len(weights):
        raise ValueError(f"askew_cuda: {name} has {len(tensors)} tensors for {len(weights)} weights")
    for i, (weight, tensor) in enumerate(zip(weights, tensors, strict=True)):
        what = f"askew_cuda: {name}[{i}]"
        if tensor.shape != weight.shape:
            raise ValueError(f"{what} has shape {list(tensor.shape)} but weights[{i}] has {list(weight.shape)}")
        if tensor.device != weight.device:
            raise ValueError(f"{what} is on {tensor.device} but weights[{i}] is on {weight.device}")
        if tensor.layout != torch.strided:
            raise ValueError(f"{what} is not a dense tensor")
        dtype, first = tensor.dtype, weights[0].dtype
        if name == "codes":
            if dtype != torch.uint8:
                raise TypeError(f"{what} is {dtype}; codes are uint8")
        elif dtype != tensors[0].dtype:
            raise TypeError(f"{what} is {dtype} but {name}[0] is {tensors[0].dtype}")
        elif name == "snapped":
            if dtype not in _FLOATS:
                raise TypeError(f"{what} has dtype {dtype}; float32, float64, bfloat16 and float16 are supported")
        elif name == "grads":
            if dtype != first:
                raise TypeError(f"{what} is {dtype} but weights[{i}] is {first}")
        elif dtype != first and not (dtype == torch.float32 and first.itemsize == 2):
            raise TypeError(
                f"{what} is {dtype} for weights of {first}; their dtype, or float32 for 16-bit weights, is supported"
            )


def _check_weights(weights: Tensors) -> None:
    for i, weight in enumerate(weights):
        if weight.dtype != weights[0].dtype:
            raise TypeError(
                f"askew_cuda: weights[{i}] is {weight.dtype} but weights[0] is {weights[0].dtype}; one call takes one dtype"
            )
        if weight.dtype not in _FLOATS or weight.dtype == torch.float64:
            raise TypeError(
                f"askew_cuda: a weight has dtype {weight.dtype}; float32, bfloat16 and float16 are supported by Triton"
            )
        if weight.device != weights[0].device:
            raise ValueError(f"askew_cuda: weights[{i}] is on {weight.device} but weights[0] is on {weights[0].device}")
        if torch._debug_has_internal_overlap(weight) == 1:
            raise ValueError(f"askew_cuda: weights[{i}] of strides {weight.stride()} overlaps itself; clone() it")


def _check_scales(lists: Lists) -> None:
    weights, scales = lists.weights, lists.scales
    wanted = len(weights) if lists.levels else 0
    if len(scales) != wanted:
        raise ValueError(
            f"askew_cuda: scales has {len(scales)} tensors; {wanted} are needed for {len(weights)} weights and {len(lists.levels)} levels"
        )
    for i, (weight, scale) in enumerate(zip(weights, scales, strict=False)):
        if scale.dtype != torch.float32:
            raise TypeError(
                f"askew_cuda: scales[{i}] has dtype {scale.dtype}; torch.float32 goes with weights of {weight.dtype}"
            )
        if scale.device != weight.device:
            raise ValueError(f"askew_cuda: scales[{i}] is on {scale.device} but weights[{i}] is on {weight.device}")
        if not (scale.numel() == 1 or weight.numel() == 0 or by_channel(weight, scale) or _by_group(weight, scale)):
            raise ValueError(
                f"askew_cuda: scales[{i}] has shape {list(scale.shape)} for a weight of shape {list(weight.shape)}; (), (channels, 1, ..) "
                "or (rows, groups) are understood"
            )


def _check_levels(levels: tuple[float, ...]) -> None:
    if levels and not 2 <= len(levels) <= 256:
        raise ValueError(f"askew_cuda: levels has {len(levels)} entries; 2 to 256 are supported")
    rounded = torch.tensor(levels, dtype=torch.float32).tolist()
    for k, level in enumerate(levels):
        if rounded[k] != level:
            raise ValueError(f"askew_cuda: levels[{k}] = {level:g} is not a float32 number; round it first")
        if k > 0 and not level > levels[k - 1]:
            raise ValueError(
                f"askew_cuda: levels[{k}] = {level:g} is not above levels[{k - 1}] = {levels[k - 1]:g}; levels are strictly increasing"
            )


def check_lists(lists: Lists) -> None:
    """Raises ValueError or TypeError, which names the argument and its value. At least one weight."""
    _check_weights(lists.weights)
    for name, tensors in lists.beside_weights().items():
        _check_tensors(name, tensors, lists)
    kinds = {name: tensors[0].dtype for name, tensors in lists.state.items() if tensors}
    if len(set(kinds.values())) > 1:
        raise TypeError(f"askew_cuda: the dtypes of the states differ: {kinds}; one dtype for all")
    _check_levels(lists.levels)
    _check_scales(lists)
    if not lists.levels and (lists.codes or lists.snapped):
        raise ValueError("askew_cuda: codes and snapped need levels")


def check_constraint(anneal: str, skew_at: str, recovery: float | None, alpha: float | None) -> None:
    """Raises ValueError, which names the argument and its value."""
    if anneal not in ("interval", "capture"):
        raise ValueError(f"askew_cuda: anneal = {anneal!r}; 'interval' or 'capture'")
    if skew_at not in ("gradient", "velocity"):
        raise ValueError(f"askew_cuda: skew_at = {skew_at!r}; 'gradient' or 'velocity'")
    if (recovery is None) == (alpha is None):
        raise ValueError("askew_cuda: give recovery or alpha, not both and not neither")
    if skew_at == "gradient" and (alpha is None or anneal == "capture"):
        raise ValueError("askew_cuda: skew_at = 'gradient' needs alpha and anneal = 'interval'")


def check_moments(
    weights: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, max_exp_avg_sqs: Tensors, steps: Tensors, amsgrad: bool
) -> None:
    """What AdamW needs beyond check_lists(). Raises ValueError or TypeError."""
    if not exp_avgs or not exp_avg_sqs:
        raise ValueError("askew_cuda: adamw_ needs exp_avgs and exp_avg_sqs")
    if bool(amsgrad) != bool(max_exp_avg_sqs):
        raise ValueError(
            f"askew_cuda: amsgrad = {bool(amsgrad)} but max_exp_avg_sqs has {len(max_exp_avg_sqs)} tensors"
        )
    if len(steps) != len(weights):
        raise ValueError(f"askew_cuda: steps has {len(steps)} tensors for {len(weights)} weights")
    for i, step in enumerate(steps):
        if (
            step.numel() != 1
            or step.dtype not in (torch.float32, torch.float64)
            or step.device not in (torch.device("cpu"), weights[0].device)
        ):
            raise TypeError(
                f"askew_cuda: steps[{i}] is {step.dtype} of shape {list(step.shape)} on {step.device}; a 0-d float32 or float64 tensor on "
                "the CPU or with the weights is needed"
            )
        if step.device != steps[0].device:
            raise ValueError(f"askew_cuda: steps[{i}] is on {step.device} but steps[0] is on {steps[0].device}")
