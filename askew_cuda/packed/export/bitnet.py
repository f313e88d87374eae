"""BitNet checkpoints of Hugging Face: ternary weights, four to a byte, and a scale each, as weights to train on."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...quantizer import Quantizer
from ..file import Trained, model_state
from ..safetensors import TensorReader
from .grids import taken_over

_LAYERS = {"bitlinear": -1, "autobitlinear": 1}  # the power of weight_scale that a weight is multiplied by


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
    power = _power(config)
    own, _ = model_state(model, "load_bitnet")
    with open(path, "rb") as file:
        reader = TensorReader(file, path)
        missing = sorted(set(own) - set(reader.entries))
        if missing:
            raise reader.error(f"{', '.join(missing[:5])} ({len(missing)} in all) of the model are not in it")
        found = {name: _ternary_value(reader, name, tensor, power) for name, tensor in own.items()}
    return taken_over(model, own, found)


def _power(config: Path) -> int:
    try:
        said = json.loads(config.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config}: it is not JSON ({error})") from error
    said = said.get("quantization_config") if isinstance(said, Mapping) else None
    said = said if isinstance(said, Mapping) else {}
    kind, layer = said.get("quant_method"), said.get("linear_class", "bitlinear")
    if kind != "bitnet" or layer not in _LAYERS or said.get("quantization_mode", "offline") != "offline":
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
    if scales not in reader.entries or reader.entries[scales].numel != 1:
        raise reader.error(f"{scales!r}, the one scale of {name!r}, is needed beside it")
    scale = reader.read(scales)[0].reshape(()).to(torch.float64) ** power
    if not bool((scale > 2.0**-126) & (scale < 2.0**126)):
        raise reader.error(f"{scales!r} is {float(scale**power):g}; a positive number is needed")
    codes = torch.cat([(value // 4**place) % 4 for place in range(4)])
    if codes.numel() and int(codes.max()) > 2:
        raise reader.error(f"{name!r} holds a 3; ternary weights are 0, 1 or 2")
    wide = torch.float64 if target.dtype == torch.float64 else torch.float32
    return Trained(Quantizer("ternary"), 0, target.dtype, codes, scale.to(wide))
