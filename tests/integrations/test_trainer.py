"""Hugging Face's Trainer: the one line does what a loop written by hand does, and none of the traps is silent."""

import importlib
import warnings

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed; `make test-integrations` installs it")
transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is in the dev extra")

import askew_cuda as askew
from askew_cuda.integrations import transformers as integration
from askew_cuda.integrations.transformers import TrainerQuantization, quantize_trainer, trainer_optimizer
from askew_cuda.wrappers import unwrap
from tests.integrations.tiny import Counting, Endless, InOrder, language_model, trainer


def quantized(folder, model=None, *, spec="ternary/channel", ours=None, **given):
    """A Trainer that trains quantized, quietly."""
    made = trainer(folder, model, **given)
    quantize_trainer(made, spec, verbose=False, **(ours or {}))
    return made


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> bool:
    return these.keys() == those.keys() and all(torch.equal(value, those[name]) for name, value in these.items())


def on_levels(optimizer) -> bool:
    found = list(unwrap(optimizer).quantized_parameters())
    assert found
    return all(torch.equal(weight, scale * levels[codes.long()]) for weight, codes, levels, scale in found)


def saved(folder, step: int) -> dict[str, torch.Tensor]:
    model = transformers.LlamaForCausalLM.from_pretrained(folder / f"checkpoint-{step}")
    return weights(model)


class ByHand(InOrder):
    """What a user would write without us."""

    def create_optimizer(self, model=None):
        decayed = set(self.get_decay_parameter_names(self.model))
        names = [name for name, _ in self.model.named_parameters() if name not in decayed]
        groups = askew.param_groups(self.model, "ternary/channel", no_decay=names, verbose=False)
        self.optimizer = askew.AskewAdamW(
            groups, lr=0.02, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6, total_steps=40
        )
        return self.optimizer


