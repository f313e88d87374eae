"""BitNet checkpoints of Hugging Face: ternary weights, four to a byte, and a scale each; written as they were trained,
and read back as weights to train on.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...quantizer import Quantizer
from ...reference import arithmetic
from ..file import Trained, model_state, read_tensors
from ..safetensors import TensorReader
from .folder import read_config, write_folder
from .grids import taken_over
from .holders import or_who_else

_LAYERS = {"bitlinear": -1, "autobitlinear": 1}  # the power of weight_scale that a weight is multiplied by
_THREE_LEVELS = (-1.0, 0.0, 1.0)


def export_bitnet(
    source: str | os.PathLike[str], folder: str | os.PathLike[str], *, config: str | os.PathLike[str] | None = None
) -> dict[str, str]:
    """Writes model.safetensors and config.json, from which transformers makes layers of ternary numbers and the very
    scales that were trained, and :func:`load_bitnet` the very weights. Each appears at once and whole, config.json
    last. Those layers also round activations to 8 bits.

    Args:
        source: a file of :func:`askew_cuda.save_packed`, of a model of transformers; quantized weights are those of its
            Linear layers, ternary, with a scale per tensor.
        folder: that the files go to; made where it is missing.
        config: the model's config.json, whose quantization_config, where it says bitnet, is kept; else layers are
            "autobitlinear", which multiply by weight_scale. None writes the quantization_config alone.

    Returns: How each quantized weight was written.

    Raises: ValueError: a weight is not ternary with one scale, its rows don't fill bytes, or the scale's dtype, that of
        the weights, does not hold it; the message names it, and nothing is written. OSError: a file can't be read or
        written.
    """
    tensors, tied = read_tensors(source)
    said = read_config(config)
    before = said.get("quantization_config")
    kept = before if isinstance(before, Mapping) and before.get("quant_method") == "bitnet" else {}
    power = _power(kept, os.fspath(config or "")) if kept else _LAYERS["autobitlinear"]
    state: dict[str, Tensor] = {}
    plain, made = [], {}
    for name, each in tensors.items():
        if isinstance(each, Trained):
            state[name], scale = or_who_else(lambda n, t: packed_of(n, t, power), name, each)
            state[f"{name}_scale"], made[name] = scale, "ternary"
        else:
            state[name] = each
            plain += [name.removesuffix(".weight")] if name.endswith(".weight") and each.dim() == 2 else []
    said["quantization_config"] = {
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        **kept,
        "quant_method": "bitnet",
        "modules_to_not_convert": plain,
    }
    if tied:
        said["tie_word_embeddings"] = said.get("tie_word_embeddings", True)
    write_folder(folder, state, said, "pt")
    return made


def packed_of(name: str, trained: Trained, power: int = 1) -> tuple[Tensor, Tensor]:
    """(rows / 4, columns) uint8, and weight_scale, (1,) of the weights' dtype, whose power scales them.

    Raises: ValueError: as :func:`export_bitnet`.
    """
    said = f"{name}, {trained.quantizer.summary()}, shape {tuple(trained.codes.shape)} of {trained.dtype}"
    if trained.quantizer.codebook.levels != _THREE_LEVELS or trained.scale.unique().numel() != 1:
        raise ValueError(f"{said}: BitNet's layers hold ternary weights with one scale per tensor")
    if not name.endswith(".weight") or trained.codes.dim() != 2 or trained.codes.shape[0] % 4:
        raise ValueError(f"{said}: BitNet's layers are Linear, and have a multiple of 4 outputs")
    wanted, scale = trained.weight(), trained.scale.flatten()[:1]
    near = (scale.double() ** power).to(trained.dtype)
    for stored in (near, *(torch.nextafter(near, near * factor) for factor in (0, 2))):  # 1 / (1 / x) may not be x
        if torch.equal(_weights(trained.codes, stored, power, trained.dtype).weight(), wanted):
            parts = trained.codes.reshape(4, -1, trained.codes.shape[1])
            places = torch.tensor([1, 4, 16, 64], dtype=torch.uint8).reshape(4, 1, 1)
            return (parts * places).sum(0, dtype=torch.uint8), stored
    raise ValueError(
        f"{said}: its scale is {float(scale):.9g}, which weight_scale, {'its inverse, ' if power < 0 else ''}of "
        f"{trained.dtype}, does not say exactly; a linear_class of 'autobitlinear' and short_scales=True do"
    )


def _weights(codes: Tensor, stored: Tensor, power: int, dtype: torch.dtype) -> Trained:
    """What a weight_scale makes of ternary codes."""
    scale = stored.reshape(()).to(torch.float64) ** power
    return Trained(Quantizer("ternary"), 0, dtype, codes, scale.to(arithmetic(dtype)))


def load_bitnet(folder: str | os.PathLike[str], model: nn.Module) -> list[dict[str, Any]]:
    """Reads a checkpoint whose config.json says ``quant_method = bitnet`` into the same model with plain Linear layers,
    every ternary weight times its scale, and returns what goes on training it. All is checked before anything in the
    model changes.

    The checkpoint's own layers also round activations to 8 bits, which a model of plain Linear layers does not.

    Args:
        folder: with config.json and model.safetensors.
        model: of the architecture, made without the quantization_config. Mutated.

    Returns: Param groups for a fresh AskewSGD or AskewAdamW, as :func:`askew_cuda.load_packed` returns them.

    Raises: ValueError: the files are damaged, of another format or do not fit the model; the message names file and
        tensor, and the model is unchanged. OSError: they can't be read.
    """
    config, path = Path(folder) / "config.json", Path(folder) / "model.safetensors"
    power = _power(read_config(config).get("quantization_config"), os.fspath(config))
    own, _ = model_state(model, "load_bitnet")
    with open(path, "rb") as file:
        reader = TensorReader(file, path)
        missing = sorted(set(own) - set(reader.entries))
        if missing:
            raise reader.error(f"{', '.join(missing[:5])} ({len(missing)} in all) of the model are not in it")
        found = {name: _ternary_value(reader, name, tensor, power) for name, tensor in own.items()}
    return taken_over(model, own, found)


def _power(said: object, config: str) -> int:
    """Of weight_scale, by what a quantization_config says."""
    said = said if isinstance(said, Mapping) else {}
    kind, layer = said.get("quant_method"), said.get("linear_class", "bitlinear")
    offline = said.get("quantization_mode", "offline") == "offline"
    if kind != "bitnet" or not isinstance(layer, str) or layer not in _LAYERS or not offline:
        raise ValueError(
            f"{config}: quant_method = {kind!r}, linear_class = {layer!r}, quantization_mode = "
            f"{said.get('quantization_mode')!r}; bitnet, {' or '.join(_LAYERS)}, offline are needed: weights that are "
            "packed"
        )
    return _LAYERS[layer]


def _ternary_value(reader: TensorReader, name: str, target: Tensor, power: int) -> Trained | Tensor:
    """What the files hold for a tensor of the model."""
    entry, scales = reader.entries[name], f"{name}_scale"
    packed = entry.dtype == torch.uint8 and target.is_floating_point()
    shape = (4 * entry.shape[0], *entry.shape[1:]) if packed and entry.shape else entry.shape
    if shape != tuple(target.shape):
        raise reader.error(f"{name!r} has shape {shape}; {tuple(target.shape)}, as in the model, is needed")
    value = reader.read(name)[0]
    if not packed:
        if value.dtype != target.dtype:
            raise reader.error(f"{name!r} is {value.dtype}; {target.dtype}, as in the model, is needed")
        return value
    scale_entry = reader.entries.get(scales)
    if scale_entry is None or scale_entry.numel != 1 or not scale_entry.dtype.is_floating_point:
        raise reader.error(f"{scales!r}, the one scale of {name!r}, a floating-point number, is needed beside it")
    stored = reader.read(scales)[0]
    scale = stored.reshape(()).to(torch.float64) ** power
    if not bool((scale > 2.0**-126) & (scale < 2.0**126)):
        raise reader.error(f"{scales!r} is {float(stored):g}; a positive number is needed")
    codes = torch.cat([(value // 4**place) % 4 for place in range(4)])
    if codes.numel() and int(codes.max()) > 2:
        raise reader.error(f"{name!r} holds a 3; ternary weights are 0, 1 or 2")
    return _weights(codes, stored, power, target.dtype)
