"""GGUF, which llama.cpp runs: packed files written as blocks of the very codes and scales that were trained, and GGUF
files read back as weights to train on.

No table of names is kept: see template.py.
"""

import contextlib
import functools
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...quantizer import Codebook, Quantizer
from ...reference import arithmetic
from ..file import Trained, model_state, read_tensors
from .blocks import TYPES, Blocks, BlockType, digits_for, level_digits, read_blocks, values, written_blocks
from .ggml_file import (
    I2_S,
    PLAIN_TYPES,
    GgufReader,
    NewTensor,
    plain_tensor,
    plain_text,
    plain_whole,
    same_shape,
    write_gguf,
)
from .grids import Groups, by_groups, last_run, survives, taken_over
from .holders import or_who_else
from .rows import OWN_ARCHITECTURE, check_rows, model_order
from .template import held, into_named, into_same_rows

_BY_NUMBER = {kind.number: kind for kind in TYPES.values()}


def export_gguf(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    template: str | os.PathLike[str] | None = None,
    type: str | None = None,
    names: Mapping[str, str] | None = None,
    rows: str | None = None,
) -> dict[str, str]:
    """Writes a packed file as GGUF. Every reader computes the very weights that were trained: each block is read back
    and compared, bit for bit, before anything is written. The file appears at once and whole, or not at all.

    Args:
        source: a file of :func:`askew_cuda.save_packed`.
        path: of the GGUF file.
        template: a GGUF file that llama.cpp's converter made of the snapped model, in F32, F16 or BF16; its metadata,
            names and order of rows are taken over. None: tensors under the model's own names, for
            :func:`load_gguf`. With ``names``: any GGUF file of the architecture, such as the one that training went on
            from.
        type: of blocks, such as "Q4_0"; None takes, for each tensor, that of the template, where it is one that holds
            it, else the smallest that does.
        names, rows: as in :func:`load_gguf`: which tensor of the template each tensor of the model takes the place of,
            whatever it holds.

    Returns: The block type of each quantized tensor, under its name in the GGUF file.

    Raises: ValueError: no type, or not this one, holds a tensor's levels and granularity, a scale is not a float16
        number, or the template has no such rows or names; the message says what would do. OSError: a file can't be read
        or written.
    """
    if type is not None and type not in TYPES:
        why = f": {I2_S}" if type.upper() == "I2_S" else ""
        raise ValueError(f"export_gguf: type = {type!r}{why}; take one of {', '.join(TYPES)}, or None")
    tensors, _ = read_tensors(source)
    trained = {name: each for name, each in tensors.items() if isinstance(each, Trained)}
    check_rows(rows, "export_gguf")
    if template is None and not (names is None and rows is None):
        raise ValueError("export_gguf: names and rows go with a template, whose tensors are replaced")
    if template is not None and names is not None:
        return into_named(path, template, tensors, names, rows, functools.partial(_of_type, type=type))
    made = {name: or_who_else(functools.partial(blocks_of, type=type), name, each) for name, each in trained.items()}
    if template is not None:
        return into_same_rows(path, template, trained, made)
    new: dict[str, NewTensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Trained):
            kind, blocks = made[name]
            new[name] = held(kind.number, tuple(tensor.codes.shape), written_blocks(kind, blocks))
        else:
            new[name] = plain_tensor(name, tensor)
    metadata = {
        "general.architecture": plain_text(OWN_ARCHITECTURE),
        "general.quantization_version": plain_whole(2),
    }
    write_gguf(path, metadata, new)
    return {name: kind.name for name, (kind, _) in made.items()}


