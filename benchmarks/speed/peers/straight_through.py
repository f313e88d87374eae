"""The straight-through estimator as users of quantization-aware training have it: torch's own fake-quantize operator.

The forward pass sees weights rounded to 16 levels under one fixed scale, the backward pass hands the gradient to the
latent weight as if they had not been. Estimating the scale anew in every pass, as many recipes do, would come on top.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class FakeQuantize(nn.Module):
    """A parametrization: weight -> the nearest of -8 .. 7 times ``scale``."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(weight, self.scale, 0, -8, 7)


def apply(model: nn.Module) -> nn.Module:
    """Puts it on every Linear and Conv weight, scale by mean|w|. In place; returns the model."""
    for module in list(model.modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            scale = module.weight.abs().mean().item() / 4
            parametrize.register_parametrization(module, "weight", FakeQuantize(scale))
    return model


def make_step(parameters: list[nn.Parameter], scale: float, optimizer: torch.optim.Optimizer):
    """A step by itself: from the gradient of the quantized weights, as of a network, to the next latent ones.

    What a network pays beyond its own work: rounding, the backward pass of the rounding, the optimizer.
    """
    grads = [parameter.grad for parameter in parameters]
    quantize = FakeQuantize(scale)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward([quantize(parameter) for parameter in parameters], grads)
        optimizer.step()

    return step
