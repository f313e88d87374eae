"""Rows of queries and keys. For some architectures, such as llama, llama.cpp's converter exchanges them: what rotates
together - number i of each half of a head in models of transformers - lies side by side in its files.
"""

import re

import torch
from torch import Tensor

from .ggml_file import GgufReader

OWN_ARCHITECTURE = "askew_cuda"  # of files that export_gguf writes without a template, with rows as the model has them
ROWS = ("halves", "stored")
_ROTATED = re.compile(r"blk\.\d+\.attn_(q|k|qkv)\.(weight|bias)")
_COUNTS = {"q": "head_count", "k": "head_count_kv"}


def check_rows(rows: str | None, caller: str) -> None:
    """Whether it is one of ROWS, or None."""
    if rows is not None and rows not in ROWS:
        raise ValueError(f"{caller}: rows = {rows!r}; take one of {', '.join(map(repr, ROWS))}, or None")


def model_order(reader: GgufReader, name: str, rows: str | None) -> Tensor | None:
    """Which row of a file's tensor each row of the model is, (rows,) int64; None where they are in one order.

    Args: rows: "halves": the model rotates halves of a head, and the file pairs; "stored": nothing was exchanged; None:
        nothing is known, which does for all tensors that nothing is rotated of.

    Raises: ValueError: it has to be known, or the file does not say how many heads there are; the message names the
        tensor.
    """
    found, architecture = _ROTATED.fullmatch(name), reader.text("general.architecture")
    if found is None or rows == "stored" or architecture == OWN_ARCHITECTURE:
        return None
    if rows is None:
        raise reader.error(
            f"{name!r}, architecture {architecture!r}: for some architectures, such as llama, llama.cpp's converter "
            "exchanges rows of queries and keys. rows='halves' puts them back, for a model that rotates halves of a "
            "head, as those of transformers do; rows='stored' takes them as they lie there"
        )
    if found[1] not in _COUNTS:
        raise reader.error(f"{name!r} holds queries, keys and values; their rows can be taken with rows='stored' only")
    key = f"{architecture}.attention.{_COUNTS[found[1]]}"
    heads, count = reader.whole(key, 0), next(iter(reader.tensors[name].shape), 0)
    if heads < 1 or count < 1 or count % (2 * heads):
        raise reader.error(
            f"{name!r} has {count} rows, and {key} = {heads}; heads of an even number of rows are needed"
        )
    return torch.arange(count).reshape(heads, -1, 2).transpose(1, 2).flatten()