def blocks_of(name: str, trained: Trained, type: str | None = None) -> tuple[BlockType, Blocks]:
    """A tensor as blocks of the smallest type that holds it exactly, or of a given one.

    Raises: ValueError: there is none; with what is wrong with each.
    """
    wrong = []
    for kind in TYPES.values() if type is None else (TYPES[type],):
        found = _blocks(kind, trained)
        if not isinstance(found, str):
            return kind, found
        wrong.append(f"{kind.name}: {found}")
    can = [kind.name for kind in TYPES.values() if type is not None and not isinstance(_blocks(kind, trained), str)]
    advice = f"; {' or '.join(can)} would do" if can else ""
    raise ValueError(
        f"{name}, {trained.quantizer.summary()}, shape {tuple(trained.codes.shape)}, can't be written to GGUF as "
        f"trained: {'; '.join(wrong)}{advice}"
    )


def _of_type(name: str, trained: Trained, there: int, type: str | None) -> tuple[BlockType, Blocks]:
    """A tensor as blocks of the given type; where there is none of the type ``there``, if that holds it."""
    same = _BY_NUMBER.get(there)
    if type is None and same is not None and not isinstance(_blocks(same, trained), str):
        type = same.name
    return or_who_else(functools.partial(blocks_of, type=type), name, trained)


def _blocks(kind: BlockType, trained: Trained) -> Blocks | str:
    """The tensor in blocks of this type, or why not."""
    levels = trained.quantizer.codebook.levels
    groups = by_groups(trained, kind.weights)
    if groups is None:
        return (
            f"blocks of {kind.weights} don't fit scales for every {last_run(trained)} weights along the last dimension"
        )
    codes, scale = groups.codes.reshape(-1, kind.weights).int(), groups.scale.reshape(-1, 1)
    digits = digits_for(kind, levels)
    turned = _turned_blocks(kind, levels, codes) if digits is None else None
    if digits is not None:
        coded, d = digits.of_code[codes], scale * digits.factor
    elif turned is not None:
        coded, d = turned[0], scale * turned[1]
    else:
        return f"its digits don't hold levels {_shown(levels)}"
    m = None if digits is None or digits.shift is None else scale * digits.shift
    normal = survives(d, torch.float16) and bool((d.abs() >= torch.finfo(torch.float16).tiny).all())
    if not normal or not (m is None or survives(m, torch.float16)):
        return (
            f"its scales are normal float16 numbers, which {float(scale.flatten()[0]):.9g} or another is not: round "
            "them to 7 significant bits before annealing (short_scales=True), inside of 2^-14 .. 2^15"
        )
    blocks = Blocks(coded, d.half(), None if m is None else m.half())
    if not torch.equal(values(kind, blocks), trained.weight().reshape(-1, kind.weights).to(arithmetic(trained.dtype))):
        return f"{trained.dtype} weights are rounded, and it would not round them"
    return blocks


def _turned_blocks(kind: BlockType, levels: tuple[float, ...], codes: Tensor) -> tuple[Tensor, Tensor] | None:
    """Digits, and what d is times the scale, (blocks, 1), where some blocks need a negative d to hold their levels, as
    llama.cpp's own quantizer gives half of them; None where that does not do either. A 0 then has a minus.
    """
    if kind.first is None or kind.step != 1:
        return None
    top = kind.first + kind.digits - 1
    most = max(-kind.first, top)
    found = level_digits(levels, -most, 1, 2 * most + 1)
    if found is None:
        return None
    stood = found.of_code[codes].int() - most
    outside = ((stood < kind.first) | (stood > top)).any(1, keepdim=True)
    stood = torch.where(outside, -stood, stood)
    if bool(((stood < kind.first) | (stood > top)).any()):
        return None
    return (stood - kind.first).to(torch.uint8), torch.where(outside, -found.factor, found.factor)


def _shown(levels: tuple[float, ...]) -> str:
    return ", ".join(f"{level:g}" for level in levels[:8]) + (f" .. ({len(levels)})" if len(levels) > 8 else "")


# The way back


class _NoCodebook(ValueError):
    """Blocks that stand for numbers, but for none of levels that they share."""


