"""AskewSGD and AskewAdamW: torch.optim.SGD and torch.optim.AdamW whose weights end on a few levels."""

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .keywords import Group, Keyword, check_each, is_flag
from .optimizer import QuantizedOptimizer
from .plan import Batch

_KEYWORDS = """
    Keywords beyond torch.optim's, for all groups or in a group (which wins):

    quantizer: levels and scale of the weights: a name ("binary", "ternary/channel", "2bit/group128", ..), a
        :class:`~askew_cuda.Quantizer`, or None: not quantized, then the group does what torch's optimizer does.
    pretrained: True for weights that are trained already, "packed" for weights from a packed file. Chooses scale and
        annealing.
    normalized: whether the network has normalisation layers, which leave the scale to us. trained_norms: whether their
        gains are trained already; only a warning depends on it.
    channel_dim: the output dimension of the weights, 0 for (out, in, ..), 1 for (in, out), or those of expert and
        output. What has scales of its own, with a quantizer per channel or per group.
    fan_in: how many weights are summed up into one output; one number, or one for each weight.
    init_bound: where a layer starts with weights that are uniform in another interval than +-1 / sqrt(fan_in), the end
        of it: so fresh weights are known, which say nothing about their scale. One number, or one for each weight.
        :func:`~askew_cuda.param_groups` writes these five, from what it knows of the layers. Bare parameters get the
        defaults, whatever stands beside them: not normalised; the output first, all other dimensions inputs. And a
        quantizer takes EVERY parameter of its group, biases and gains of norms included, which networks are better off
        without: give those a group with quantizer None, or use param_groups, which does.
    quantize_frozen: whether weights that are frozen and were never stepped are snapped and coded, too. Else they keep
        their values, and are saved as they are; once they train, they are quantized like all others.
    total_steps: optimizer steps of the whole training, a whole number: then the optimizer anneals itself. None: epsilon
        is set from outside, by :class:`~askew_cuda.Anneal` or by hand. It is counted what is stepped; a step that the
        host sees skipped (found_inf on the CPU, a GradScaler that does not call step) is not, one that only a device
        knows of is.
    hold, end: shares of total_steps, 0 <= hold < end <= 1: r, the half-width around a level, is 1 until ``hold`` and 0
        from ``end`` on. None: as measured for the number of levels and ``pretrained`` (docs/recipes.md); in a training
        of fewer steps than some 340 earlier, so that the weights get there.
    shape: of the way between, "quadratic" or "geometric"; or a callable from progress in [0, 1] (of the whole training:
        hold and end don't act) to r in [0, 1], which must not rise.
    steps_done: the count, a whole number in each group; a checkpoint carries it. A group that is added later takes the
        others'. Give it to go on from a step.
    epsilon: the annealed number in [0, 1], 1 free, 0 levels only; a 0-d tensor is filled in place.
    anneal: "capture" (ours) or "interval" (the paper's). skew_at: what the constraint acts on, "velocity" or, as in the
        authors' code, "gradient" (interval only).
    recovery: share in (0, 1] of the distance that a constrained weight makes up in a step. alpha: the paper's rate, per
        unit of lr, instead of it. Default: recovery 0.5, or alpha 1 with skew_at="gradient".
    max_step: cap on the pull, in units of half the distance between levels. clip: keep weights within the outermost
        levels.
    outputs: "codes" and "snapped" are written by the step itself, to ``optimizer.outputs[p]``.
    state_dtype: torch.float32 keeps the state of 16-bit weights in float32.
    low_precision: what becomes of 16-bit weights' steps that are small against their last place. "nearest": they are
        lost. "remainder": 16 more bits per weight keep them, exactly as float32 weights (float16: from 2^-16 on).
        "stochastic": rounded up or down by chances whose mean is right; ``seed`` starts them and is advanced by every
        step, so that a run repeats itself, on every backend and number of threads. ``optimizer.first_elements[p]``
        tells where p begins when it is a part of a larger weight.
    backend: "auto", "cuda", "triton", "cpu" or "reference".
    fused, foreach: accepted as torch's are; every backend is fused. differentiable: not offered.

    State per weight: torch's, ``scale``, and ``remainder`` (int16) where it is kept. Raises ValueError, TypeError or
    RuntimeError (a backend that is absent) with the argument, its value and the remedy.
    """

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
    __doc__ = f"""torch.optim.SGD, argument for argument, whose quantized weights end on their levels.
    {_KEYWORDS}
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
        **constraint: Any,
    ):
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
            "maximize": maximize, "foreach": foreach, "differentiable": differentiable, "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults, constraint)

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
    __doc__ = f"""torch.optim.AdamW, argument for argument, whose quantized weights end on their levels.
    {_KEYWORDS}
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
        **constraint: Any,
    ):
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "foreach": foreach, "capturable": capturable, "differentiable": differentiable,
            "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults, constraint)

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
