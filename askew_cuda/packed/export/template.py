"""GGUF files for llama.cpp, made from templates: files of the same architecture, whose metadata, names and order of
rows are taken over.

By rows: the template is what llama.cpp's converter made of the snapped model, and every tensor whose rows are those of
a quantized weight, in whatever order, is replaced by blocks. By names: any file, and the names that its tensors have.
"""

import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..file import Trained
from .blocks import Blocks, BlockType, written_blocks
from .ggml_file import PLAIN_TYPES, GgufReader, NewTensor, plain_tensor, same_shape, write_gguf
from .rows import model_order


def held(number: int, shape: tuple[int, ...], raw: Tensor) -> NewTensor:
    """Bytes that are there already, to be written."""
    return NewTensor(number, shape, lambda: raw.reshape(-1))


def _kept(reader: GgufReader, name: str) -> NewTensor:
    """A tensor of the template, as it is."""
    entry = reader.tensors[name]
    return NewTensor(entry.number, entry.shape, lambda: reader.read(name))


def into_named(
    path: str | os.PathLike[str],
    template: str | os.PathLike[str],
    tensors: Mapping[str, Trained | Tensor],
    names: Mapping[str, str],
    rows: str | None,
    of_type: Callable[[str, Trained, int], tuple[BlockType, Blocks]],
) -> dict[str, str]:
    """Writes the template with the model's tensors in place of those of these names. ``of_type``: the blocks of a
    tensor, by its name and the type in the template. Returns the type of each quantized tensor, by its name there.

    Raises: ValueError: the template has no such tensor, or one of another shape, or ``rows`` has to be known.
    """
    found: dict[str, str] = {}
    with open(template, "rb") as file:
        reader = GgufReader(file, template)
        new = {name: _kept(reader, name) for name in reader.tensors}
        for own, tensor in tensors.items():
            name = names.get(own, own)
            shape = tuple((tensor.codes if isinstance(tensor, Trained) else tensor).shape)
            there = reader.tensors.get(name)
            if there is None or not same_shape(there.shape, shape):
                what = "there is none" if there is None else f"it has shape {there.shape}"
                raise reader.error(f"{name!r}, which {own} of shape {shape} is to take the place of: {what}")
            order = model_order(reader, name, rows)
            if isinstance(tensor, Trained):
                kind, blocks = of_type(own, tensor, there.number)
                raw, number, found[name] = written_blocks(kind, blocks), kind.number, kind.name
            else:
                plain = plain_tensor(own, tensor)
                raw, number = plain.data(), plain.number
            if order is not None:
                raw = raw.reshape(len(order), raw.numel() // len(order))[order.argsort()]
            new[name] = held(number, there.shape, raw)
        write_gguf(path, reader.metadata, new, reader.alignment)
    return found


def into_same_rows(
    path: str | os.PathLike[str],
    template: str | os.PathLike[str],
    trained: dict[str, Trained],
    made: dict[str, tuple[BlockType, Blocks]],
) -> dict[str, str]:
    """Writes the template with blocks in place of every tensor whose rows are those of a quantized weight, in whatever
    order. Returns the type of each, by its name there.

    Raises: ValueError: a quantized weight has no such tensor.
    """
    found: dict[str, str] = {}
    used: set[str] = set()
    marks: dict[torch.dtype, dict[tuple[int, ...], list[str]]] = {}  # of our weights, in the types of the template
    with open(template, "rb") as file:
        reader = GgufReader(file, template)
        new: dict[str, NewTensor] = {}
        for name, entry in reader.tensors.items():
            new[name] = _kept(reader, name)
            dtype = PLAIN_TYPES.get(entry.number, torch.int8)
            if not dtype.is_floating_point:
                continue
            if dtype not in marks:
                marks[dtype] = {}
                for own, each in trained.items():
                    marks[dtype].setdefault(_row_mark(each.weight().to(dtype)), []).append(own)
            there = reader.read(name).view(dtype).reshape(entry.shape)
            for own in marks[dtype].get(_row_mark(there), ()):
                order = _order(there, trained[own].weight())
                if order is not None:
                    kind, blocks = made[own]
                    width = entry.shape[-1] // kind.weights * kind.size
                    raw = written_blocks(kind, blocks).reshape(-1, width)[order]
                    new[name] = held(kind.number, entry.shape, raw)
                    found[name] = kind.name
                    used.add(own)
                    break
        missing = sorted(set(trained) - used)
        if missing:
            raise reader.error(
                f"none of its tensors has the rows of {', '.join(missing[:5])} ({len(missing)} in all): a template is "
                "made of the snapped model, loaded by load_packed and saved, by llama.cpp's converter, with --outtype "
                "f32, f16 or bf16"
            )
        write_gguf(path, reader.metadata, new, reader.alignment)
    return found


def _order(rows: Tensor, ours: Tensor) -> Tensor | None:
    """Which of our rows each row of theirs is, (rows,) int64; None where they are not the same rows. Converters
    exchange rows, of queries and keys for instance, and never columns.
    """
    ours = ours.to(rows.dtype)
    rows, ours = (each.reshape(-1, each.shape[-1]) if each.dim() else each.reshape(1, 1) for each in (rows, ours))
    if torch.equal(rows, ours):
        return torch.arange(len(rows))
    theirs, mine = (_hashes(each) for each in (rows, ours))
    if not torch.equal(theirs.sort().values, mine.sort().values):
        return None
    order = torch.empty_like(theirs)
    order[theirs.argsort(stable=True)] = mine.argsort(stable=True)
    return order if torch.equal(rows, ours[order]) else None


def _row_mark(rows: Tensor) -> tuple[int, ...]:
    """The same for equal rows in whatever order."""
    rows = rows.reshape(-1, rows.shape[-1]) if rows.dim() else rows.reshape(1, 1)
    return (*rows.shape, int(_hashes(rows).sum()))


def _hashes(rows: Tensor) -> Tensor:
    """(rows,) int64, equal for equal rows."""
    words = rows.contiguous().view(torch.int16 if rows.dtype.itemsize == 2 else torch.int32).long()
    factors = torch.randint(2**62, (words.shape[1],), generator=torch.Generator().manual_seed(0))
    return (words * factors).sum(1)  # modulo 2^64