def load_gguf(
    path: str | os.PathLike[str],
    model: nn.Module,
    names: Mapping[str, str] | None = None,
    *,
    rows: str | None = None,
    floats: bool = False,
) -> list[dict[str, Any]]:
    """Reads a GGUF file into a model, every weight as the file's other readers compute it, and returns what goes on
    training it. All is checked before anything in the model changes.

    Args:
        path: of a file with tensors in F32, F16, BF16, Q1_0, Q2_0, TQ1_0, TQ2_0, Q4_0, Q8_0, and in Q4_1 or Q2_K where
            their shifts are those of a codebook, as :func:`export_gguf` writes them.
        model: of the architecture in the file; the weights are float32 wherever the file's are. Mutated.
        names: from names in the model's state_dict to those in the file; None where they are the same.
        rows: of queries and keys, which llama.cpp's converter exchanges for some architectures: "halves" puts them back
            into the order of transformers' models of such an architecture, llama for one; "stored" takes them as they
            lie there. None: a file that has queries and keys is refused, unless :func:`export_gguf` wrote it without a
            template.
        floats: takes tensors whose blocks are no codebook's, such as those of Q4_1 with a shift for each block, as the
            numbers that they stand for, to be quantized anew; else they are refused.

    Returns: Param groups for a fresh AskewSGD or AskewAdamW, as :func:`askew_cuda.load_packed` returns them.

    Raises: ValueError: the file is damaged or does not fit the model, or blocks are no codebook's; the message names
        file and tensor, and the model is unchanged. OSError: it can't be read.
    """
    check_rows(rows, "load_gguf")
    own, _ = model_state(model, "load_gguf")
    given = {} if names is None else names
    with open(path, "rb") as file:
        reader = GgufReader(file, path)
        missing = sorted(name for name in own if given.get(name, name) not in reader.tensors)
        if missing:
            raise reader.error(
                f"{', '.join(missing[:5])} ({len(missing)} in all) of the model are not in it; names= says what they "
                f"are called there, such as {next(iter(reader.tensors), None)!r}"
            )
        found = {
            name: _value(reader, given.get(name, name), name, tensor, rows, floats) for name, tensor in own.items()
        }
    return taken_over(model, own, found)


