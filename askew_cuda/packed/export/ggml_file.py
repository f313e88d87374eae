"""GGUF files: metadata and tensors, written in one go and read with nothing taken for granted.

The format: magic, version, counts; metadata, each a key, a type and a value; tensors, each a name, dimensions, a type
and an offset; the data, aligned. Values are kept as the bytes that they are, so that what is copied stays what it was.
"""

import contextlib
import io
import math
import os
import reprlib
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..safetensors import replacing
from .blocks import TYPES

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = 32  # unless the metadata says otherwise
LONGEST_NAME = 63  # bytes; ggml keeps 64 of a tensor's, with an end
_NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # types of values: bytes
_UINT32, _STRING, _ARRAY = 4, 8, 9
PLAIN_TYPES = {
    0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64, 24: torch.int8, 25: torch.int16,
    26: torch.int32, 27: torch.int64,
}  # fmt: skip
_TYPE_OF = {dtype: number for number, dtype in PLAIN_TYPES.items()}
_I2_S_TYPE = 36
I2_S = (
    "bitnet.cpp, for which it is, scales a tensor by the mean of its absolute weights, whatever was trained; llama.cpp "
    "runs TQ1_0 and TQ2_0, which hold ternary weights and their scales"
)
# (weights, bytes) of a block; those that are not in TYPES are stepped over
_SIZES = {
    **{number: (1, dtype.itemsize) for number, dtype in PLAIN_TYPES.items()},
    **{kind.number: (kind.weights, kind.size) for kind in TYPES.values()},
    6: (32, 22), 7: (32, 24), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
}  # fmt: skip


class StoredTensor(NamedTuple):
    """Where a tensor of a GGUF file lies: bytes begin to end of the file."""

    number: int  # its type
    shape: tuple[int, ...]
    begin: int
    end: int


class NewTensor(NamedTuple):
    """A tensor that is to be written."""

    number: int  # its type
    shape: tuple[int, ...]
    data: Callable[[], Tensor]  # its bytes, (bytes,) uint8

    @property
    def size(self) -> int:
        weights, size = _SIZES[self.number]
        return math.prod(self.shape) // weights * size


class GgufReader:
    """A GGUF file whose header has been checked: every tensor lies in the file, and on no other one.

    Args:
        file: open for reading; the reader does not close it.
        path: for messages.

    Raises: ValueError: it is not a whole GGUF file; the message names file, tensor and what was expected.
    """

    def __init__(self, file: io.BufferedReader, path: str | os.PathLike[str]):
        self.file, self.path = file, os.fspath(path)
        self.size = os.fstat(file.fileno()).st_size
        if self._take(4) != MAGIC:
            raise self.error("it does not begin with GGUF")
        version = self._number("<I")
        if version not in VERSIONS:
            raise self.error(f"it has version {version}; {' or '.join(map(str, VERSIONS))} is needed")
        tensors, entries = self._number("<Q"), self._number("<Q")
        self.metadata: dict[str, tuple[int, bytes]] = {}
        for _ in range(self._count(entries, 12)):
            key = self._string()
            if key in self.metadata:
                raise self.error(f"{reprlib.repr(key)} occurs twice in its metadata")
            kind, begin = self._number("<I"), self.file.tell()
            self._skip(kind)
            end = self.file.tell()
            self.file.seek(begin)
            self.metadata[key] = kind, self._take(end - begin)
        self.alignment = self.whole("general.alignment", ALIGNMENT)
        if self.alignment < 8 or self.alignment & (self.alignment - 1):
            raise self.error(f"general.alignment = {self.alignment}; a power of two from 8 on is needed")
        found = [self._described() for _ in range(self._count(tensors, 24))]
        start = _aligned(self.file.tell(), self.alignment)
        self.tensors = {name: self._placed(name, number, shape, start + at) for name, number, shape, at in found}
        if len(self.tensors) < len(found):
            raise self.error("a tensor's name occurs twice")
        end = 0
        for name, entry in sorted(self.tensors.items(), key=lambda item: item[1].begin):
            if entry.begin < end:
                raise self.error(f"{name!r} begins at byte {entry.begin}, where the tensor before it goes on to {end}")
            end = entry.end

    def error(self, message: str) -> ValueError:
        """To be raised: what is wrong with this file."""
        return ValueError(f"{self.path}: {message}")

    def _take(self, size: int) -> bytes:
        if size > self.size - self.file.tell():
            raise self.error(f"its header goes on beyond its end, byte {self.size}: it is truncated, or damaged")
        return self.file.read(size)

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _count(self, count: int, least: int) -> int:
        """A count of things that take ``least`` bytes or more each."""
        if count > (self.size - self.file.tell()) // least:
            raise self.error(f"it announces {count} entries, for which its {self.size} bytes are not enough")
        return count

    def _string(self) -> str:
        raw = self._take(self._number("<Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"a name is not UTF-8 ({error})") from error

    def _skip(self, kind: int, depth: int = 0) -> None:
        """Steps over a value."""
        if kind in _NUMBERS:
            self._take(_NUMBERS[kind])
        elif kind == _STRING:
            self._take(self._number("<Q"))
        elif kind == _ARRAY and depth < 4:
            inside, count = self._number("<I"), self._number("<Q")
            size = _NUMBERS.get(inside)
            self._count(count, size or 8)
            if size:
                self._take(count * size)
            else:
                for _ in range(count):
                    self._skip(inside, depth + 1)
        else:
            raise self.error(f"its metadata has a value of type {kind}; 0 to 12 are known")

    def _described(self) -> tuple[str, int, tuple[int, ...], int]:
        name, dims = self._string(), self._number("<I")
        if dims > 4:
            raise self.error(f"{reprlib.repr(name)} has {dims} dimensions; at most 4 are needed")
        shape = tuple(self._number("<Q") for _ in range(dims))[::-1]
        return name, self._number("<I"), shape, self._number("<Q")

    def _placed(self, name: str, number: int, shape: tuple[int, ...], begin: int) -> StoredTensor:
        if number not in _SIZES:
            why = f" (i2_s: {I2_S})" if number == _I2_S_TYPE else ""
            raise self.error(f"{name!r} is of type {number}{why}; {', '.join(map(str, sorted(_SIZES)))} are known")
        weights, size = _SIZES[number]
        count = math.prod(shape)
        if (shape[-1] if shape else 1) % weights:
            raise self.error(
                f"{name!r} has shape {shape}; its type {number} has blocks of {weights} along the last one"
            )
        end = begin + count // weights * size
        if begin % self.alignment or end > self.size:
            raise self.error(
                f"{name!r} has bytes {begin} to {end} of {self.size}; inside of the file and at multiples of "
                f"{self.alignment} is needed"
            )
        return StoredTensor(number, shape, begin, end)

    def whole(self, key: str, default: int) -> int:
        """A uint32 of the metadata."""
        kind, raw = self.metadata.get(key, (_UINT32, struct.pack("<I", default)))
        if kind != _UINT32:
            raise self.error(f"{key} has a value of type {kind}; a uint32 ({_UINT32}) is needed")
        return int(struct.unpack("<I", raw)[0])

    def text(self, key: str) -> str | None:
        """A string of the metadata; None where there is none."""
        kind, raw = self.metadata.get(key, (None, b""))
        return raw[8:].decode(errors="replace") if kind == _STRING else None

    def read(self, name: str) -> Tensor:
        """The bytes of a tensor, in memory of its own: (bytes,) uint8."""
        entry = self.tensors[name]
        raw = bytearray(entry.end - entry.begin)
        self.file.seek(entry.begin)
        if self.file.readinto(raw) != len(raw):
            raise self.error(f"{name!r}: the file ends before its {len(raw)} bytes do; it was cut short meanwhile")
        return torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)


def plain_tensor(name: str, tensor: Tensor) -> NewTensor:
    """A tensor that is not quantized, as it is."""
    if tensor.dtype not in _TYPE_OF or tensor.dim() > 4 or not tensor.numel():
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; GGUF holds {', '.join(map(str, _TYPE_OF))} in "
            "up to four dimensions: take a template, whose other tensors are taken over as they are"
        )
    return NewTensor(_TYPE_OF[tensor.dtype], tuple(tensor.shape), lambda: tensor.reshape(-1).view(torch.uint8))


