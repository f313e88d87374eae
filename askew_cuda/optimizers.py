"""AskewSGD and AskewAdamW: torch.optim.SGD and torch.optim.AdamW whose weights end on a few levels."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import backends
from .keywords import Group, counter_dtype
from .optimizer import Batch, Call, QuantizedOptimizer

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
        :func:`~askew_cuda.param_groups` writes these four, from what it knows of the layers. Bare parameters get the
        defaults, whatever stands beside them: not normalised; the output first, all other dimensions inputs. And a
        quantizer takes EVERY parameter of its group, biases and gains of norms included, which networks are better off
        without: give those a group with quantizer None, or use param_groups, which does.
    quantize_frozen: whether weights that are frozen and were never stepped are snapped and coded, too. Else they keep
        their values, and are saved as they are; once they train, they are quantized like all others.
    epsilon: the annealed number in [0, 1], 1 free, 0 levels only; mostly set by :class:`~askew_cuda.Anneal`, which
        fills a 0-d tensor in place.
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
        if not group["momentum"] >= 0:
            raise ValueError(f"momentum = {group['momentum']!r}; at least 0")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov = True with momentum = {group['momentum']}, dampening = {group['dampening']}; it needs "
                "momentum and no dampening"
            )

    def _calls(self, group: Group, backend: backends.Operators, batch: Batch) -> Iterator[Call]:
        if group["momentum"] == 0 or group["dampening"] == 0:
            yield self._call(group, backend, batch, 0.0)
            return
        # The first gradient that is applied fills the buffer undamped: with the buffer at zero, that is a step without
        # dampening.
        fresh = ["momentum_buffer" not in state for state in batch.states]
        rest, first = batch.pick([not each for each in fresh]), batch.pick(fresh)
        if rest.weights:
            yield self._call(group, backend, rest, group["dampening"])
        # With a step that AMP skips on a device a buffer would come to be, and the next step would be damped. So
        # found_inf is read here, which waits for the device; not in a captured graph, where a flag beside the buffer
        # has to answer.
        if first.weights and not self._overflowed(wait=True):
            yield self._call(group, backend, first, 0.0)

    def _call(self, group: Group, backend: backends.Operators, batch: Batch, dampening: float) -> Call:
        scales = self._scales(group, batch)
        codes, snapped = self._outputs(group, batch)
        levels, settings = self._constraint(group, batch)
        settings |= {"momentum": group["momentum"], "dampening": dampening, "nesterov": group["nesterov"]}
        buffers = self._moments(group, batch, "momentum_buffer") if group["momentum"] != 0 else []
        settings |= self._rounding(group, batch)
        return partial(backend.sgd_, batch.weights, batch.grads, buffers, scales, levels, codes, snapped, **settings)


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
        betas = tuple(float(beta) for beta in group["betas"])
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas = {group['betas']!r}; two numbers in [0, 1)")
        if not group["eps"] >= 0:
            raise ValueError(f"eps = {group['eps']!r}; at least 0")

    def _calls(self, group: Group, backend: backends.Operators, batch: Batch) -> Iterator[Call]:
        counted_there = self._counted_there(group)
        if not counted_there and self._overflowed(
            wait=True
        ):  # the host counts the steps, and has to know whether this one counts
            return
        scales = self._scales(group, batch)
        codes, snapped = self._outputs(group, batch)
        levels, settings = self._constraint(group, batch)
        beta1, beta2 = (float(beta) for beta in group["betas"])
        settings |= {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "amsgrad": group["amsgrad"]}
        if not counted_there:
            settings["found_inf"] = None
        keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")
        moments = [self._moments(group, batch, key) for key in keys] + [[]] * (3 - len(keys))
        steps = self._steps(batch, batch.weights[0].device if counted_there else torch.device("cpu"))
        settings |= self._rounding(group, batch)
        yield partial(
            backend.adamw_, batch.weights, batch.grads, *moments, steps, scales, levels, codes, snapped, **settings
        )

    def _counted_there(self, group: Group) -> bool:
        """Whether the GPU counts the steps: a captured graph has to, and with AMP it alone knows which ones count."""
        found = getattr(self, "found_inf", None)
        return group["capturable"] or (isinstance(found, Tensor) and found.device.type != "cpu")

    @staticmethod
    def _steps(batch: Batch, where: torch.device) -> list[Tensor]:
        """How many steps each weight has made, counted there; once a GPU counts those of a call, it goes on doing
        so.
        """
        steps = batch.tensors("step", lambda weight: torch.zeros((), dtype=counter_dtype(), device=where))
        device = batch.weights[0].device
        if device.type != "cpu" and len({step.device for step in steps} | {where}) > 1:
            pairs = zip(batch.states, steps, strict=True)
            steps = [
                step if step.device == device else batch.staged.put(state, "step", step.to(device))
                for state, step in pairs
            ]
        return steps
