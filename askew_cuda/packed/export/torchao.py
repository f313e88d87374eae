"""torchao: quantized weights as IntxUnpackedToInt8Tensor, which its linear layers, torch.export and ExecuTorch take."""

import itertools
import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..file import Trained, read_tensors
from ..safetensors import TensorWriter, replacing
from .grids import by_groups, last_run
from .holders import or_who_else

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def torchao_state(source: str | os.PathLike[str]) -> dict[str, Any]:
    """A packed file as a state_dict whose quantized weights are torchao's; others are plain tensors. For
    ``model.load_state_dict(.., assign=True)``. The package torchao is needed.

    Every uniform codebook of up to 8 bits is exact: half-integers by a zero point that is a float.

    Args:
        source: a file of :func:`askew_cuda.save_packed`; of weights of two dimensions.

    Raises: ValueError: the levels are not equally far apart, a weight has other than two dimensions or is float64, or
        torchao would compute other weights; the message names it. ModuleNotFoundError: torchao is not installed.
    """
    tensors, tied = read_tensors(source)
    state = {
        name: or_who_else(_converted, name, each) if isinstance(each, Trained) else each
        for name, each in tensors.items()
    }
    return {**state, **{name: state[first] for name, first in tied.items()}}


def export_torchao(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Writes the same as a safetensors file, which ``torchao.prototype.safetensors`` reads back.

    Raises: as :func:`torchao_state`. OSError: a file can't be read or written.
    """
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    tensors, strings = flatten_tensor_state_dict(torchao_state(source))
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with replacing(path) as file:
        writer = TensorWriter(file, described, lambda digests: {"format": "pt", **strings})
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()


class Affine(NamedTuple):
    """A weight as ``scale (q - zero)`` in groups of ``size``."""

    q: Tensor  # (rows, columns) int8, of ``bits``
    scale: Tensor  # (rows, columns / size), as zero of the weights' dtype
    zero: Tensor
    bits: int
    size: int


def affine_integers_of(name: str, trained: Trained) -> Affine:
    """A quantized tensor in the terms of torchao, which is not asked.

    Raises: ValueError: its levels, dimensions or dtype are none of torchao's; the message names it.
    """
    levels, size = trained.quantizer.codebook.levels, last_run(trained)
    step = levels[1] - levels[0]
    wrong = None
    if any((upper - lower) != step for lower, upper in itertools.pairwise(levels)):
        wrong = "torchao's levels are equally far apart; uniform codebooks and integers are, ternary and binary, too"
    elif trained.codes.dim() != 2 or not trained.codes.numel():
        wrong = "weights of two dimensions are needed; others stay in the packed file"
    elif trained.dtype not in _FLOATS:
        wrong = "float32, bfloat16 or float16 weights are needed"
    groups = by_groups(trained, size)
    if wrong is not None or groups is None:
        raise ValueError(
            f"{name}, {trained.quantizer.summary()}, shape {tuple(trained.codes.shape)} of {trained.dtype}: {wrong}"
        )
    bits = max(1, math.ceil(math.log2(len(levels))))
    low = -(2 ** (bits - 1))
    scale = (groups.scale * step).to(trained.dtype)
    zero = torch.full_like(scale, low - levels[0] / step)
    return Affine((trained.codes.short() + low).to(torch.int8), scale, zero, bits, size)


def _converted(name: str, trained: Trained) -> Any:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    q, scale, zero, bits, size = affine_integers_of(name, trained)
    target = getattr(torch, f"int{bits}")
    made = IntxUnpackedToInt8Tensor(q, scale, zero, target, (1, size), trained.dtype, None)
    if not torch.equal(made.dequantize(), trained.weight()):
        raise ValueError(
            f"{name}, {trained.quantizer.summary()}: torchao rounds its {trained.dtype} weights otherwise; scales of 7 "
            "significant bits (short_scales=True) survive it, or train in float32"
        )
    return made
