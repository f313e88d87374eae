"""Packed layers: linear layers, convolutions and embeddings that hold codes and scales in place of a weight, and unpack
it when they are called.

For a model that is only used: the weight exists while its layer computes, and at no other time. The aim is memory, not
speed.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import is_sharded
from ..quantizer import Quantizer
from .bits import restore, restore_, unpack_at
from .file import packed_weights, quantized_weights


class PackedWeight(Tensor):
    """The weight of a packed layer, unpacked, for who asks: a tensor like any other, but for its ``data``, which can't
    be replaced. PEFT merges an adapter so, which would be lost with this copy.
    """

    # what is computed from it is a plain tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        """The same memory, plain."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError(
            "the weight of a packed layer can't be written: it is unpacked from its codes whenever it is asked for. "
            "askew_cuda.unpack_modules(model) gives the layers weights; then adapters can be merged into them"
        )


class PackedLayer(nn.Module):
    """What packed layers share: the buffers ``codes`` (bytes,) uint8 and ``scale``, and the weight that is made of
    them.

    A layer is taken over as it is, hooks and bias included, but for its weight. ``weight`` is a fresh tensor each time,
    bitwise the snapped weight, in its memory format; writing to it changes nothing. Casting the layer (``half()``)
    casts that tensor; codes and scale keep their dtypes. The state_dict holds codes, scale and, as ``_extra_state``, a
    uint8 tensor that says how they are packed, so that codes of another codebook are refused.
    """

    codes: Tensor
    scale: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained_dtype: torch.dtype

    def __init__(self, layer: nn.Module, packed: Tensor, scale: Tensor, quantizer: Quantizer, bits: float):
        nn.Module.__init__(self)  # the layer's own would make a weight
        weight = layer.get_parameter("weight")
        self.__dict__.update(vars(layer))
        self._parameters = {name: value for name, value in layer._parameters.items() if name != "weight"}
        self._buffers = dict(layer._buffers)
        self.register_buffer("codes", packed)
        self.register_buffer("scale", scale.clone())
        self.levels, self.bits, self.shape = quantizer.codebook.levels, bits, tuple(weight.shape)
        # Of channels_last, say: kernels round differently in other memory formats.
        self.strides = torch.empty_like(weight, device="meta").stride()
        self.dtype = self.trained_dtype = weight.dtype
        self.quantizer = replace(quantizer, scale="auto").plain()
        self.label = (
            self.quantizer if isinstance(self.quantizer, str) else f"{len(self.levels)} levels/{quantizer.granularity}"
        )

    @property
    def weight(self) -> Tensor:
        """(...), unpacked now; without gradient. Replacing its ``data`` is refused."""
        weight = self._unpacked()
        return (
            weight.as_subclass(PackedWeight) if type(weight) is Tensor and not torch.compiler.is_compiling() else weight
        )

    def _unpacked(self) -> Tensor:
        weight = torch.empty(self.shape, dtype=self.trained_dtype, device=self.codes.device)
        restore_(weight, self.codes, self.bits, self.scale, self.levels)
        weight = weight.to(self.dtype)
        if weight.stride() != self.strides:
            weight = torch.empty_strided(self.shape, self.strides, dtype=weight.dtype, device=weight.device).copy_(
                weight
            )
        return weight

    def _restore(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The weight, rounded to the dtype of the training first, so that casting a packed layer gives what casting the
        snapped one does.
        """
        return restore(codes, scale, self.levels, self.trained_dtype).to(self.dtype)

    def reset_parameters(self) -> None:
        """Refused: there is no weight to initialise."""
        raise RuntimeError(
            f"reset_parameters() of {self!r}: packed layers are not trained; initialise the model before packing it"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLayer":
        scale, dtype = self.scale, fn(torch.empty(0, dtype=self.dtype, device=self.scale.device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = dtype
        if self.scale.dtype != scale.dtype:  # the scale is what was trained, to the last bit
            self.scale = scale.to(self.scale.device)
        return self

    def get_extra_state(self) -> Tensor:
        """(bytes,) uint8, JSON: shape, dtype, levels and bits."""
        packing = {"shape": self.shape, "dtype": str(self.trained_dtype), "levels": self.levels, "bits": self.bits}
        return torch.frombuffer(bytearray(json.dumps(packing).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set; raises ValueError where it says that the codes are packed in another way."""
        if not torch.equal(state.cpu(), self.get_extra_state()):
            raise ValueError(f"{self!r}: {self._other_packing(state)}")

    def _other_packing(self, theirs: Tensor) -> str:
        said = bytes(theirs.tolist()).decode(errors="replace") if theirs.dtype == torch.uint8 else repr(theirs)
        return f"packed as {said:.300}; {bytes(self.get_extra_state().tolist()).decode():.300} is needed"

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        theirs = state_dict.get(f"{prefix}_extra_state")
        if isinstance(theirs, Tensor) and not torch.equal(theirs.cpu(), self.get_extra_state()):
            error_msgs.append(f"{prefix}codes: {self._other_packing(theirs)}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        shape = "x".join(map(str, self.shape))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{super().extra_repr()}, weight={shape} {dtype}, {self.label}, {self.bits} bit"


class PackedLinear(PackedLayer, nn.Linear):  # type: ignore[override] # weight is a property here
    """nn.Linear with a packed weight; made by :func:`pack_modules`."""


class PackedConv1d(PackedLayer, nn.Conv1d):  # type: ignore[override] # weight is a property here
    """nn.Conv1d with a packed weight; made by :func:`pack_modules`."""


class PackedConv2d(PackedLayer, nn.Conv2d):  # type: ignore[override] # weight is a property here
    """nn.Conv2d with a packed weight; made by :func:`pack_modules`."""


class PackedConv3d(PackedLayer, nn.Conv3d):  # type: ignore[override] # weight is a property here
    """nn.Conv3d with a packed weight; made by :func:`pack_modules`."""


class PackedConvTranspose1d(PackedLayer, nn.ConvTranspose1d):  # type: ignore[override] # weight is a property here
    """nn.ConvTranspose1d with a packed weight; made by :func:`pack_modules`."""


class PackedConvTranspose2d(PackedLayer, nn.ConvTranspose2d):  # type: ignore[override] # weight is a property here
    """nn.ConvTranspose2d with a packed weight; made by :func:`pack_modules`."""


class PackedConvTranspose3d(PackedLayer, nn.ConvTranspose3d):  # type: ignore[override] # weight is a property here
    """nn.ConvTranspose3d with a packed weight; made by :func:`pack_modules`."""


class PackedBilinear(PackedLayer, nn.Bilinear):  # type: ignore[override] # weight is a property here
    """nn.Bilinear with a packed weight; made by :func:`pack_modules`."""


class PackedEmbedding(PackedLayer, nn.Embedding):  # type: ignore[override] # weight is a property here
    """nn.Embedding with a packed weight, of which only the rows that are looked up are unpacked; made by
    :func:`pack_modules`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(...) int64 or int32 to (..., embedding_dim). Raises IndexError for an index outside of [0,
        num_embeddings); on a GPU, and where it is compiled or exported, the device stops there by itself, and nobody
        waits for it.
        """
        rows, dim = self.shape
        index = input.long().reshape(-1)
        if torch.compiler.is_compiling() or index.is_cuda:
            inside = ((index >= 0) & (index < rows)).all()
            torch._assert_async(inside, f"PackedEmbedding: an index is outside of [0, {rows})")
        elif index.numel() and not 0 <= int(index.min()) <= int(index.max()) < rows:
            raise IndexError(
                f"PackedEmbedding: an index is outside of [0, {rows}): {int(index.min())} .. {int(index.max())}"
            )
        positions = index.unsqueeze(1) * dim + torch.arange(dim, device=index.device)
        scale = self.scale
        if scale.numel() > 1 and scale.shape[0] > 1:  # else all rows share it
            scale = scale[index // (rows // scale.shape[0])]
        return self._restore(unpack_at(self.codes, self.bits, positions), scale).reshape(*input.shape, dim)


_PACKED_ONLY = {
    "levels",
    "bits",
    "shape",
    "strides",
    "dtype",
    "trained_dtype",
    "quantizer",
    "label",
}  # what no other layer has
PACKED: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear,
    nn.Bilinear: PackedBilinear,
    nn.Conv1d: PackedConv1d,
    nn.Conv2d: PackedConv2d,
    nn.Conv3d: PackedConv3d,
    nn.ConvTranspose1d: PackedConvTranspose1d,
    nn.ConvTranspose2d: PackedConvTranspose2d,
    nn.ConvTranspose3d: PackedConvTranspose3d,
    nn.Embedding: PackedEmbedding,
}


def pack_modules(model: nn.Module, optimizer: torch.optim.Optimizer, *, ternary: str = "1.6bit") -> nn.Module:
    """Replaces every layer whose weight is quantized by one that holds codes and scales only; outputs are those of the
    snapped model.

    Args:
        model: whose layers with quantized weights are replaced, in place. All of them must be of nn.Linear,
            nn.Bilinear, nn.Conv1d to 3d, nn.ConvTranspose1d to 3d or nn.Embedding themselves, not of subclasses, which
            may compute something else. Tied weights share their codes. The weights are freed when the optimizer is
            dropped, too.
        optimizer: the AskewSGD or AskewAdamW with the scales, or a wrapper of it. Not mutated, and of no use for this
            model afterwards.
        ternary: codes of three levels at "1.6bit", five to a byte, or at "2bit".

    Returns:
        The model; where it is itself such a layer, the packed layer.

    Raises: ValueError: a quantized weight is of another type of layer, is not in the model, or holds NaN; nothing has
        changed. TypeError: the optimizer is not one of ours.

    >>> import askew_cuda as askew
    >>> model = nn.Sequential(nn.Linear(4, 10, bias=False))
    >>> groups = askew.param_groups(model, {"*": "ternary"}, verbose=False)
    >>> pack_modules(model, askew.AskewSGD(groups, lr=0.1))
    Sequential(
      (0): PackedLinear(in_features=4, out_features=10, bias=False, weight=10x4 float32, ternary, 1.6 bit)
    )
    """
    by_weight = quantized_weights(optimizer, "pack_modules")
    layers = _layers(model, set(by_weight))
    names: dict[Tensor, str] = {weight: name for name, weight in model.named_parameters()}
    new: dict[nn.Module, nn.Module] = {}
    with torch.no_grad():
        for weight, bits, packed, scale in packed_weights(optimizer, by_weight, names, ternary):
            for layer in layers[weight]:
                new[layer] = PACKED[type(layer)](layer, packed, scale, by_weight[weight].quantizer, bits)
    return _put(model, new)


def unpack_modules(model: nn.Module) -> nn.Module:
    """Gives every packed layer an ordinary weight again, the snapped one to the last bit: for what writes to weights,
    such as merging an adapter, or for speed.

    Args:
        model: whose packed layers are replaced by nn.Linear, nn.Conv2d and nn.Embedding, in place. Layers that shared
            their codes share the weight. It takes gradients, as any new parameter.

    Returns:
        The model; where it is itself a packed layer, the layer.

    >>> import askew_cuda as askew
    >>> model = nn.Sequential(nn.Linear(4, 10, bias=False))
    >>> groups = askew.param_groups(model, {"*": "ternary"}, verbose=False)
    >>> unpack_modules(pack_modules(model, askew.AskewSGD(groups, lr=0.1)))
    Sequential(
      (0): Linear(in_features=4, out_features=10, bias=False)
    )
    """
    plain = {packed: kind for kind, packed in PACKED.items()}
    weights: dict[tuple[int, torch.dtype], nn.Parameter] = {}
    new: dict[nn.Module, nn.Module] = {}
    for module in list(model.modules()):
        if isinstance(module, PackedLayer):
            layer: nn.Module = nn.Module.__new__(plain[type(module)])
            nn.Module.__init__(layer)  # that of its own class would make a weight
            layer.__dict__.update({name: value for name, value in vars(module).items() if name not in _PACKED_ONLY})
            layer._buffers = {name: each for name, each in module._buffers.items() if name not in ("codes", "scale")}
            key = (module.codes.data_ptr() or id(module), module.dtype)
            if key not in weights:
                with torch.no_grad():
                    weights[key] = nn.Parameter(module._unpacked())
            layer._parameters = {"weight": weights[key], **module._parameters}
            new[module] = layer
    return _put(model, new)


def _put(model: nn.Module, new: dict[nn.Module, nn.Module]) -> nn.Module:
    """Replaces modules wherever they are; the model, or what replaces it."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in new:
                setattr(module, name, new[child])
    model = new.get(model, model)
    theirs = sys.modules.get("transformers.modeling_utils")  # which is there where one of its models is
    if theirs is not None and any(isinstance(each, theirs.PreTrainedModel) for each in model.modules()):
        from .pretrained import announce

        announce(model)
    return model


def _layers(model: nn.Module, weights: set[Tensor]) -> dict[Tensor, list[nn.Module]]:
    """The layers of each quantized weight; raises ValueError unless all of them can be packed."""
    found: dict[Tensor, list[nn.Module]] = {weight: [] for weight in weights}
    for path, module in model.named_modules():
        for name, weight in module._parameters.items():
            if weight is None or weight not in weights:
                continue
            kind, whole = type(module), f"{path}.{name}".removeprefix(".")
            why = None
            if is_sharded(weight):
                why = "the weight is sharded, and no rank has all of its codes"
            elif kind not in PACKED or name != "weight":
                known = ", ".join(f"nn.{each.__name__}" for each in PACKED)
                why = f"{name} of {kind.__name__} can't be packed; the weights of {known} themselves can"
            elif getattr(module, "max_norm", None) is not None:
                why = "an Embedding with max_norm writes to its weight when it is called, and can't be packed"
            elif "forward" in vars(module):
                why = "forward() of its layer was replaced; undo that before packing"
            if why is not None:
                raise ValueError(
                    f"pack_modules: {whole}: {why}. Leave it unquantized, or use save_packed, which takes every layer"
                )
            found[weight].append(module)
    for weight, layers in found.items():
        if not layers:
            raise ValueError(
                f"pack_modules: a quantized weight of shape {tuple(weight.shape)} is not in the model; "
                "give the model that the optimizer trains"
            )
    return found
