"""A packed file as a table: what is in it, without a model."""

import math
import os

import torch

from .bits import unpack
from .file import Packed, read_manifest, read_packed
from .safetensors import TensorReader


def inspect(path: str | os.PathLike[str]) -> str:
    """Tensors, bits, levels, ranges of the scales, occupancy of the levels and sizes of a file that save_packed wrote.

    Raises: ValueError: the file is damaged, foreign or of another version; the message names file, tensor and
        expectation. OSError: it can't be read.
    """
    with open(path, "rb") as file:
        reader = TensorReader(file, path)
        manifest = read_manifest(reader)
        quantized = {name: read_packed(reader, name, raw) for name, raw in manifest["quantized"].items()}
        rows: list[tuple[str, ...]] = [
            ("tensor", "shape", "quantizer", "levels", "bits", "scale", "occupancy, lowest level first", "bytes")
        ]
        rows += [_quantized_row(reader, name, packed) for name, packed in quantized.items()]
        parts = {f"{name}.{part}" for name in quantized for part in ("codes", "scale")}
        for name, entry in reader.entries.items():
            if name not in parts:
                dtype = str(entry.dtype).removeprefix("torch.")
                rows.append((name, _shape(entry.shape), "-", "", dtype, "", "", f"{entry.end - entry.begin:,}"))
        rows += [(name, "", f"tied to {first}", "", "", "", "", "") for name, first in manifest["tied"].items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    weights = sum(math.prod(packed.shape) for packed in quantized.values())
    stored = sum(reader.entries[part].end - reader.entries[part].begin for part in parts)
    per_weight = f"{8 * stored / weights:.3f} bits per weight with scales" if weights else "no weights"
    return "\n".join(
        [
            *table,
            f"{len(quantized)} quantized tensors, {weights:,} weights, {per_weight}; "
            f"{os.path.getsize(path):,} bytes in all",
        ]
    )


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "()"


def _quantized_row(reader: TensorReader, name: str, packed: Packed) -> tuple[str, ...]:
    """Reads codes and scales of one tensor."""
    count = len(packed.quantizer.codebook)
    numel = math.prod(packed.shape)
    (raw, _), (scale, _) = reader.read(f"{name}.codes"), reader.read(f"{name}.scale")
    shares = torch.bincount(unpack(raw, packed.bits, numel).flatten().int(), minlength=count).double() / max(numel, 1)
    shown = " ".join(f"{share:.0%}" for share in shares[:16].tolist()) + (" .." if count > 16 else "")
    low, high = (float(scale.min()), float(scale.max())) if scale.numel() else (math.nan, math.nan)
    size = sum(
        reader.entries[f"{name}.{part}"].end - reader.entries[f"{name}.{part}"].begin for part in ("codes", "scale")
    )
    range_ = f"{low:.4g}" if low == high else f"{low:.4g} .. {high:.4g}"
    return (
        name,
        _shape(packed.shape),
        packed.quantizer.summary(),
        str(count),
        f"{packed.bits:g}",
        range_,
        shown,
        f"{size:,}",
    )
