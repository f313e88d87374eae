"""AskewSGD and AskewAdamW: torch.optim.SGD and torch.optim.AdamW whose weights end on a few levels."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .keywords import Group, Keyword, check_each, is_flag
from .optimizer import QuantizedOptimizer
from .plan import Batch
from .typed_keywords import Keywords

if TYPE_CHECKING:
    from typing_extensions import Unpack


# What one rule alone has.
_SGD = {
    "momentum": Keyword(..., lambda x: x >= 0, "at least 0", "number"),
    "dampening": Keyword(..., lambda x: math.isfinite(x), "a finite number", "number"),
    "nesterov": Keyword(..., is_flag, "True or False"),
}


def _are_betas(betas: Any) -> bool:
    good = isinstance(betas, (tuple, list)) and len(betas) == 2
    return good and all(isinstance(beta, (int, float, Tensor)) and 0 <= float(beta) < 1 for beta in betas)


_ADAMW = {
    "betas": Keyword(..., _are_betas, "two numbers in [0, 1)"),
    "eps": Keyword(..., lambda x: x >= 0, "at least 0", "number"),
    "amsgrad": Keyword(..., is_flag, "True or False"),
}


class AskewSGD(QuantizedOptimizer):
    """torch.optim.SGD, argument for argument, whose quantized weights end on their levels.

    The keywords beyond torch's, for all groups or in a group (which wins), are those of
    :class:`~askew_cuda.typed_keywords.Keywords`: ``quantizer``, ``total_steps``, ``pretrained`` and others.

    >>> import torch, askew_cuda as askew
    >>> model = torch.nn.Linear(8, 4)
    >>> optimizer = askew.AskewSGD(model.parameters(), lr=0.1, momentum=0.9, quantizer="ternary")
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **constraint: "Unpack[Keywords]",
    ):
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
            "maximize": maximize, "foreach": foreach, "differentiable": differentiable, "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults, dict(constraint))

    @staticmethod
    def _check_rule(group: Group) -> None:
        check_each(group, _SGD)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov = True with momentum = {group['momentum']}, dampening = {group['dampening']}; it needs "
                "momentum and no dampening"
            )

    _operator = "sgd_"

    def _moments(self, group: Group) -> dict[str, str]:
        return {"momentum_buffers": "momentum_buffer"} if group["momentum"] != 0 else {}

    def _rule(self, group: Group) -> dict[str, Any]:
        return {key: group[key] for key in ("momentum", "dampening", "nesterov")}

    def _split(self, group: Group, batch: Batch) -> Iterator[tuple[Batch, dict[str, Any]]]:
        if group["momentum"] == 0 or group["dampening"] == 0:
            yield batch, {}
            return
        # The first gradient that is applied fills the buffer undamped: with the buffer at zero, that is a step without
        # dampening.
        fresh = ["momentum_buffer" not in state for state in batch.states]
        yield batch.pick([not each for each in fresh]), {}
        # With a step that AMP skips on a device a buffer would come to be, and the next step would be damped. So
        # found_inf is read here, which waits for the device; not in a captured graph, where a flag beside the buffer
        # has to answer.
        if any(fresh) and not self._overflowed(wait=True):
            yield batch.pick(fresh), {"dampening": 0.0}


class AskewAdamW(QuantizedOptimizer):
    """torch.optim.AdamW, argument for argument, whose quantized weights end on their levels.

    The keywords beyond torch's, for all groups or in a group (which wins), are those of
    :class:`~askew_cuda.typed_keywords.Keywords`: ``quantizer``, ``total_steps``, ``pretrained`` and others.

    >>> import torch, askew_cuda as askew
    >>> model = torch.nn.Linear(8, 4)
    >>> optimizer = askew.AskewAdamW(model.parameters(), lr=0.01, quantizer="2bit/channel")
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **constraint: "Unpack[Keywords]",
    ):
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "foreach": foreach, "capturable": capturable, "differentiable": differentiable,
            "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults, dict(constraint))

    @staticmethod
    def _check_rule(group: Group) -> None:
        check_each(group, _ADAMW)

    _operator = "adamw_"

    def _moments(self, group: Group) -> dict[str, str]:
        moments = {"exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq"}
        return moments | {"max_exp_avg_sqs": "max_exp_avg_sq"} if group["amsgrad"] else moments

    def _rule(self, group: Group) -> dict[str, Any]:
        try:
            beta1, beta2 = map(float, group["betas"])
        except (TypeError, ValueError):
            self._check_rule(group)  # which says it better
            raise
        return {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "amsgrad": group["amsgrad"]}

    def _counted_there(self, group: Group) -> bool:
        """A captured graph has to count the steps itself, and with AMP the device alone knows which ones count."""
        found = getattr(self, "found_inf", None)
        return group["capturable"] or (isinstance(found, Tensor) and found.device.type != "cpu")


for _each in (AskewSGD, AskewAdamW):  # help() shows the keywords, too; editors read the docstrings as they are written
    _each.__doc__ = f"{_each.__doc__}\n    {Keywords.__doc__}"