def plain_text(value: str) -> tuple[int, bytes]:
    """A string as a value of the metadata."""
    raw = value.encode()
    return _STRING, struct.pack("<Q", len(raw)) + raw


def plain_whole(value: int) -> tuple[int, bytes]:
    """A uint32 as a value of the metadata."""
    return _UINT32, struct.pack("<I", value)


def write_gguf(
    path: str | os.PathLike[str],
    metadata: dict[str, tuple[int, bytes]],
    tensors: dict[str, NewTensor],
    alignment: int = ALIGNMENT,
) -> None:
    """Writes a file of version 3, whole or not at all, tensor by tensor.

    Raises: ValueError: a name is too long. OSError: the file can't be written.
    """
    head = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata))]
    for key, (kind, raw) in metadata.items():
        head += [_counted(key), struct.pack("<I", kind), raw]
    offset = 0
    for name, tensor in tensors.items():
        if len(name.encode()) > LONGEST_NAME:
            raise ValueError(f"{name}: a GGUF file has names of at most {LONGEST_NAME} bytes; take a template")
        shape = tensor.shape[::-1] or (1,)
        head += [_counted(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.number, offset)]
        offset = _aligned(offset + tensor.size, alignment)
    header = b"".join(head)
    with replacing(path) as file:
        file.write(header.ljust(_aligned(len(header), alignment), b"\0"))
        for tensor in tensors.values():
            data = tensor.data()
            assert data.dtype == torch.uint8
            assert data.numel() == tensor.size
            copied = bytearray(_aligned(tensor.size, alignment))
            if tensor.size:
                torch.frombuffer(copied, dtype=torch.uint8)[: tensor.size].copy_(data.reshape(-1))
            file.write(copied)


def _counted(name: str) -> bytes:
    raw = name.encode()
    return struct.pack("<Q", len(raw)) + raw


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def same_shape(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether shapes differ by leading ones at most, which GGUF files leave out."""
    stripped = []
    for each in (list(shape), list(other)):
        with contextlib.suppress(IndexError):
            while each[0] == 1:
                each.pop(0)
        stripped.append(each)
    return stripped[0] == stripped[1]
