"""timm's factory of optimizers: ``askewsgd`` and ``askewadamw``, once this is imported.

create_optimizer_v2(model, "askewsgd", lr=0.1, momentum=0.9, total_steps=n,
                    param_group_fn=functools.partial(askew_cuda.param_groups, weights="ternary", no_decay=True))
"""

from typing import Any

from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry
from torch.optim.optimizer import ParamsT

from ..optimizer import QuantizedOptimizer
from ..optimizers import AskewAdamW, AskewSGD


def _checked(rule: type[AskewSGD] | type[AskewAdamW], params: ParamsT, keywords: dict[str, Any]) -> QuantizedOptimizer:
    groups: list[Any] = list(params)
    said = [group for group in groups if isinstance(group, dict) and group.get("quantizer") is not None]
    if not said or "quantizer" in keywords:
        raise ValueError(
            f"{rule.__name__} from timm's factory: its groups don't say which weights are quantized, and a quantizer "
            "for all of them would take biases and norms, too; give create_optimizer_v2(.., param_group_fn="
            "functools.partial(askew_cuda.param_groups, weights='ternary', no_decay=True))"
        )
    return rule(groups, **keywords)


def askew_sgd(params: ParamsT, **keywords: Any) -> QuantizedOptimizer:
    """AskewSGD of groups from :func:`~askew_cuda.param_groups`. Raises ValueError for others."""
    return _checked(AskewSGD, params, keywords)


def askew_adamw(params: ParamsT, **keywords: Any) -> QuantizedOptimizer:
    """AskewAdamW of groups from :func:`~askew_cuda.param_groups`. Raises ValueError for others."""
    return _checked(AskewAdamW, params, keywords)


default_registry.register(  # timm splits names at underscores
    OptimInfo(
        "askewsgd", askew_sgd, "SGD whose quantized weights end on their levels", has_eps=False, has_momentum=True
    )
)
default_registry.register(
    OptimInfo("askewadamw", askew_adamw, "AdamW whose quantized weights end on their levels", has_betas=True)
)
