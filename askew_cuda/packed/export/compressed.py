"""compressed-tensors, which transformers and vLLM load: weights as integers in words of 32 bits, their scales, and a
``quantization_config`` in the model's config.json.
"""

import os
from typing import Any

import torch
from torch import Tensor

from ..file import Trained, read_tensors
from .folder import read_config, write_folder
from .grids import by_groups, integers_for, last_run
from .holders import or_who_else

_BITS = (2, 4, 8)  # those of other widths are packed in one way by some versions, in another by others


def export_compressed(
    source: str | os.PathLike[str], folder: str | os.PathLike[str], *, config: str | os.PathLike[str] | None = None
) -> dict[str, int]:
    """Writes model.safetensors and config.json, in the format pack-quantized, from which transformers and vLLM compute
    the very weights that were trained. Each of the two appears at once and whole, config.json last.

    Args:
        source: a file of :func:`askew_cuda.save_packed`, of a model of transformers; quantized weights are those of its
            Linear layers, of two dimensions.
        folder: that the files go to; made where it is missing.
        config: the model's config.json; None writes the quantization_config alone.

    Returns: Bits of each quantized weight.

    Raises: ValueError: levels are no integers of 2, 4 or 8 bits times a scale, or a weight is no Linear layer's; the
        message names it, and nothing is written. OSError: a file can't be read or written.
    """
    tensors, tied = read_tensors(source)
    state: dict[str, Tensor] = {}
    groups: dict[tuple[int, int | None], list[str]] = {}
    bits: dict[str, int] = {}
    for name, each in tensors.items():
        if not isinstance(each, Trained):
            state[name] = each
            continue
        module = name.removesuffix(".weight")
        values, scale, width, size = or_who_else(words_of, name, each)
        state[f"{module}.weight_packed"] = _words(values, width)
        state[f"{module}.weight_scale"] = scale
        state[f"{module}.weight_shape"] = torch.tensor(values.shape)
        groups.setdefault((width, size), []).append(module)
        bits[name] = width
    said = read_config(config)
    said["quantization_config"] = quantization_config(groups)
    if tied:
        said["tie_word_embeddings"] = said.get("tie_word_embeddings", True)
    write_folder(folder, state, said, "pt")
    return bits


def quantization_config(groups: dict[tuple[int, int | None], list[str]]) -> dict[str, Any]:
    """What config.json says of modules by bits and by weights per scale; None: one scale per output."""
    described = {}
    for number, ((width, size), modules) in enumerate(groups.items()):
        strategy = {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
        weights = {"num_bits": width, "type": "int", "symmetric": True, "dynamic": False, **strategy}
        described[f"group_{number}"] = {"targets": modules, "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": described,
        "ignore": [],
    }


def words_of(name: str, trained: Trained) -> tuple[Tensor, Tensor, int, int | None]:
    """Integers, scale (rows, groups), bits, and weights per scale."""
    levels, size = trained.quantizer.codebook.levels, last_run(trained)
    groups = by_groups(trained, size)
    said = f"{name}, {trained.quantizer.summary()}, shape {tuple(trained.codes.shape)}"
    if not name.endswith(".weight") or trained.codes.dim() != 2 or groups is None:
        raise ValueError(f"{said}: compressed-tensors holds weights of Linear layers, of two dimensions")
    for width in _BITS:
        found = integers_for(levels, -(2 ** (width - 1)), 2 ** (width - 1) - 1)
        if found is not None:
            values, factor = found
            whole = torch.tensor(values, dtype=torch.int8)[trained.codes.int()]
            scale = (groups.scale * factor).to(trained.dtype)
            if not torch.equal(whole.to(scale.dtype) * scale.repeat_interleave(size, -1), trained.weight()):
                raise ValueError(
                    f"{said}: readers would round its {trained.dtype} weights otherwise; scales of 7 significant bits "
                    "(short_scales=True) survive it"
                )
            return whole, scale, width, None if size == whole.shape[1] else size
    raise ValueError(
        f"{said}: compressed-tensors holds integers of {', '.join(map(str, _BITS))} bits times a scale: ternary, "
        "binary, int2 .. int8, 2bit .. 7bit"
    )


def _words(values: Tensor, bits: int) -> Tensor:
    """(rows, columns) int8 to (rows, words) int32: offset to begin at 0, the first one lowest, rows filled up."""
    per_word = 32 // bits
    filled = torch.nn.functional.pad(values.long() + 2 ** (bits - 1), (0, -values.shape[1] % per_word))
    places = 2 ** (bits * torch.arange(per_word))
    words = (filled.reshape(len(values), -1, per_word) * places).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
