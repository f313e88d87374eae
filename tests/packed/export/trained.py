"""Packed files of small networks whose scales fit the formats of others."""

from pathlib import Path

import torch
from torch import nn

import askew_cuda as askew
from askew_cuda.packed import load_packed, save_packed
from askew_cuda.scales import short


class Holder(nn.Module):
    """Weights under the names that they are given."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        for name, weight in weights.items():
            *owners, last = name.split(".")
            owner: nn.Module = self
            for each in owners:
                if not hasattr(owner, each):
                    owner.add_module(each, nn.Module())
                owner = getattr(owner, each)
            owner.register_parameter(last, nn.Parameter(weight))


def packed(
    path: Path,
    rules: dict[str, object],
    shape: tuple[int, ...] = (6, 512),
    dtype: torch.dtype = torch.float32,
    fits: bool = True,
) -> Holder:
    """A file, and the snapped model that is in it: a weight of this shape for each rule, and a bias."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator, dtype=dtype) * 0.02 for name in rules}
    model = Holder({**weights, "bias": torch.randn(5, generator=generator, dtype=dtype)})
    groups = [
        {"params": [(name, model.get_parameter(name))], "quantizer": askew.Quantizer.parse(rule)}
        for name, rule in rules.items()
    ]
    optimizer = askew.AskewSGD([*groups, {"params": [("bias", model.bias)]}], lr=0.1, pretrained=True)
    optimizer.prepare()
    if fits:
        for weight, *_ in optimizer.quantized_parameters():
            optimizer.state[weight]["scale"] = short(optimizer.state[weight]["scale"])
    save_packed(model, optimizer, path)
    load_packed(path, model)
    return model
