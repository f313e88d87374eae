"""A model's folder as transformers and mlx-lm read it: ``model.safetensors`` beside ``config.json``."""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ..safetensors import TensorWriter, replacing


def read_config(path: str | os.PathLike[str] | None) -> dict[str, Any]:
    """A model's config.json; empty where there is none.

    Raises: ValueError: it is no JSON, or no object. OSError: it can't be read.
    """
    if path is None:
        return {}
    try:
        said = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: it is not JSON ({error})") from error
    if not isinstance(said, dict):
        raise ValueError(
            f"{os.fspath(path)}: it is a {type(said).__name__}; an object, a model's config.json, is needed"
        )
    return said


def write_folder(folder: str | os.PathLike[str], state: dict[str, Tensor], config: dict[str, Any], form: str) -> None:
    """Writes both files, each whole or not at all; the folder is made where it is missing.

    Args: state: tensors by name, on the CPU. config: what config.json says. form: ``format`` in the file's metadata,
    "pt" or "mlx".
    """
    there = Path(folder)
    there.mkdir(parents=True, exist_ok=True)
    with replacing(there / "model.safetensors") as file:
        described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
        writer = TensorWriter(file, described, lambda digests: {"format": form})
        for name, tensor in state.items():
            writer.write(name, tensor)
        writer.finish()
    with replacing(there / "config.json") as file:
        file.write(json.dumps(config, indent=2).encode())
