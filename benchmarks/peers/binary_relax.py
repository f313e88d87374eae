"""BinaryRelax as a chain of PyTorch operations: our own statement, for timing only.

Source: Yin, Zhang, Lyu, Osher, Qi, Xin, "BinaryRelax: a relaxation approach for training deep neural networks with quantized weights",
SIAM Journal on Imaging Sciences 11, 2018 (arXiv 1801.06313).

A latent copy takes the gradient step; the weight that the network sees lies between it and its nearest level, nearer and nearer to
the level while ``strength`` grows. The levels are the 16 half-integers of "4bit", under one fixed scale: the least work there can be.
"""

import torch
from torch import Tensor


def start(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Latent copy and momentum buffer of a weight."""
    return weight.detach().clone(), torch.zeros_like(weight)


@torch.no_grad()
def step(
    weight: Tensor, grad: Tensor, latent: Tensor, momentum_buffer: Tensor, scale: float, *, strength: float, lr: float, momentum: float
) -> None:
    """One step in place: the latent weight by SGD, then weight = (strength Q(latent) + latent) / (strength + 1)."""
    momentum_buffer.mul_(momentum).add_(grad)
    latent.add_(momentum_buffer, alpha=-lr)
    level = (latent / scale).floor_().clamp_(-8, 7).add_(0.5).mul_(scale)
    weight.copy_(level.mul_(strength).add_(latent).div_(strength + 1))
