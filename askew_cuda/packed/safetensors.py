"""safetensors files, tensor by tensor: written in one go into the place of the old file, read with nothing taken for
granted.

The format: the length of the header (8 bytes, little end first), the header (JSON: dtype, shape and offsets of each
tensor, and ``__metadata__``, strings), the data. The package ``safetensors`` reads what is written here and the other
way round, and tests hold the two together. It is not used here because it can only write what is in memory all at once,
and because it reads a file by mapping it into memory, where a file that is cut short meanwhile kills the process.
Nothing is ever unpickled.
"""

import contextlib
import ctypes
import hashlib
import io
import json
import math
import os
import reprlib
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .. import memory

_STORED = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
    "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _STORED.items()}
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the package
_PIECE = 2**24  # bytes that are copied and hashed at a time
_NO_DIGEST = "0" * 64


class Entry(NamedTuple):
    """Where a tensor lies: bytes begin to end of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` when the block ends, all at once; after an exception nothing has
    happened. It is written beside ``path``, as ``.askew_cuda-*.tmp``: a process that is killed meanwhile leaves that
    behind, and the old file whole.

    Raises: OSError: the folder can't be written to.
    """
    target = Path(os.path.realpath(path))  # a symbolic link stays one
    temporary = target.with_name(f".askew_cuda-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (temporary, str(temporary)):  # which nobody has heard of
            raise type(error)(error.errno, error.strerror, os.fspath(path)) from None
        raise
    # So that the new name survives a power failure, where the system lets folders be synced.
    with contextlib.suppress(OSError):
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class TensorWriter:
    """Writes tensors, in any order, to the places that their dtypes and shapes decide; the header, with their
    checksums, last.

    Args:
        file: open for writing, empty.
        tensors: dtype and shape of each tensor by name. Tensors of larger items come first in the file, so that all of
            them are aligned.
        metadata: makes the header's strings of the SHA-256 of each tensor, in hexadecimal. Their length must not depend
            on it.

    Raises:
        ValueError: a dtype that the format does not have; the message names the tensor.
    """

    def __init__(
        self,
        file: BinaryIO,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Callable[[dict[str, str]], dict[str, str]],
    ):
        _check_byte_order()
        self.file, self.metadata = file, metadata
        self.entries: dict[str, Entry] = {}
        end = 0
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
            if dtype not in _NAMES:
                raise ValueError(
                    f"{name} is {dtype}; a safetensors file holds {', '.join(str(each) for each in _NAMES)}"
                )
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            self.entries[name] = Entry(dtype, tuple(shape), begin, end)
        self.digests = dict.fromkeys(self.entries, _NO_DIGEST)
        self.start = len(self._header())

    def _header(self) -> bytes:
        described = {
            name: {"dtype": _NAMES[each.dtype], "shape": list(each.shape), "data_offsets": [each.begin, each.end]}
            for name, each in self.entries.items()
        }
        header = json.dumps({"__metadata__": self.metadata(self.digests), **described}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # so that the data is aligned
        if len(header) > _LONGEST_HEADER:
            raise ValueError(
                f"the header would take {len(header)} bytes; {_LONGEST_HEADER} are allowed: save fewer tensors to a "
                "file"
            )
        return len(header).to_bytes(8, "little") + header

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor, of the dtype and shape that were announced; in logical row-major order, from any
        device.
        """
        entry = self.entries[name]
        if (tensor.dtype, tuple(tensor.shape)) != entry[:2]:
            raise ValueError(
                f"{name}: {tensor.dtype} of shape {tuple(tensor.shape)} was to be written; {entry[:2]} was announced"
            )
        digest = hashlib.sha256()
        self.file.seek(self.start + entry.begin)
        if entry.numel:
            for piece in tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(_PIECE):
                raw = _bytes_of(piece)
                digest.update(raw)
                self.file.write(raw)
        self.digests[name] = digest.hexdigest()

    def finish(self) -> None:
        """Writes the header, once every tensor is there."""
        missing = [name for name, digest in self.digests.items() if digest == _NO_DIGEST]
        header = self._header()
        if missing or len(header) != self.start:
            raise RuntimeError(
                f"the file is not complete: {missing} were not written, header {len(header)} for {self.start} bytes"
            )
        self.file.seek(0)
        self.file.write(header)


class TensorReader:
    """A safetensors file whose header has been checked: tensors lie side by side, fill the file, and have the size of
    their shape.

    Args:
        file: open for reading; the reader does not close it.
        path: for messages.

    Raises: ValueError: the header is not that of a whole safetensors file; the message names file, tensor and what was
        expected.
    """

    def __init__(self, file: io.BufferedReader, path: str | os.PathLike[str]):
        _check_byte_order()
        self.file, self.path, self.one_reads = file, os.fspath(path), threading.Lock()
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise self.error(
                f"it has {size} bytes and announces a header of {length}; a whole safetensors file is needed"
            )
        self.start = 8 + length
        header = self._parse(file.read(length))
        self.metadata: dict[str, str] = self._strings(header.pop("__metadata__", {}))
        self.entries: dict[str, Entry] = {name: self._entry(name, raw) for name, raw in header.items()}
        end = 0
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1][2:]):
            if entry.begin != end:
                raise self.error(
                    f"{name!r} begins at byte {entry.begin} of the data; {end}, where the tensor before it ends, is "
                    "needed"
                )
            end = entry.end
        if self.start + end != size:
            raise self.error(
                f"it has {size} bytes; {self.start + end}, header and tensors, are needed: it is truncated, or grew"
            )

    def error(self, message: str) -> ValueError:
        """To be raised: what is wrong with this file."""
        return ValueError(f"{self.path}: {message}")

    def _parse(self, raw: bytes) -> dict[str, object]:
        def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
            found = dict(pairs)
            if len(found) < len(pairs):
                raise ValueError("a name occurs twice")
            return found

        try:
            header = json.loads(raw.decode(), object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise self.error(f"its header is not the JSON of a safetensors file ({error})") from error
        if not isinstance(header, dict):
            raise self.error(f"its header is a JSON {type(header).__name__}; an object from names to tensors is needed")
        return header

    def _strings(self, metadata: object) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self.error(f"__metadata__ = {reprlib.repr(metadata)}; an object of strings is needed")
        return metadata

    def _entry(self, name: str, raw: object) -> Entry:
        def sizes(value: object) -> bool:
            return isinstance(value, list) and all(type(each) is int and 0 <= each < 2**63 for each in value)

        if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
            raise self.error(f"{name!r} is described by {reprlib.repr(raw)}; dtype, shape and data_offsets are needed")
        dtype = _STORED.get(raw["dtype"]) if isinstance(raw["dtype"], str) else None
        if dtype is None:
            raise self.error(f"{name!r} has dtype {reprlib.repr(raw['dtype'])}; one of {', '.join(_STORED)} is needed")
        if not sizes(raw["shape"]) or len(raw["shape"]) > 64:
            raise self.error(f"{name!r} has shape {reprlib.repr(raw['shape'])}; a list of sizes is needed")
        if not sizes(raw["data_offsets"]) or len(raw["data_offsets"]) != 2:
            raise self.error(f"{name!r} has data_offsets {reprlib.repr(raw['data_offsets'])}; begin and end are needed")
        entry = Entry(dtype, tuple(raw["shape"]), *raw["data_offsets"])
        size, wanted = entry.end - entry.begin, entry.numel * dtype.itemsize
        if size != wanted:
            raise self.error(f"{name!r} has {size} bytes; {wanted}, by shape and dtype, are needed")
        return entry

    def read(self, name: str) -> tuple[Tensor, str]:
        """A tensor in memory of its own, on the CPU, and the SHA-256 of its bytes, in hexadecimal. Threads may read
        several at once.

        Raises:
            ValueError: the file ends before it does, or a truth value is neither 0 nor 1.
        """
        entry = self.entries[name]
        values = memory.empty(entry.end - entry.begin)
        raw = _bytes_of(values)
        with self.one_reads:
            self.file.seek(self.start + entry.begin)
            found = self.file.readinto(raw)
        if found != len(values):
            raise self.error(
                f"{name!r}: the file ends before its {len(values)} bytes do; it was cut short while it was read"
            )
        digest = hashlib.sha256(raw).hexdigest()
        if entry.dtype == torch.bool and entry.numel and int(values.max()) > 1:
            raise self.error(f"{name!r} holds the truth value {int(values.max())}; 0 or 1 is needed")
        return values.view(entry.dtype).reshape(entry.shape), digest


def _bytes_of(piece: Tensor) -> Any:
    """The memory of a contiguous (bytes,) uint8 tensor as a buffer, valid while the tensor lives; from another device a
    copy.
    """
    if piece.device.type == "cpu" and type(piece) is Tensor:
        return (ctypes.c_char * len(piece)).from_address(piece.data_ptr())
    raw = bytearray(len(piece))
    torch.frombuffer(raw, dtype=torch.uint8).copy_(piece)
    return raw


def _check_byte_order() -> None:
    if sys.byteorder != "little":
        raise RuntimeError(
            "safetensors files are little end first, and this machine is not; convert them on one that is"
        )
