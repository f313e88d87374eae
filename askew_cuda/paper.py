"""The authors' settings, as keywords of the optimizer and of its annealing."""

import functools
import math
from typing import Any

from .quantizer import Quantizer
from .schedule import half_width_of

# epochs, epochs at epsilon = 1, factor per epoch after that, floor (normalised), alpha
_BINARY = (100, 50, 0.96, 0.0, 0.1)  # their logistic problem; two moons: epochs=50, hold_epochs=20, decay=0.99, alpha=1
_4BIT = (300, 100, 0.95, 16e-6, 1.0)  # their ImageNet training: 1/16 * 0.95^n + 1e-6 on the unit grid


def paper_epsilon(epoch: int, hold_epochs: int, decay: float, floor: float = 0.0) -> float:
    """The authors' epsilon in an epoch, normalised and at most 1: 1 up to ``hold_epochs``, then times ``decay`` per
    epoch.
    """
    return min(1.0, decay ** max(0, epoch - hold_epochs) + floor)


def _half_width(progress: float, *, epochs: int, hold_epochs: int, decay: float, floor: float) -> float:
    epoch = min(
        math.floor(progress * epochs + 1e-9), epochs - 1
    )  # 1e-9: progress is a quotient, and may lie just below a whole epoch
    return half_width_of(paper_epsilon(epoch, hold_epochs, decay, floor))


def paper(
    setting: str,
    *,
    epochs: int | None = None,
    hold_epochs: int | None = None,
    decay: float | None = None,
    alpha: float | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the authors of ASkewSGD used: (keywords of the optimizer beyond torch.optim's, keywords of its annealing).

    Both go to the optimizer, with ``total_steps``: ``AskewSGD(params, lr, **first, **second, total_steps=n)``. Or the
    second to :class:`~askew_cuda.Anneal`.

    Args:
        setting: "binary" (levels -1 and 1, no scale) or "4bit" (17 levels -8..8, SAWB scale). In their 4-bit training
            the scale is estimated anew in every step while epsilon is 1; here it is set once, unless the caller writes
            ``optimizer.state[p]["scale"]``. They clip before a step, the optimizer after it: only the last step
            differs.
        epochs, hold_epochs, decay, alpha: theirs unless given (see the constants above). epsilon changes from epoch to
            epoch.

    Raises:
        ValueError: an unknown setting.

    Source: the authors' repository, notebooks and trainer (AISTATS 2023).
    """
    if setting not in ("binary", "4bit"):
        raise ValueError(f"paper: setting = {setting!r}; 'binary' or '4bit'")
    their_epochs, their_hold, their_decay, floor, their_alpha = _BINARY if setting == "binary" else _4BIT
    half_width = functools.partial(
        _half_width,
        epochs=their_epochs if epochs is None else epochs,
        hold_epochs=their_hold if hold_epochs is None else hold_epochs,
        decay=their_decay if decay is None else decay,
        floor=floor,
    )
    quantizer = Quantizer("binary", scale=1.0) if setting == "binary" else Quantizer("authors_4bit", scale="sawb")
    optimizer = {
        "quantizer": quantizer.plain(),
        "anneal": "interval",
        "skew_at": "gradient",
        "alpha": their_alpha if alpha is None else alpha,
        "max_step": math.inf if setting == "binary" else 0.5,
        "clip": True,
    }
    return optimizer, {"shape": half_width}
