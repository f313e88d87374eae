"""Who else: for a weight that a format can't hold, the formats that can."""

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from ..file import Trained

T = TypeVar("T")


def or_who_else(convert: Callable[[str, Trained], T], name: str, trained: Trained) -> T:
    """What a format makes of a quantized tensor.

    Raises: ValueError: it holds no such thing; the message says why, and which formats do.
    """
    try:
        return convert(name, trained)
    except ValueError as error:
        found = ", ".join(holders(name, trained))
        raise ValueError(f"{error}. " + (f"It fits {found}" if found else "No format here holds it")) from None


def holders(name: str, trained: Trained) -> list[str]:
    """Formats that hold a quantized tensor exactly, torchao as far as can be said without it."""
    from . import bitnet, compressed, gguf, mlx, onnx, torchao

    formats: dict[str, Callable[[str, Trained], Any]] = {
        "gguf": gguf.blocks_of,
        "onnx": onnx.integers_of,
        "torchao": torchao.affine_integers_of,
        "compressed-tensors": compressed.words_of,
        "mlx": mlx.affine_of,
        "bitnet": bitnet.packed_of,
    }
    found = []
    for format, convert in formats.items():
        with contextlib.suppress(ValueError):
            convert(name, trained)
            found.append(format)
    return found
