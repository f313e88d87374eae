"""Optimizers inside of optimizers: accelerate's, Lightning's and DeepSpeed's hold ours as ``optimizer``, ZeRO's as
``optim``.
"""

from torch.optim import Optimizer


def layers(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizer, the one that it wraps, and so on; innermost last."""
    found = [optimizer]
    while True:
        inside = (getattr(found[-1], name, None) for name in ("optimizer", "optim"))
        inner = next((each for each in inside if isinstance(each, Optimizer) and each not in found), None)
        if inner is None:
            return found
        found.append(inner)


def unwrap(optimizer: Optimizer) -> Optimizer:
    """The innermost optimizer: the one that steps, and that holds state and scales."""
    return layers(optimizer)[-1]
