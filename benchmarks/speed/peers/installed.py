"""Peers that come as packages: how each is set up for the same work, and why it can't take part where it can't.

pip install --no-deps bitsandbytes flashoptim torchao
"""

import torch
from torch import nn

Parameters = list[nn.Parameter]


class Absent(Exception):
    """Why a peer can't take part."""


def parq(
    parameters: Parameters, base: type[torch.optim.Optimizer] = torch.optim.SGD, **keywords
) -> torch.optim.Optimizer:
    """torchao's PARQ, 4 bit, over torch's fused optimizer.

    In the middle of its annealing, with its own period of 10 steps.
    """
    try:
        from torchao.prototype.parq.optim import ProxPARQ, QuantOptimizer
        from torchao.prototype.parq.quant import UnifQuantizer
    except ImportError as error:
        raise Absent(f"{error}; pip install --no-deps torchao") from error
    quantized = [parameter for parameter in parameters if parameter.dim() > 1]
    rest = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups = [{"params": quantized, "quant_bits": 4}, *([{"params": rest}] if rest else [])]
    return QuantOptimizer(
        base(groups, fused=True, **keywords), UnifQuantizer(), ProxPARQ(anneal_start=0, anneal_end=10**9)
    )


def bitsandbytes(parameters: Parameters, rule: str, bits: int, **keywords) -> torch.optim.Optimizer:
    """bitsandbytes' SGD or AdamW with a state of 32 or 8 bits: the base rule alone, no quantized weights."""
    try:
        import bitsandbytes as package
    except Exception as error:  # it loads compiled libraries, which fail in many ways
        raise Absent(f"{type(error).__name__}: {error}; pip install --no-deps bitsandbytes") from error
    made = getattr(package.optim, f"{rule}{bits}bit")(parameters, **keywords)
    return made


def flashoptim(parameters: Parameters, **keywords) -> torch.optim.Optimizer:
    """FlashOptim's SGD: the base rule alone.

    With its 8-bit state and its kernel on a GPU; neither is there on a CPU.
    """
    try:
        from flashoptim import FlashSGD
    except Exception as error:
        raise Absent(f"{type(error).__name__}: {error}; pip install --no-deps flashoptim") from error
    try:
        made = FlashSGD(parameters, master_weight_bits=None, **keywords)
        made.step()
    except NotImplementedError as error:
        raise Absent(str(error)) from error
    return made


def flashoptim_unfused(parameters: Parameters, **keywords) -> torch.optim.Optimizer:
    """FlashOptim's SGD as PyTorch operations, state in full precision: what it can do on a CPU."""
    return flashoptim(parameters, quantize=False, fused=False, **keywords)
