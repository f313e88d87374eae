"""Packed models of transformers: ``save_pretrained`` writes them, and ``from_pretrained`` reads them, bit for bit.

The folder holds codes and scales, and in its config a ``quantization_config`` that says which layers are packed, and
how. Where this module is not imported, from_pretrained refuses the folder: beside each layer's codes lies an empty
``weight``, whose size fits nothing.
"""

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..quantizer import Quantizer
from .bits import packed_size
from .modules import PACKED, PackedLayer, unpack_modules

METHOD = "askew_cuda"  # the quant_method of the config


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """Which layers of a model are packed, and how; plain values.

    Args:
        layers: by name, ``quantizer`` (as :meth:`~askew_cuda.Quantizer.plain`), ``bits`` per weight, the ``dtype`` of
            the training, and the scale's ``scale_shape`` and ``scale_dtype``.
    """

    def __init__(self, layers: dict[str, dict[str, Any]], **_: Any):
        self.quant_method = METHOD
        self.reads_with = "import askew_cuda.integrations.transformers"
        self.layers = layers


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """What transformers asks, on its way from and to a folder."""

    requires_calibration = True

    def is_serializable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters beside the packed layers can be trained: yes."""
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name, how in self.quantization_config.layers.items():
            try:
                layer = model.get_submodule(name)
            except AttributeError:
                layer = None
            kind = PACKED.get(type(layer))
            if kind is None:
                found = "there is none" if layer is None else f"it is a {type(layer).__name__}"
                raise ValueError(
                    f"quantization_config: the layer {name!r} is packed in the file, and in this model {found}; load "
                    "it by the class that was saved"
                )
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _empty(kind, layer, how))
        refused = {rf"(^|\.){re.escape(name)}\.weight$" for name in self.quantization_config.layers}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *refused}
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The model's tensors, and the empty ones; brings the config up to date."""
        packed = {name: each for name, each in model.named_modules() if isinstance(each, PackedLayer)}
        model.config.quantization_config = PackedConfig({name: _described(each) for name, each in packed.items()})
        refused = {f"{name}.weight": torch.empty(0, dtype=torch.uint8) for name in packed}
        return {**model.state_dict(), **refused}, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        unpack_modules(model)
        model.hf_quantizer = self  # which the caller takes away
        return model


def announce(model: nn.Module) -> None:
    """Tells every model of transformers in a model whether it is packed. Its config is changed."""
    for each in model.modules():
        if not isinstance(each, PreTrainedModel):
            continue
        layers = {name: _described(layer) for name, layer in each.named_modules() if isinstance(layer, PackedLayer)}
        if layers:
            each.config.quantization_config = PackedConfig(layers)
            each.hf_quantizer = PackedQuantizer(each.config.quantization_config, pre_quantized=True)
            each.is_quantized, each.quantization_method = True, METHOD
        elif isinstance(vars(each).get("hf_quantizer"), PackedQuantizer):
            each.hf_quantizer.remove_quantization_config(each)


def _described(layer: PackedLayer) -> dict[str, Any]:
    return {
        "quantizer": layer.quantizer,
        "bits": layer.bits,
        "dtype": str(layer.trained_dtype).removeprefix("torch."),
        "scale_shape": list(layer.scale.shape),
        "scale_dtype": str(layer.scale.dtype).removeprefix("torch."),
    }


def _empty(kind: type[PackedLayer], layer: nn.Module, how: dict[str, Any]) -> PackedLayer:
    """A packed layer without values, on the layer's device."""
    weight = layer.get_parameter("weight")
    codes = torch.empty(packed_size(weight.numel(), how["bits"]), dtype=torch.uint8, device=weight.device)
    scale = torch.empty(how["scale_shape"], dtype=getattr(torch, how["scale_dtype"]), device=weight.device)
    made = kind(layer, codes, scale, Quantizer.parse(how["quantizer"]), how["bits"])
    made.trained_dtype = getattr(torch, how["dtype"])
    return made
