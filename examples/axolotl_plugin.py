"""A plug-in for axolotl, read against its API of July 2026; axolotl itself is needed to run it.

In a configuration:

    plugins:
      - examples.axolotl_plugin.AskewPlugin
    askew_weights: ternary/channel
    askew_pretrained: true
    askew_packed: out/model.safetensors
    askew_keywords: {low_precision: remainder}

The optimizer named there is replaced; learning rate, weight decay and steps are those of the configuration.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from askew_cuda.integrations.transformers import quantize_trainer


class AskewArgs(BaseModel):
    """What the plug-in reads from a configuration; see quantize_trainer."""

    askew_weights: str | dict[str, str | None]
    askew_pretrained: bool = True
    askew_packed: str | None = None
    askew_keywords: dict[str, Any] = {}


class AskewPlugin(BasePlugin):
    """Makes axolotl's trainer train onto the levels."""

    def get_input_args(self) -> str:
        return "examples.axolotl_plugin.AskewArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        quantize_trainer(
            trainer,
            cfg.askew_weights,
            pretrained=cfg.askew_pretrained,
            packed=cfg.askew_packed,
            **(cfg.askew_keywords or {}),
        )
