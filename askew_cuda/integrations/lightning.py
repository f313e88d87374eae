"""Lightning: an AskewSGD or AskewAdamW from ``configure_optimizers`` needs nothing else; this callback is for quantized
validation, logs, and the end.

    trainer = lightning.Trainer(callbacks=[LightningQuantization(packed="model.safetensors")])
"""

import contextlib
import os
from typing import Any

import lightning
import torch

from ..monitor import Monitor
from ..optimizer import FinalizeReport, QuantizedOptimizer
from ..packed.file import save_packed
from ..wrappers import unwrap


class LightningQuantization(lightning.Callback):
    """What a Trainer does beside the steps: validation of quantized weights, logs, snapping at the end.

    Checkpoints hold the trained weights. A callback that writes one of its own while validation ends is to stand
    behind this one, as Lightning puts its ModelCheckpoint.

    Args:
        quantized_evaluation: whether validation inside of fit() is of quantized weights. It takes a copy of them
            meanwhile.
        logs: whether askew/share_on_level, askew/max_distance and, from the second time on, askew/flips, of all
            quantized weights, are logged every ``log_every_n_steps`` steps.
        finalize: snap the weights for good when training ends; ``reports``, one for each optimizer of ours, say how
            far they were.
        packed: a file that :func:`~askew_cuda.save_packed` writes when training ends, of the whole LightningModule;
            None: none.

    Raises when training begins: TypeError: no optimizer is an AskewSGD or AskewAdamW. ValueError: ``packed`` with
        several of them; one has other total_steps than this training, or has made none where the Trainer has.
    """

    def __init__(
        self,
        *,
        quantized_evaluation: bool = True,
        logs: bool = True,
        finalize: bool = True,
        packed: str | os.PathLike[str] | None = None,
    ):
        self.quantized_evaluation, self.logs, self.finalize, self.packed = quantized_evaluation, logs, finalize, packed
        self.reports: list[FinalizeReport] = []
        self._inside = contextlib.ExitStack()
        self._watches: list[Monitor] = []
        self._logged = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Checks that there are optimizers of ours, and that they count this training's steps."""
        found = _ours(trainer)
        if not found:
            kinds = ", ".join(type(unwrap(each)).__name__ for each in trainer.optimizers) or "none"
            raise TypeError(
                f"LightningQuantization: configure_optimizers() returned {kinds}; an AskewSGD or AskewAdamW is needed"
            )
        if self.packed is not None and len(found) > 1:
            raise ValueError(
                f"LightningQuantization: packed = {str(self.packed)!r}, and {len(found)} optimizers; leave it None, "
                "and call save_packed for each"
            )
        if len(trainer.optimizers) == 1 and pl_module.automatic_optimization:
            _check_steps(found[0], trainer)
        for watch in self._watches:
            watch.close()
        self._watches = [Monitor(each, every=None) for each in found] if self.logs else []
        self._logged, self.reports = trainer.global_step, []

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs, every ``log_every_n_steps`` steps."""
        step = trainer.global_step
        if step == self._logged or step % trainer.log_every_n_steps:
            return
        self._logged = step
        for index, watch in enumerate(self._watches):
            sample = watch.sample()["all"]
            record = {"share_on_level": sample.share_on_level, "max_distance": sample.max_distance}
            if sample.flips is not None:
                record["flips"] = sample.flips
            place = "askew" if len(self._watches) == 1 else f"askew/{index}"
            self.log_dict({f"{place}/{name}": value for name, value in record.items()})

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Puts the weights on their levels."""
        if self.quantized_evaluation:
            for each in _ours(trainer):
                self._inside.enter_context(each.quantized())

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Gives the trained weights back."""
        self._inside.close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Gives the trained weights back."""
        self._inside.close()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Finalizes and saves, as asked for."""
        found = _ours(trainer)
        if self.finalize:
            self.reports = [each.finalize() for each in found]
        if self.packed is not None and trainer.is_global_zero:
            save_packed(pl_module, found[0], self.packed)


def _ours(trainer: lightning.Trainer) -> list[QuantizedOptimizer]:
    found: list[torch.optim.Optimizer] = [unwrap(each) for each in trainer.optimizers]
    return [each for each in found if isinstance(each, QuantizedOptimizer)]


def _check_steps(optimizer: QuantizedOptimizer, trainer: lightning.Trainer) -> None:
    group = optimizer.param_groups[0]
    total, done = group["total_steps"], group["steps_done"]
    if total is None:
        return
    if total != trainer.estimated_stepping_batches:
        raise ValueError(
            f"LightningQuantization: the optimizer anneals in total_steps = {total}, and this training has "
            f"{trainer.estimated_stepping_batches} steps; in configure_optimizers give "
            "total_steps=self.trainer.estimated_stepping_batches"
        )
    if done > trainer.global_step or (done == 0) != (trainer.global_step == 0):
        raise ValueError(
            f"LightningQuantization: the optimizer has made {done} steps, the Trainer {trainer.global_step}; go on "
            "from a checkpoint that holds the optimizer (save_weights_only=False), by fit(.., ckpt_path=..)"
        )
