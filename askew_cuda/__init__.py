"""Training of quantized neural networks (binary, ternary, 2-8 bit) as one fused optimizer step.

import askew_cuda as askew
optimizer = askew.AskewSGD(askew.param_groups(model, "ternary"), lr=0.5, momentum=0.9, total_steps=n)
with optimizer.quantized(): evaluate(model)
report = optimizer.finalize()
"""

from .anneal import Anneal
from .backends import build_info
from .layers import register_layer
from .monitor import Monitor, Sample, monitor
from .optimizer import FinalizeReport, TensorReport
from .optimizers import AskewAdamW, AskewSGD
from .packed.file import load_packed, save_packed
from .packed.modules import (
    PackedBilinear,
    PackedConv1d,
    PackedConv2d,
    PackedConv3d,
    PackedConvTranspose1d,
    PackedConvTranspose2d,
    PackedConvTranspose3d,
    PackedEmbedding,
    PackedLinear,
    pack_modules,
    unpack_modules,
)
from .paper import paper
from .param_groups import param_groups
from .quantizer import Codebook, Quantizer

__all__ = [
    "Anneal",
    "AskewAdamW",
    "AskewSGD",
    "Codebook",
    "FinalizeReport",
    "Monitor",
    "PackedBilinear",
    "PackedConv1d",
    "PackedConv2d",
    "PackedConv3d",
    "PackedConvTranspose1d",
    "PackedConvTranspose2d",
    "PackedConvTranspose3d",
    "PackedEmbedding",
    "PackedLinear",
    "Quantizer",
    "Sample",
    "TensorReport",
    "build_info",
    "load_packed",
    "monitor",
    "pack_modules",
    "paper",
    "param_groups",
    "register_layer",
    "save_packed",
    "unpack_modules",
]
__version__ = "0.2.0"
