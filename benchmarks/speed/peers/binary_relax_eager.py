"""BinaryRelax as a chain of PyTorch operations, for timing only.

16 half-integer levels under one fixed scale: the least work that there can be. What it computes, and where it comes
from: benchmarks/accuracy/methods/binary_relax.py.
"""

import torch
from torch import Tensor

from benchmarks.accuracy.methods.binary_relax import relax_


def first_state(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Latent copy and momentum buffer of a weight."""
    return weight.detach().clone(), torch.zeros_like(weight)


@torch.no_grad()
def step(
    weight: Tensor,
    grad: Tensor,
    latent: Tensor,
    momentum_buffer: Tensor,
    scale: float,
    *,
    strength: float,
    lr: float,
    momentum: float,
) -> None:
    """One step in place: the latent weight by SGD, then the weight between it and its level."""
    momentum_buffer.mul_(momentum).add_(grad)
    latent.add_(momentum_buffer, alpha=-lr)
    level = (latent / scale).floor_().clamp_(-8, 7).add_(0.5).mul_(scale)
    weight.copy_(relax_(level, latent, strength))
