"""Hugging Face's Trainer: one line after it was made, and it trains onto the levels.

    trainer = Trainer(model, arguments, train_dataset=.., eval_dataset=..)
    quantize_trainer(trainer, "ternary/channel", packed="model.safetensors")
    trainer.train()

Importing this also teaches ``from_pretrained`` to read what ``save_pretrained`` writes of packed models.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from ..monitor import Monitor
from ..optimizer import FinalizeReport, QuantizedOptimizer
from ..optimizers import AskewAdamW, AskewSGD
from ..packed.file import save_packed
from ..param_groups import Spec, param_groups
from ..scales import learning_rate
from ..typed_keywords import GroupKeywords
from ..wrappers import unwrap

if TYPE_CHECKING:
    from typing_extensions import Unpack

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(
        f"askew_cuda.integrations.transformers needs transformers 5 or newer, here is {transformers.__version__}: "
        "pip install --upgrade transformers"
    )

# Keywords that Trainer's own arguments say, and in which of them.
_IN_ARGUMENTS = {
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "betas": "adam_beta1, adam_beta2",
    "eps": "adam_epsilon",
    "total_steps": "max_steps or num_train_epochs",
    "steps_done": "max_steps, and trainer.train(resume_from_checkpoint=..)",
}
_OF_THE_MODEL = ("normalized", "trained_norms")


def quantize_trainer(
    trainer: transformers.Trainer,
    weights: Spec | Mapping[str, Spec],
    *,
    rule: type[AskewAdamW] | type[AskewSGD] = AskewAdamW,
    pretrained: bool | str = False,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    quantized_evaluation: bool = True,
    logs: bool = True,
    finalize: bool = True,
    packed: str | os.PathLike[str] | None = None,
    verbose: bool = True,
    **keywords: "Unpack[GroupKeywords]",
) -> "TrainerQuantization":
    """Makes a Trainer train with our optimizer, evaluate with quantized weights, and end on the levels.

    Args:
        trainer: a Trainer, or one of a subclass (Seq2SeqTrainer, TRL's). Its optimizer and callbacks are changed; the
            model is not, before train().
        weights, pretrained, include, exclude, verbose: as for :func:`~askew_cuda.param_groups`.
        quantized_evaluation, logs, finalize, packed: as for :class:`TrainerQuantization`.
        rule, keywords: as for :func:`trainer_optimizer`, which is called when training begins.

    Returns: The callback; after the training its ``report`` says how far the weights had to go.

    Raises: ValueError: the trainer has an optimizer, or was given to this function before; nothing has changed.
        TypeError: a keyword is one that TrainingArguments say.
    """
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        raise ValueError(
            "quantize_trainer: this Trainer has an optimizer already; leave out optimizers= and "
            "optimizer_cls_and_kwargs=, or build it by trainer_optimizer and add TrainerQuantization as a callback"
        )
    if any(isinstance(each, TrainerQuantization) for each in trainer.callback_handler.callbacks):
        raise ValueError("quantize_trainer: this Trainer has a TrainerQuantization already; call it once")
    _refuse_what_trainer_says(keywords)
    build = functools.partial(
        trainer_optimizer,
        trainer,
        weights,
        rule=rule,
        pretrained=pretrained,
        include=include,
        exclude=exclude,
        verbose=verbose,
        **keywords,
    )
    callback = TrainerQuantization(
        trainer, quantized_evaluation=quantized_evaluation, logs=logs, finalize=finalize, packed=packed
    )
    # Trainer calls what the first call returns; axolotl gives its arguments besides
    trainer.optimizer_cls_and_kwargs = (lambda: lambda model, *_: build(model=model), {})
    trainer.add_callback(callback)
    return callback


def trainer_optimizer(
    trainer: transformers.Trainer,
    weights: Spec | Mapping[str, Spec],
    *,
    model: nn.Module | None = None,
    rule: type[AskewAdamW] | type[AskewSGD] = AskewAdamW,
    pretrained: bool | str = False,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    verbose: bool = True,
    **keywords: "Unpack[GroupKeywords]",
) -> QuantizedOptimizer:
    """The optimizer of a Trainer, for a ``create_optimizer`` of one's own.

    Learning rate, weight decay (and which parameters are free of it), AdamW's betas and eps, and the number of steps
    are those of the trainer and its arguments. The trainer is not mutated.

    Args:
        model: whose weights are trained; None: ``trainer.model``.
        rule: AskewAdamW or AskewSGD.
        weights, pretrained, include, exclude, verbose: as for :func:`~askew_cuda.param_groups`.
        keywords: of the optimizer, such as ``momentum=0.9`` or ``low_precision="remainder"``.

    Raises: ValueError: as :func:`~askew_cuda.param_groups`; or the number of steps is not known. TypeError: a keyword
        is one that TrainingArguments say.
    """
    _refuse_what_trainer_says(keywords)
    given: dict[str, Any] = dict(keywords)
    model = trainer.model if model is None else model
    decayed = set(trainer.get_decay_parameter_names(model))
    groups = param_groups(
        model,
        weights,
        pretrained=pretrained,
        include=include,
        exclude=exclude,
        no_decay=[name for name, _ in model.named_parameters() if name not in decayed],
        verbose=verbose,
        **{name: given.pop(name) for name in _OF_THE_MODEL if name in given},
    )
    arguments = trainer.args
    settings = {"lr": arguments.learning_rate, "weight_decay": arguments.weight_decay, **given}
    if issubclass(rule, AskewAdamW):
        settings |= {"betas": (arguments.adam_beta1, arguments.adam_beta2), "eps": arguments.adam_epsilon}
    return rule(groups, total_steps=_total_steps(trainer), **settings)


def _refuse_what_trainer_says(keywords: Mapping[str, object]) -> None:
    for name, argument in _IN_ARGUMENTS.items():
        if name in keywords:
            raise TypeError(
                f"{name} = {keywords[name]!r}: a Trainer takes it from its arguments; give TrainingArguments("
                f"{argument}), and leave it out here"
            )


def _total_steps(trainer: transformers.Trainer) -> int:
    """Optimizer steps of the training that goes on, or of the one that train() would make."""
    if trainer.is_in_train and trainer.state.max_steps > 0:
        return int(trainer.state.max_steps)
    steps: int | None = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    if steps is None or steps < 1:
        raise ValueError(
            f"the number of steps of this training is {steps}, and annealing needs it: give TrainingArguments("
            "max_steps=..)"
        )
    return steps


class TrainerQuantization(transformers.TrainerCallback):
    """What a Trainer does beside the steps of an AskewSGD or AskewAdamW: quantized evaluation, logs, the end.

    Evaluation and prediction see the weights on their levels, from the moment that the optimizer exists: in train(),
    by hand, for several data sets, and whatever is raised in them. Checkpoints hold the trained weights, so that
    resuming is exact, bit for bit. With load_best_model_at_end the optimizer's state of the best checkpoint is loaded
    beside its weights, and these are snapped: the model that was measured.

    Args:
        trainer: whose optimizer is, when training begins, an AskewSGD or AskewAdamW. Its evaluation is wrapped.
        quantized_evaluation: whether evaluation is of quantized weights. It takes a copy of them meanwhile.
        logs: whether every record of the Trainer has one before it of all quantized weights: askew/share_on_level,
            askew/max_distance, askew/epsilon and, from the second on, askew/flips.
        finalize: snap the weights for good when training ends; ``report`` says how far they were.
        packed: a file that :func:`~askew_cuda.save_packed` writes when training ends; None: none.

    Raises when training begins: TypeError: the optimizer is another one. ValueError: its total_steps are not those of
        this training, or it has made other steps than the Trainer has; or its scales learn, and the best model is to be
        loaded from checkpoints without them.
    """

    def __init__(
        self,
        trainer: transformers.Trainer,
        *,
        quantized_evaluation: bool = True,
        logs: bool = True,
        finalize: bool = True,
        packed: str | os.PathLike[str] | None = None,
    ):
        self.trainer, self.logs, self.finalize, self.packed = trainer, logs, finalize, packed
        self.quantized_evaluation = quantized_evaluation
        self.watch: Monitor | None = None
        self.report: FinalizeReport | None = None
        if quantized_evaluation:
            # There is no event before an evaluation, and those after it come once for each of several data sets, and
            # not at all after an error.
            trainer.evaluation_loop = self._quantized(trainer.evaluation_loop)

    def _quantized(self, evaluation: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(evaluation)
        def of_quantized_weights(*args: Any, **kwargs: Any) -> Any:
            optimizer = self.trainer.optimizer
            inner = None if optimizer is None else unwrap(optimizer)
            with inner.quantized() if isinstance(inner, QuantizedOptimizer) else contextlib.nullcontext():
                return evaluation(*args, **kwargs)

        return of_quantized_weights

    def _optimizer(self) -> QuantizedOptimizer:
        optimizer = unwrap(self.trainer.optimizer)
        if not isinstance(optimizer, QuantizedOptimizer):
            raise TypeError(
                f"TrainerQuantization: the Trainer's optimizer is a {type(optimizer).__name__}; an AskewSGD or "
                "AskewAdamW is needed: call quantize_trainer(trainer, ..), or build one by trainer_optimizer"
            )
        return optimizer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Checks that optimizer and Trainer count the same steps."""
        optimizer = self._optimizer()
        group = optimizer.param_groups[0]
        done, total = group["steps_done"], group["total_steps"]
        if total is not None and total != state.max_steps:
            raise ValueError(
                f"TrainerQuantization: the optimizer anneals in total_steps = {total}, and this training has "
                f"{state.max_steps}; where the batch size was changed on the way (auto_find_batch_size), set it before"
            )
        if total is not None and (done > state.global_step or (done == 0) != (state.global_step == 0)):
            raise ValueError(
                f"TrainerQuantization: the optimizer has made {done} steps, the Trainer {state.global_step}. To go on "
                "from a checkpoint it must hold the optimizer (save_only_model=False); to train once more, make a new "
                "Trainer"
            )
        quantizers = ((each, optimizer._quantizer(each)) for each in optimizer.param_groups)
        learning = any(kind is not None and learning_rate(each, kind) > 0 for each, kind in quantizers)
        if learning and args.load_best_model_at_end and args.save_only_model:
            raise ValueError(
                "TrainerQuantization: save_only_model = True with load_best_model_at_end, and scales that learn: the "
                "best checkpoint would lack the scales that its weights belong to; leave save_only_model False, or "
                "give scale_lr=0"
            )
        if self.watch is not None:
            self.watch.close()
        self.watch, self.report = Monitor(optimizer, every=None) if self.logs else None, None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Logs, where the Trainer is about to."""
        self._log(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Logs, where the Trainer is about to."""
        self._log(control)

    def _log(self, control: Any) -> None:
        if self.watch is None or not control.should_log:
            return
        sample = self.watch.sample()["all"]
        annealed = [group for group in self._optimizer().param_groups if group["quantizer"] is not None]
        record = {
            "askew/share_on_level": sample.share_on_level,
            "askew/max_distance": sample.max_distance,
            "askew/epsilon": max(float(group["epsilon"]) for group in annealed),
        }
        if sample.flips is not None:
            record["askew/flips"] = sample.flips
        self.trainer.log(record)
        control.should_log = True  # log() takes it back, and Trainer's own record is still to come

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Finalizes and saves, as asked for."""
        optimizer = self._optimizer()
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        state_of_best = None if best is None else os.path.join(best, "optimizer.pt")
        if state_of_best is not None and os.path.isfile(
            state_of_best
        ):  # its scales and counts are those of its weights
            self.trainer.optimizer.load_state_dict(torch.load(state_of_best, map_location="cpu", weights_only=True))
        if self.finalize:
            with warnings.catch_warnings():
                if best is not None and self.quantized_evaluation:  # chosen for what it does when it is snapped
                    warnings.filterwarnings("ignore", message="finalize: ")
                self.report = optimizer.finalize()
            self.trainer.log(
                {
                    "askew/share_on_level": self.report.share_on_level,
                    "askew/max_distance": self.report.max_distance,
                }
            )
        if self.packed is not None and state.is_world_process_zero:
            save_packed(self.trainer.accelerator.unwrap_model(self.trainer.model), optimizer, self.packed)