def _value(
    reader: GgufReader, there: str, name: str, target: Tensor, rows: str | None, floats: bool
) -> Trained | Tensor:
    """What the file holds for a tensor of the model."""
    entry = reader.tensors[there]
    if not same_shape(entry.shape, target.shape):
        raise reader.error(f"{there!r} has shape {entry.shape}; {tuple(target.shape)}, as {name}, is needed")
    order, raw = model_order(reader, there, rows), reader.read(there)
    if order is not None:
        raw = raw.reshape(len(order), raw.numel() // len(order))[order].reshape(-1)
    if entry.number in PLAIN_TYPES:
        value = raw.view(PLAIN_TYPES[entry.number]).reshape(target.shape)
        kept = value.to(target.dtype).to(value.dtype)
        if not bool(((kept == value) | value.isnan()).all()):
            raise reader.error(
                f"{there!r} is {value.dtype}, more than {target.dtype}, as {name}, holds; widen the model"
            )
        return value
    kind = _BY_NUMBER.get(entry.number)
    if kind is None:
        raise reader.error(f"{there!r} is of type {entry.number}; {', '.join(TYPES)} and plain numbers can be read")
    if target.dtype not in (torch.float32, torch.float64) or target.dim() < 1:
        raise reader.error(f"{there!r} stands for float32 weights; {name} is {target.dtype}: take model.float()")
    try:
        blocks = read_blocks(kind, raw.reshape(-1, kind.size))
        with contextlib.suppress(_NoCodebook) if floats else contextlib.nullcontext():
            return trained_of(kind, blocks, tuple(target.shape), target.dtype)
    except _NoCodebook as error:
        raise reader.error(f"{there!r}: {error}; floats=True takes the numbers") from error
    except ValueError as error:
        raise reader.error(f"{there!r}: {error}") from error
    numbers = values(kind, blocks).reshape(target.shape)
    if not bool(numbers.isfinite().all()):
        raise reader.error(f"{there!r} holds NaN or infinity")
    return numbers


def trained_of(kind: BlockType, blocks: Blocks, shape: tuple[int, ...], dtype: torch.dtype) -> Trained:
    """Blocks as codes of a codebook and positive scales, as few as there are different ones along the last dimension.

    Raises: ValueError: a scale is NaN, infinite or, where no level is 0, zero; or the shifts are no codebook's.
    """
    d = blocks.d.float()
    if not d.numel():
        raise ValueError("it is empty, and has no scale")
    if not bool(d.isfinite().all()):
        raise ValueError("a scale is NaN or infinite")
    levels = _levels_of_blocks(kind, blocks)
    digits = blocks.digits.long()
    if bool((d < 0).any()):
        levels, digits = _mirrored(levels, digits, d)
    dead = d == 0
    if bool(dead.any()):
        if 0 not in levels:
            raise ValueError("a scale is 0, and no level is")
        digits = torch.where(dead, levels.index(0), digits)
        d = torch.where(dead, 1.0, d)
    groups = Groups(digits.to(torch.uint8), d.abs().reshape(-1, shape[-1] // kind.weights))
    quantizer, scale = _fewest(Codebook(levels), groups, shape, kind.weights)
    trained = Trained(quantizer, 0, dtype, groups.codes.reshape(shape), scale.to(arithmetic(dtype)))
    if not torch.equal(trained.weight().float().reshape(blocks.digits.shape), values(kind, blocks)):
        raise _NoCodebook(f"blocks of {kind.name} whose products are rounded otherwise than those of a codebook")
    return trained


def _levels_of_blocks(kind: BlockType, blocks: Blocks) -> tuple[float, ...]:
    """What the digits stand for, in units of d."""
    if blocks.m is None:
        assert kind.first is not None
        return tuple(float(kind.first + kind.step * digit) for digit in range(kind.digits))
    first = blocks.m.float() / blocks.d.float()
    value = float(first[0])
    if not math.isfinite(value) or not bool((first == value).all()) or value * 2 != round(value * 2):
        raise _NoCodebook(f"blocks of {kind.name} have shifts of their own, which are those of no codebook")
    return tuple(value + digit for digit in range(kind.digits))


def _mirrored(levels: tuple[float, ...], digits: Tensor, d: Tensor) -> tuple[tuple[float, ...], Tensor]:
    """Levels and digits of positive scales, where some are negative: those levels stand on the other side of 0."""
    stood = torch.tensor(levels, dtype=torch.float64)[digits] * torch.where(d < 0, -1.0, 1.0)
    if not bool(torch.isin(stood, torch.tensor(levels, dtype=torch.float64)).all()):
        levels = tuple(sorted({*(0.0 - level for level in levels), *levels}))
        if len(levels) > 256:
            raise ValueError(f"a negative scale with a digit of {levels[0]:g}")
    return levels, torch.searchsorted(torch.tensor(levels, dtype=torch.float64), stood.contiguous())


def _fewest(book: Codebook, groups: Groups, shape: tuple[int, ...], size: int) -> tuple[Quantizer, Tensor]:
    """The coarsest granularity that has these scales: per tensor, channel, or the largest groups."""
    scale = groups.scale
    if bool((scale == scale.flatten()[0]).all()):
        return Quantizer(book), scale.flatten()[0].clone()
    if len(shape) < 2:
        raise ValueError(f"scales of its own for every {size} weights of one dimension, which has one")
    rows = scale.reshape(shape[0], -1)
    if bool((rows == rows[:, :1]).all()):
        return Quantizer(book, granularity="channel"), rows[:, :1].reshape(-1, *(1 for _ in shape[1:])).clone()
    while rows.shape[1] % 2 == 0 and bool((rows[:, ::2] == rows[:, 1::2]).all()):
        rows, size = rows[:, ::2], 2 * size
    return Quantizer(book, granularity="group", group_size=size), rows.contiguous()
