"""Packed files and layers: codes at the width of their codebook, and scales."""

from .file import load_packed, save_packed
from .modules import (
    PackedBilinear,
    PackedConv1d,
    PackedConv2d,
    PackedConv3d,
    PackedConvTranspose1d,
    PackedConvTranspose2d,
    PackedConvTranspose3d,
    PackedEmbedding,
    PackedLinear,
    pack_modules,
)

__all__ = [
    "PackedBilinear",
    "PackedConv1d",
    "PackedConv2d",
    "PackedConv3d",
    "PackedConvTranspose1d",
    "PackedConvTranspose2d",
    "PackedConvTranspose3d",
    "PackedEmbedding",
    "PackedLinear",
    "load_packed",
    "pack_modules",
    "save_packed",
]
