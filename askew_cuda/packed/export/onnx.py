"""ONNX: a model that torch.onnx exported of the snapped weights, whose initializers become integers and a
DequantizeLinear node each.

No table of names is kept: an initializer is a quantized weight where its values are, as they are or transposed.
"""

import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..file import Trained, read_tensors
from ..safetensors import replacing
from .grids import by_groups, integers_for, last_run
from .holders import or_who_else

# bits: (opset, version of the file format, ONNX's type of the integers); narrower types came later
_INTEGER_TYPES = {2: (25, 13, "INT2"), 4: (21, 10, "INT4"), 8: (21, 10, "INT8")}


class Integers(NamedTuple):
    """A weight as ``scale * integer``."""

    values: Tensor  # (...) int8, as the weight
    scale: Tensor  # (..., last dimension / size) float32
    size: int  # weights along the last dimension that share a scale
    bits: int


def export_onnx(
    source: str | os.PathLike[str], path: str | os.PathLike[str], *, template: str | os.PathLike[str], bits: int = 4
) -> dict[str, str]:
    """Writes an ONNX model whose weights are stored as integers, and dequantized to the very floats that were trained.
    The packages onnx and numpy are needed. The file appears at once and whole, or not at all.

    Args:
        source: a file of :func:`askew_cuda.save_packed`, of float32 weights.
        path: of the model.
        template: what ``torch.onnx.export`` made of the snapped model, with its weights inside of the file.
        bits: of the narrowest integers to take: 2 (opset 25), 4 or 8 (opset 21).

    Returns: The type of each initializer that was replaced, by its name in the model.

    Raises: ValueError: a codebook is none of integers of up to 8 bits times a number, or the template does not have the
        weights; the message says which. OSError: a file can't be read or written. ModuleNotFoundError: onnx is not
        installed.
    """
    import onnx
    from onnx import helper, numpy_helper

    if bits not in _INTEGER_TYPES:
        raise ValueError(f"export_onnx: bits = {bits!r}; 2, 4 or 8")
    tensors, _ = read_tensors(source)
    wanted = {name: each for name, each in tensors.items() if isinstance(each, Trained)}
    integers = {
        name: or_who_else(functools.partial(integers_of, least=bits), name, each) for name, each in wanted.items()
    }
    model = _loaded(template, [_INTEGER_TYPES[each.bits] for each in integers.values()])
    marks: dict[tuple[Any, ...], list[str]] = {}
    for name, each in wanted.items():
        marks.setdefault(_mark(each.weight()), []).append(name)
    made: dict[str, str] = {}
    used: set[str] = set()
    nodes: list[Any] = []
    for initializer in list(model.graph.initializer):
        if initializer.data_type != onnx.TensorProto.FLOAT or len(initializer.dims) < 1:
            continue
        there = torch.from_numpy(numpy_helper.to_array(initializer).copy())
        for name in marks.get(_mark(there), ()):
            turned = _turned(there, wanted[name].weight())
            if turned is None:
                continue
            whole, axis = integers[name], there.dim() - 1 if not turned else 0
            kind = _INTEGER_TYPES[whole.bits][2]
            new, scale = (t.mT.contiguous() if turned else t.contiguous() for t in (whole.values, whole.scale))
            own = initializer.name
            parts = [f"{own}.integers", f"{own}.scale"]
            model.graph.initializer.remove(initializer)
            model.graph.initializer.extend(
                [_integers(helper, onnx, parts[0], new, kind), numpy_helper.from_array(scale.numpy(), parts[1])]
            )
            nodes.append(helper.make_node("DequantizeLinear", parts, [own], axis=axis, block_size=whole.size))
            made[own] = kind
            used.add(name)
            break
    missing = sorted(set(wanted) - used)
    if missing:
        raise ValueError(
            f"{os.fspath(template)}: no initializer is {', '.join(missing[:5])} ({len(missing)} in all): "
            "a template is what torch.onnx.export makes of the snapped model, loaded by load_packed"
        )
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    with replacing(path) as file:
        file.write(model.SerializeToString())
    return made


def _loaded(template: str | os.PathLike[str], types: list[tuple[int, int, str]]) -> Any:
    """The model, converted to the opset that these types came with."""
    import onnx
    from onnx import version_converter

    model: Any = onnx.load(os.fspath(template))
    opset = max((each[0] for each in types), default=0)
    if max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=opset) < opset:
        model = version_converter.convert_version(model, opset)
    model.ir_version = max(model.ir_version, *(each[1] for each in types), 0)
    return model


def integers_of(name: str, trained: Trained, least: int = 2) -> Integers:
    """A quantized tensor as integers of ``least`` bits or more, times scales.

    Raises: ValueError: it is none; the message names it.
    """
    levels, size = trained.quantizer.codebook.levels, last_run(trained)
    for bits in sorted(_INTEGER_TYPES):
        half = 2 ** (bits - 1)
        found = integers_for(levels, -half, half - 1) if bits >= least else None
        groups = by_groups(trained, size)
        if found is None or groups is None:
            continue
        values, factor = found
        whole = torch.tensor(values, dtype=torch.int8)[trained.codes.int()]
        scale = (groups.scale * factor).float().reshape(*trained.codes.shape[:-1], -1)
        made = whole.float() * scale.repeat_interleave(size, -1)
        if trained.dtype == torch.float32 and torch.equal(made, trained.weight()):
            return Integers(whole, scale, size, bits)
    raise ValueError(
        f"{name}, {trained.quantizer.summary()} of {trained.dtype}: DequantizeLinear makes float32 weights of "
        "integers of up to 8 bits, which these levels are not; ternary, binary, int2 .. int8 and 2bit .. 7bit are"
    )


def _mark(weight: Tensor) -> tuple[Any, ...]:
    """The same for equal weights, transposed or not."""
    words = weight.contiguous().view(torch.int32).long()
    return (*sorted(weight.shape), int((words * words).sum()))


def _turned(there: Tensor, ours: Tensor) -> bool | None:
    """Whether an initializer is our weight transposed; None where it is not ours."""
    if there.shape == ours.shape and torch.equal(there, ours):
        return False
    return True if there.dim() == 2 and there.shape == ours.mT.shape and torch.equal(there, ours.mT) else None


def _integers(helper: Any, onnx: Any, name: str, values: Tensor, kind: str) -> Any:
    """An initializer of 2, 4 or 8 bits, two's complement, the first integer of a byte lowest."""
    bits = int(kind[3:])
    flat = values.reshape(-1).view(torch.uint8)
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(flat & (2**bits - 1), (0, -len(flat) % per_byte)).reshape(-1, per_byte)
    shifts = torch.tensor([2 ** (bits * k) for k in range(per_byte)], dtype=torch.uint8)
    raw = (padded * shifts).sum(1, dtype=torch.uint8)
    return helper.make_tensor(name, getattr(onnx.TensorProto, kind), values.shape, raw.numpy().tobytes(), raw=True)
