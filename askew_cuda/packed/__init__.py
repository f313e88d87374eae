"""Packed files and layers: codes at the width of their codebook, and scales."""

from .file import load_packed, save_packed
from .modules import PackedConv2d, PackedEmbedding, PackedLinear, pack_modules, unpack_modules

__all__ = [
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLinear",
    "load_packed",
    "pack_modules",
    "save_packed",
    "unpack_modules",
]
