"""The authors' 4-bit step as a chain of PyTorch operations: our own statement of their formula, for timing only.

All 17 levels are compared with every weight and sorted, the two nearest give the constraint, the gradient is replaced
where it binds, and SGD with momentum steps on it.
"""

import torch
from torch import Tensor


@torch.no_grad()
def step(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    scale: float,
    *,
    epsilon: float,
    alpha: float,
    lr: float,
    momentum: float,
) -> None:
    """One step in place. ``epsilon`` is on the unit grid, as theirs: 1/16 is unconstrained."""
    levels = torch.arange(-8.0, 9.0, device=weight.device)
    p = torch.clamp(weight / scale, -8, 8)
    order = (p.unsqueeze(-1).expand(*p.shape, 17) - levels).abs().sort(dim=-1).indices
    a, b = levels[order[..., 0]], levels[order[..., 1]]
    f = (p - a) * (p - b)
    h = epsilon - f**2
    pull = scale * alpha * h / (2 * f * (1e-6 + (p - a) + (p - b)))
    keep = (f == 0) | (h >= 0) | (-grad * pull > pull**2)
    skewed = torch.where(keep, grad, -pull.clamp(-scale / (4 * lr), scale / (4 * lr)))
    weight.copy_(p * scale)
    momentum_buffer.mul_(momentum).add_(skewed)
    weight.add_(momentum_buffer, alpha=-lr)
