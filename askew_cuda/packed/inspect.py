"""A packed file as a table, or as plain data: what is in it, without a model."""

import math
import os
from typing import Any

import torch

from .bits import unpack
from .file import Packed, read_manifest, read_packed
from .safetensors import TensorReader


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What is in a file that save_packed wrote, as plain values, which JSON takes.

    Returns: ``quantized``: by name, shape, dtype, quantizer, levels, bits per weight, ``scale`` (least and largest;
        None without any), ``occupancy`` (share of the weights on each level, lowest first) and bytes. ``plain``: the
        other tensors' shape, dtype and bytes. ``tied``: names, and those that they are stored under. ``weights``: how
        many are quantized, ``bits_per_weight``: with scales, None without weights. ``bytes``: of the file.

    Raises: ValueError: the file is damaged, foreign or of another version; the message names file, tensor and
        expectation. OSError: it can't be read.
    """
    with open(path, "rb") as file:
        reader = TensorReader(file, path)
        manifest = read_manifest(reader)
        packed = {name: read_packed(reader, name, raw) for name, raw in manifest["quantized"].items()}
        quantized = {name: _quantized(reader, name, each) for name, each in packed.items()}
        parts = {f"{name}.{part}" for name in quantized for part in ("codes", "scale")}
        plain = {
            name: {"shape": list(entry.shape), "dtype": _name_of(entry.dtype), "bytes": entry.end - entry.begin}
            for name, entry in reader.entries.items()
            if name not in parts | quantized.keys()
        }
    weights = sum(math.prod(each.shape) for each in packed.values())
    stored = sum(each["bytes"] for each in quantized.values())
    return {
        "quantized": quantized,
        "plain": plain,
        "tied": dict(manifest["tied"]),
        "weights": weights,
        "bits_per_weight": 8 * stored / weights if weights else None,
        "bytes": os.path.getsize(path),
    }


def inspect(path: str | os.PathLike[str]) -> str:
    """The same as a table: tensors, bits, levels, ranges of the scales, occupancy of the levels and sizes.

    Raises: as :func:`describe`.
    """
    found = describe(path)
    rows: list[tuple[str, ...]] = [
        ("tensor", "shape", "quantizer", "levels", "bits", "scale", "occupancy, lowest level first", "bytes")
    ]
    rows += [_row(name, each) for name, each in found["quantized"].items()]
    for name, each in found["plain"].items():
        rows.append((name, _shape(each["shape"]), "-", "", each["dtype"], "", "", f"{each['bytes']:,}"))
    rows += [(name, "", f"tied to {first}", "", "", "", "", "") for name, first in found["tied"].items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    per_weight = "no weights" if not found["weights"] else f"{found['bits_per_weight']:.3f} bits per weight with scales"
    return "\n".join(
        [
            *table,
            f"{len(found['quantized'])} quantized tensors, {found['weights']:,} weights, {per_weight}; "
            f"{found['bytes']:,} bytes in all",
        ]
    )


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape)) or "()"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _quantized(reader: TensorReader, name: str, packed: Packed) -> dict[str, Any]:
    """Reads codes and scales of one tensor."""
    levels, numel = packed.quantizer.codebook.levels, math.prod(packed.shape)
    (raw, _), (scale, _) = reader.read(f"{name}.codes"), reader.read(f"{name}.scale")
    codes = unpack(raw, packed.bits, numel).flatten().int()
    return {
        "shape": list(packed.shape),
        "dtype": _name_of(packed.dtype),
        "quantizer": packed.quantizer.summary(),
        "levels": list(levels),
        "bits": packed.bits,
        "scale": [float(scale.min()), float(scale.max())] if scale.numel() else None,
        "occupancy": (torch.bincount(codes, minlength=len(levels)).double() / max(numel, 1)).tolist(),
        "bytes": sum(
            reader.entries[f"{name}.{part}"].end - reader.entries[f"{name}.{part}"].begin for part in ("codes", "scale")
        ),
    }


def _row(name: str, each: dict[str, Any]) -> tuple[str, ...]:
    count = len(each["levels"])
    low, high = each["scale"] or (math.nan, math.nan)
    return (
        name,
        _shape(each["shape"]),
        each["quantizer"],
        str(count),
        f"{each['bits']:g}",
        f"{low:.4g}" if low == high else f"{low:.4g} .. {high:.4g}",
        " ".join(f"{share:.0%}" for share in each["occupancy"][:16]) + (" .." if count > 16 else ""),
        f"{each['bytes']:,}",
    )
