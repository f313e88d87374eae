"""CAGE, its decoupled form: the straight-through estimator, and late in the training a pull towards the levels.

Tabesh, Safaryan, Panferov, Volkova, Alistarh, "CAGE: curvature-aware gradient estimation for accurate
quantization-aware training", 2025 (arXiv 2510.18784). After the step of the base rule a latent weight moves by lr
lambda (level - w), lambda 0 for the first 80 % of the training, then growing linearly. The paper quantizes weights and
activations in a way of its own; here the forward pass is our STE's, and the scale stays from the first pull on: mean|w|
of pulled ternary weights would shrink with every one.
"""

from typing import Any

from torch import Tensor, nn

from .latent import StraightThroughRun
from .method import Base, Method, Parameters

SILENT = 0.8  # share of the training without a pull


class _Cage(StraightThroughRun):
    def __init__(self, quantized: Parameters, rest: Parameters, base: Base, *arguments: Any, strength: float):
        self.strength, self.lr = strength, base.lr
        super().__init__(quantized, rest, base, *arguments)
        self.optimizer.register_step_pre_hook(
            lambda optimizer, *_: setattr(self, "lr", optimizer.param_groups[0]["lr"])
        )

    def look(self, latent: nn.Parameter, rows: Tensor) -> Tensor:
        ramp = max(self.progress - SILENT, 0) / (1 - SILENT)
        if ramp == 0:
            return super().look(latent, rows)
        level = self.grid.nearest(rows, self.scale[latent])
        rows.lerp_(level, min(self.lr * self.strength * ramp, 1))
        return level


class Cage(Method):
    name = "CAGE"
    knob, knobs = "lambda at the end", (1.0, 10.0, 100.0)

    def begin(self, quantized, rest, base, width, knob, *, total_steps, pretrained, granularity="tensor"):
        return _Cage(quantized, rest, base, width, granularity, total_steps, strength=knob)
