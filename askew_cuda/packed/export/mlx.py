"""MLX: weights as ``scale * q + bias`` by groups of 32, 64 or 128, in words of 32 bits, and the ``quantization`` of the
model's config.json.
"""

import os

import torch
from torch import Tensor

from ..file import Trained, read_tensors
from .blocks import Digits, level_digits
from .folder import read_config, write_folder
from .grids import by_groups
from .holders import or_who_else

_BITS, _SIZES = (2, 4, 8), (128, 64, 32)


def export_mlx(
    source: str | os.PathLike[str], folder: str | os.PathLike[str], *, config: str | os.PathLike[str] | None = None
) -> dict[str, tuple[int, int]]:
    """Writes model.safetensors and config.json for mlx and mlx-lm, which compute the very weights that were trained,
    whether or not they fuse multiplication and addition. Each appears at once and whole, config.json last.

    Args:
        source: a file of :func:`askew_cuda.save_packed`; quantized weights are those of Linear layers or embeddings.
        folder: that the files go to; made where it is missing.
        config: the model's config.json; None writes the quantization alone.

    Returns: (bits, weights per scale) of each quantized weight.

    Raises: ValueError: levels are not ``f q + first`` of up to 8 bits, scales are for other than 32, 64 or 128 weights
        or a multiple, or a product is rounded; the message names the weight, and nothing is written. OSError: a
        file can't be read or written.
    """
    tensors, _ = read_tensors(source)
    state: dict[str, Tensor] = {}
    made: dict[str, tuple[int, int]] = {}
    for name, each in tensors.items():
        if not isinstance(each, Trained):
            state[name] = each
            continue
        module = name.removesuffix(".weight")
        q, scale, bias, made[name] = or_who_else(affine_of, name, each)
        state[f"{module}.weight"] = _mlx_words(q, made[name][0])
        state[f"{module}.scales"], state[f"{module}.biases"] = scale, bias
    said = read_config(config)
    kinds = {name.removesuffix(".weight"): {"bits": bits, "group_size": size} for name, (bits, size) in made.items()}
    first = next(iter(kinds.values()), {})
    plain = {name: False for name in state if name.endswith(".weight") and name not in made}
    others = {name.removesuffix(".weight"): kind for name, kind in plain.items()}
    said["quantization"] = {**first, **{name: kind for name, kind in kinds.items() if kind != first}, **others}
    write_folder(folder, state, said, "mlx")
    return made


def affine_of(name: str, trained: Trained) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """q (rows, columns), scale and bias (rows, groups), and (bits, weights per scale)."""
    said = f"{name}, {trained.quantizer.summary()}, shape {tuple(trained.codes.shape)}"
    sizes = [size for size in _SIZES if trained.codes.dim() == 2 and by_groups(trained, size) is not None]
    if not name.endswith(".weight") or not sizes:
        raise ValueError(f"{said}: MLX holds rows of groups of 32, 64 or 128 weights that share a scale")
    levels = trained.quantizer.codebook.levels
    for bits in _BITS:
        digits: Digits | None = level_digits(levels, None, 1, 2**bits)
        if digits is not None:
            break
    else:
        raise ValueError(f"{said}: MLX holds levels that are equally far apart, or some of such")
    groups = by_groups(trained, sizes[0])
    assert groups is not None
    assert digits.shift is not None
    wide = groups.scale.double() * digits.factor, groups.scale.double() * digits.shift
    scale, bias = (each.to(trained.dtype) for each in wide)
    q = digits.of_code[groups.codes.int()].double()
    product = q * wide[0].unsqueeze(-1)
    exact = (product + wide[1].unsqueeze(-1)).flatten(1).reshape(trained.codes.shape)
    kept = all(torch.equal(each.to(trained.dtype).double(), each) for each in (product, *wide))
    if not kept or not torch.equal(exact, trained.weight().double()):
        raise ValueError(
            f"{said}: products of its {trained.dtype} scales would be rounded; scales of 7 significant bits "
            "(short_scales=True) are not, up to 8 levels in bfloat16"
        )
    return q.to(torch.uint8).reshape(trained.codes.shape), scale, bias, (bits, sizes[0])


def _mlx_words(q: Tensor, bits: int) -> Tensor:
    """(rows, columns) uint8 to (rows, words) uint32, the first one lowest."""
    per_word = 32 // bits
    words = (q.reshape(len(q), -1, per_word).long() * 2 ** (bits * torch.arange(per_word))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).view(torch.uint32)