def test_groups_rates_and_steps_are_those_of_trainer_and_its_arguments(tmp_path):
    given = {"weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    made = quantized(tmp_path / "ours", **given)
    made.train()
    hand = trainer(tmp_path / "hand", kind=ByHand, **given)
    hand.train()
    ours, theirs = unwrap(made.optimizer), unwrap(hand.optimizer)
    assert type(ours) is askew.AskewAdamW
    keys = ("weight_decay", "lr", "betas", "eps", "total_steps", "steps_done", "param_names", "quantizer")
    assert [[g[key] for key in keys] for g in ours.param_groups] == [
        [g[key] for key in keys] for g in theirs.param_groups
    ]
    assert {group["weight_decay"] for group in ours.param_groups} == {0.0, 0.1}
    theirs.finalize()
    assert same(weights(made.model), weights(hand.model))
    assert on_levels(made.optimizer)
    assert ours.param_groups[0]["epsilon"] == 0


def test_epochs_and_accumulation_count_optimizer_steps(tmp_path):
    made = quantized(tmp_path, max_steps=-1, num_train_epochs=16, gradient_accumulation_steps=3)
    assert trainer_optimizer(made, "ternary", verbose=False).param_groups[0]["total_steps"] == 32
    made.train()  # 4 batches an epoch: two steps
    group = unwrap(made.optimizer).param_groups[0]
    assert (group["total_steps"], group["steps_done"], made.state.global_step) == (32, 32, 32)
    assert on_levels(made.optimizer)


def test_the_rule_of_sgd_and_keywords_of_ours(tmp_path):
    ours = {"rule": askew.AskewSGD, "momentum": 0.9, "hold": 0.25, "normalized": False, "pretrained": True}
    made = quantized(tmp_path, ours=ours)
    made.train()
    optimizer = unwrap(made.optimizer)
    assert type(optimizer) is askew.AskewSGD
    first = optimizer.param_groups[0]
    assert (first["momentum"], first["hold"], first["normalized"], first["pretrained"]) == (0.9, 0.25, False, True)
    assert on_levels(made.optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16(tmp_path, dtype):
    model = language_model().to(dtype)
    made = quantized(tmp_path, model, bf16=True, ours={"low_precision": "remainder"} if dtype != torch.float32 else {})
    made.train()
    assert {weight.dtype for weight in made.model.parameters()} == {dtype}
    assert made.callback_handler.callbacks[-1].report.share_on_level == 1
    for weight, codes, levels, scale in unwrap(made.optimizer).quantized_parameters():
        assert torch.equal(weight, (scale * levels[codes.long()]).to(dtype))


def test_a_resumed_training_is_the_one_that_was_not_cut(tmp_path):
    whole = quantized(tmp_path / "a", save_strategy="steps", save_steps=16, lr_scheduler_type="cosine")
    whole.train()
    rest = quantized(tmp_path / "b", lr_scheduler_type="cosine")
    rest.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-16"))
    assert 0 < torch.load(tmp_path / "a/checkpoint-16/optimizer.pt")["param_groups"][0]["epsilon"] < 1
    assert same(weights(whole.model), weights(rest.model))
    assert on_levels(rest.optimizer)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, saving = quantized(tmp_path / "a"), quantized(tmp_path / "b", activation_checkpointing=True)
    plain.train()
    saving.train()
    assert same(weights(plain.model), weights(saving.model))


def test_frozen_weights_keep_their_values(tmp_path):
    model = language_model()
    frozen = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    before = frozen.detach().clone()
    made = quantized(tmp_path, model, eval_strategy="steps", eval_steps=20)
    made.train()
    assert torch.equal(frozen, before)
    callback = made.callback_handler.callbacks[-1]
    assert callback.report.left_alone == ("model.layers.0.self_attn.q_proj.weight",)
    assert callback.report.share_on_level == 1


class Watching(transformers.TrainerCallback):
    """Whether the quantized weights are on their levels, while predictions are made and when something is saved."""

    def __init__(self):
        self.predicting, self.saving = [], []

    def on_prediction_step(self, args, state, control, optimizer=None, **_):
        self.predicting.append((state.global_step, on_levels(optimizer)))

    def on_save(self, args, state, control, optimizer=None, **_):
        self.saving.append((state.global_step, on_levels(optimizer)))


def test_evaluation_is_of_quantized_weights_and_checkpoints_of_trained_ones(tmp_path):
    watching = Watching()
    steps = {"save_strategy": "steps", "save_steps": 10}
    made = quantized(
        tmp_path / "a",
        callbacks=[watching],
        test={"one": Counting(32, seed=1), "two": Counting(32, seed=2)},
        eval_strategy="steps",
        eval_steps=10,
        eval_on_start=True,
        **steps,
    )
    made.train()
    assert len(watching.predicting) == 5 * 2 * 2  # at 0, 10, 20, 30 and 40 steps, two data sets of two batches each
    assert all(snapped for _, snapped in watching.predicting)
    assert [step for step, _ in watching.saving] == [10, 20, 30, 40]
    assert [snapped for _, snapped in watching.saving] == [False, False, False, True]  # annealed to the end
    plain = quantized(tmp_path / "b", ours={"quantized_evaluation": False}, **steps)
    plain.train()
    for step in (10, 20):
        assert same(saved(tmp_path / "a", step), saved(tmp_path / "b", step))
    assert same(weights(made.model), weights(plain.model))


def test_an_error_while_it_evaluates_leaves_the_trained_weights(tmp_path):
    def fail(_):
        raise RuntimeError("no metrics today")

    made = quantized(tmp_path, other={"compute_metrics": fail}, eval_strategy="steps", eval_steps=4)
    with pytest.raises(RuntimeError, match="no metrics"):
        made.train()
    assert not on_levels(made.optimizer)
    made.compute_metrics = None
    before = weights(made.model)
    by_hand = made.evaluate()["eval_loss"]
    assert same(before, weights(made.model))
    with unwrap(made.optimizer).quantized():
        made.optimizer, kept = None, made.optimizer
        assert made.evaluate()["eval_loss"] == by_hand
        made.optimizer = kept
    made.optimizer = None
    assert made.evaluate()["eval_loss"] != by_hand


def test_the_best_model_is_the_one_that_was_measured(tmp_path):
    made = quantized(
        tmp_path,
        eval_strategy="steps",
        eval_steps=10,
        save_strategy="steps",
        save_steps=10,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst, so that it is not the last one
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        made.train()
    assert made.state.best_global_step < 40
    assert unwrap(made.optimizer).param_groups[0]["steps_done"] == made.state.best_global_step
    assert on_levels(made.optimizer)
    assert made.evaluate()["eval_loss"] == made.state.best_metric


def test_scales_that_learn_belong_to_the_best_model_too(tmp_path):
    best = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    }
    made = quantized(tmp_path / "a", ours={"scale_lr": 0.1}, **best)
    made.train()
    assert made.state.best_global_step == 4
    kept = torch.load(tmp_path / "a/checkpoint-4/optimizer.pt")["state"]
    last = torch.load(tmp_path / "a/checkpoint-40/optimizer.pt")["state"]
    assert any(not torch.equal(kept[key]["scale"], last[key]["scale"]) for key in kept if "scale" in kept[key])
    assert on_levels(made.optimizer)
    assert made.evaluate()["eval_loss"] == made.state.best_metric
    lacking = quantized(tmp_path / "b", ours={"scale_lr": 0.1}, save_only_model=True, **best)
    with pytest.raises(ValueError, match=r"leave save_only_model False, or give scale_lr=0"):
        lacking.train()
    fixed = quantized(tmp_path / "c", ours={"scale_lr": 0.0}, save_only_model=True, **best)
    fixed.train()
    assert fixed.evaluate()["eval_loss"] == fixed.state.best_metric


@pytest.mark.parametrize("given", [{}, {"max_steps": -1, "num_train_epochs": 10, "logging_strategy": "epoch"}])
def test_logs_come_before_trainers_own(tmp_path, given):
    made = quantized(tmp_path, **given)
    made.train()
    *history, last, summary = made.state.log_history
    ours = [each for each in history if "askew/epsilon" in each]
    theirs = [each for each in made.state.log_history if "loss" in each]
    assert [each["step"] for each in ours] == [each["step"] for each in theirs]
    assert len(ours) == (10 if given else 4)
    assert "askew/flips" not in ours[0]
    assert all(0 <= each["askew/flips"] <= 1 for each in ours[1:])
    assert ours[-1]["askew/share_on_level"] == 1
    assert ours[-1]["askew/epsilon"] == 0
    assert ours[0]["askew/epsilon"] == 1
    assert "train_loss" in last
    assert summary["askew/share_on_level"] == 1
    assert made.callback_handler.callbacks[-1].watch.picture().axes

    quiet = quantized(tmp_path, ours={"logs": False, "finalize": False}, **given)
    quiet.train()
    assert not any(key.startswith("askew") for each in quiet.state.log_history for key in each)


def test_it_ends_with_a_packed_file(tmp_path):
    made = quantized(tmp_path, ours={"packed": tmp_path / "model.safetensors"})
    made.train()
    fresh = language_model(seed=5)
    askew.load_packed(tmp_path / "model.safetensors", fresh)
    assert same(weights(fresh), weights(made.model))
    batch = {key: value[None] for key, value in Counting()[0].items()}
    assert torch.equal(fresh.eval()(**batch).loss, made.model.eval()(**batch).loss)


def test_other_trainers_and_models_that_are_made_anew(tmp_path):
    arguments_kind = transformers.Seq2SeqTrainingArguments
    made = trainer(tmp_path, kind=transformers.Seq2SeqTrainer, arguments_kind=arguments_kind)
    quantize_trainer(made, "4bit", verbose=False)
    made.train()
    assert on_levels(made.optimizer)
    anew = transformers.Trainer(args=made.args, model_init=lambda: language_model(), train_dataset=Counting())
    quantize_trainer(anew, "4bit", verbose=False)
    anew.train()
    assert on_levels(anew.optimizer)


def test_another_optimizer_is_refused(tmp_path):
    made = trainer(tmp_path)
    made.add_callback(TrainerQuantization(made))
    with pytest.raises(TypeError, match=r"optimizer is a AdamW; .* quantize_trainer"):
        made.train()
    model = language_model()
    theirs = torch.optim.SGD(model.parameters(), lr=0.1)
    before = len(made.callback_handler.callbacks)
    for other in ({"optimizers": (theirs, None)}, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}):
        given = trainer(tmp_path, model, other=other)
        with pytest.raises(ValueError, match="has an optimizer already"):
            quantize_trainer(given, "ternary")
        assert len(given.callback_handler.callbacks) == before - 1
    once = quantized(tmp_path)
    once.optimizer_cls_and_kwargs = None
    with pytest.raises(ValueError, match="call it once"):
        quantize_trainer(once, "ternary")


@pytest.mark.parametrize("name", ["lr", "weight_decay", "betas", "eps", "total_steps", "steps_done"])
def test_what_trainer_says_is_said_once(tmp_path, name):
    made = trainer(tmp_path)
    for call in (quantize_trainer, trainer_optimizer):
        with pytest.raises(TypeError, match=rf"{name} = 0.5: a Trainer takes it from its arguments; give Training"):
            call(made, "ternary", **{name: 0.5})
    assert made.optimizer_cls_and_kwargs is None


def test_unknown_steps_are_refused(tmp_path):
    with pytest.raises(ValueError, match="max_steps"):
        trainer(tmp_path, data=Endless(), max_steps=-1)
    made = quantized(tmp_path, data=Endless())
    made.args.max_steps = -1  # behind its back
    with pytest.raises(ValueError, match="max_steps"):
        trainer_optimizer(made, "ternary", verbose=False)
    made.args.max_steps = 36
    assert trainer_optimizer(made, "ternary", verbose=False).param_groups[0]["total_steps"] == 36
    made.train()
    assert on_levels(made.optimizer)


def test_steps_that_do_not_agree_are_refused(tmp_path):
    made = quantized(tmp_path / "a", save_strategy="steps", save_steps=20, save_only_model=True)
    made.train()
    with pytest.raises(ValueError, match="has made 40 steps, the Trainer 0"):
        made.train()
    rest = quantized(tmp_path / "b")
    with pytest.raises(ValueError, match=r"has made 0 steps, the Trainer 20.*save_only_model=False"):
        rest.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-20"))
    model = language_model()
    groups = askew.param_groups(model, "ternary", verbose=False)
    given = trainer(tmp_path, model, other={"optimizers": (askew.AskewAdamW(groups, lr=0.01, total_steps=50), None)})
    given.add_callback(TrainerQuantization(given))
    with pytest.raises(ValueError, match="total_steps = 50, and this training has 40"):
        given.train()


def test_an_old_version_says_so(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"transformers 5 or newer, here is 4\.57\.1"):
        importlib.reload(integration)
