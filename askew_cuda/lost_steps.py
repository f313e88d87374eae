"""Steps that 16-bit weights lose to rounding: looked at once, in a weight's first step, and told with figures."""

import warnings
from collections.abc import Container

from torch import Tensor

from .groups import Group

SAMPLE = 4096  # weights of a tensor that are looked at


def _sample(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)[:SAMPLE].clone()


class LostSteps:
    """The 16-bit weights that are rounded to nearest, before a step; afterwards :meth:`warn` says how many have stood still.

    Reads from the weights' device, which a first step may.
    """

    def __init__(self, groups: list[Group], stepped: Container[Tensor]):
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        for group in groups:
            if group["low_precision"] == "nearest" and float(group["lr"]) != 0:
                for weight in group["params"]:
                    if weight.dtype.itemsize == 2 and weight.grad is not None and weight.numel() and weight not in stepped:
                        self._seen.append((weight, _sample(weight), _sample(weight.grad)))

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._seen)

    def warn(self) -> None:
        """Warns where more than half of the weights that have a gradient did not move."""
        moving = standing = 0
        for weight, before, grad in self._seen:
            pushed = (grad != 0) & grad.isfinite()
            moving += int(pushed.sum())
            standing += int((pushed & (_sample(weight) == before)).sum())
        if moving and standing > moving / 2:
            kinds = ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight, *_ in self._seen}))
            warnings.warn(
                f"{standing / moving:.0%} of the {kinds} weights that have a gradient did not move in the first step: their steps are "
                "below half of their last place and are rounded off; low_precision='remainder' (2 more bytes per weight) or 'stochastic' "
                "keeps them",
                stacklevel=5,
            )
