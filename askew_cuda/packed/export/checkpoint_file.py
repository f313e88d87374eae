"""Checkpoints of a training - the states of a model and of its optimizer - as packed files."""

import contextlib
import os
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints import bare_name
from ...optimizers import AskewSGD
from ..file import save_packed
from ..safetensors import TensorReader

_TRAINER = ("model.safetensors", "optimizer.pt")  # of a folder that Hugging Face's Trainer writes
_ZIP = b"PK\x03\x04"  # what files of torch.save begin with


@contextlib.contextmanager
def packed_checkpoint(path: str | os.PathLike[str]) -> Iterator[str]:
    """The path of a packed file: the one that is given, or, of a checkpoint, a temporary one, gone after the block.

    A checkpoint is a file of torch.save that has the state_dicts of a model and of an AskewSGD or AskewAdamW, whose
    groups have names, under whatever keys, as Lightning's, too; or a folder of Hugging Face's Trainer. Nothing but
    tensors and plain values is unpickled. Weights are snapped; warns where they still had a way to go. Those that were
    never stepped, and have no scale, stay as they are.

    Raises: ValueError: it does not have two such states, or they don't fit each other; the message says what was found.
        OSError: it can't be read.
    """
    where = os.fspath(path)
    if not os.path.isdir(where):
        with open(where, "rb") as file:
            packed = file.read(len(_ZIP)) != _ZIP
        if packed:
            yield where
            return
    model, optimizer = _states(Path(where))
    with tempfile.TemporaryDirectory() as folder:
        made = os.path.join(folder, "packed")
        try:
            _save(model, optimizer, made)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        yield made


def _states(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The states of model and optimizer."""
    if path.is_dir():
        weights, optimizer = (path / name for name in _TRAINER)
        with open(weights, "rb") as file:
            reader = TensorReader(file, weights)
            return {name: reader.read(name)[0] for name in reader.entries}, _only(
                _unpickled(optimizer), _is_optimizer, path
            )
    loaded = _unpickled(path)
    return _only(loaded, _is_model, path), _only(loaded, _is_optimizer, path)


def _unpickled(path: Path) -> dict[str, Any]:
    """What is in a file of torch.save, and in lists of one, by name; and the file itself."""
    with open(path, "rb") as file:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except (
            pickle.UnpicklingError,
            RuntimeError,
            OSError,
            EOFError,
            LookupError,
            AttributeError,
            ValueError,
        ) as error:
            raise ValueError(f"{path}: torch.load reads no tensors and plain values from it ({error})") from error
    inside = loaded if isinstance(loaded, Mapping) else {}
    flat = {
        str(key): value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in inside.items()
    }
    return {"the whole": loaded, **flat}


def _only(loaded: dict[str, Any], kind: Any, path: Path) -> Any:
    found = {key: value for key, value in loaded.items() if kind(value)}
    if len(found) != 1:
        what = "an AskewSGD or AskewAdamW" if kind is _is_optimizer else "a model"
        there = ", ".join(found) or f"none among {', '.join(list(loaded)[1:]) or type(loaded['the whole']).__name__}"
        raise ValueError(f"{path}: the one state_dict of {what} is needed beside the other; there is {there}")
    return next(iter(found.values()))


def _is_optimizer(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("state"), Mapping):
        return False
    groups = value.get("param_groups")
    return isinstance(groups, list) and all(isinstance(group, Mapping) for group in groups)


def _is_model(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(each, Tensor) for each in value.values())


class _Model(nn.Module):
    """A model that is nothing but its state_dict."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        self.tensors = tensors

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        return self.tensors

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        return iter(self.tensors.values())


def _save(model: dict[str, Tensor], optimizer: Mapping[str, Any], path: str) -> None:
    """Writes the packed file."""
    first: dict[tuple[Any, ...], Tensor] = {}  # tied tensors have their memory in common
    tensors = {}
    for name, tensor in model.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        tensors[name] = first.setdefault(place, tensor)
    by_name = {bare_name(name): tensor for name, tensor in tensors.items()}
    groups = []
    for group in optimizer["param_groups"]:
        if group.get("quantizer") is None:
            continue
        if "param_names" not in group:
            raise ValueError(
                "the optimizer's param groups have no names, so that nobody knows which weights are theirs; make it of "
                "askew_cuda.param_groups or model.named_parameters()"
            )
        scales, params = [], []
        for name, index in zip(group["param_names"], group["params"], strict=True):
            scale = (optimizer["state"].get(index) or {}).get("scale")
            if scale is None:
                continue
            if bare_name(name) not in by_name:
                raise ValueError(f"{name}, which the optimizer quantizes, is not in the model's state_dict")
            params.append((name, by_name[bare_name(name)]))
            scales.append(scale)
        settings = {"quantizer": group["quantizer"], "channel_dim": group["channel_dim"], "epsilon": group["epsilon"]}
        kinds = {"pretrained": "packed", "quantize_frozen": True}
        groups += [{"params": params, "scales": scales, **settings, **kinds}] if params else []
    if not groups:
        raise ValueError(
            "no weight in the optimizer's state has a scale: its groups have no quantizer, or it never made a step"
        )
    made = AskewSGD(groups, lr=0.0)
    made.finalize()
    save_packed(_Model(tensors), made, path)
