"""Lightning: configure_optimizers, precisions, clipping, resuming, and the callback."""

import pytest
import torch
from torch import nn

lightning = pytest.importorskip("lightning", reason="lightning is not installed; `make test-integrations` installs it")

import askew_cuda as askew
from askew_cuda.integrations.lightning import LightningQuantization

X = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning has advice for a run on two cores


class Module(lightning.LightningModule):
    """A network with a test in its validation: whether the weights are on their levels."""

    def __init__(self, steps=None, fail: bool = False, rule=askew.AskewSGD, **keywords):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        self.steps, self.fail, self.rule = steps, fail, rule
        self.keywords = {"lr": 0.2, "momentum": 0.9, **keywords}
        self.validated: list[bool] = []

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch, _):
        self.validated.append(on_levels(self))
        if self.fail and not self.trainer.sanity_checking:
            raise RuntimeError("no validation today")

    def configure_optimizers(self):
        groups = askew.param_groups(self, "ternary", verbose=False)
        total = self.trainer.estimated_stepping_batches if self.steps is None else self.steps
        return self.rule(groups, total_steps=total, **self.keywords)


def on_levels(module) -> bool:
    optimizer = module.optimizers(use_pl_optimizer=False)
    found = list(optimizer.quantized_parameters())
    return all(torch.equal(weight, (scale * levels[c.long()]).to(weight.dtype)) for weight, c, levels, scale in found)


def loader(batch: int = 8):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=batch)


def fit(folder, module=None, callback=None, path=None, validate: bool = False, **arguments):
    """A fitted trainer of 12 epochs of 6 steps, and its module."""
    module = Module() if module is None else module
    arguments = {"max_epochs": 12, "log_every_n_steps": 6, "enable_checkpointing": False, **arguments}
    callbacks = [*([] if callback is None else [callback]), *arguments.pop("callbacks", [])]
    trainer = lightning.Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, **arguments,
    )  # fmt: skip
    trainer.fit(module, loader(), *([loader()] if validate else []), ckpt_path=path)
    return trainer, module


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_anneals_in_the_estimated_steps(tmp_path, accumulate):
    callback = LightningQuantization()
    arguments = {"accumulate_grad_batches": accumulate, "max_epochs": 12 * accumulate}
    trainer, module = fit(tmp_path, callback=callback, **arguments)
    group = module.optimizers(use_pl_optimizer=False).param_groups[0]
    assert group["total_steps"] == group["steps_done"] == trainer.global_step == 72
    assert callback.reports[0].share_on_level == 1
    assert on_levels(module)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_precisions_and_clipping(tmp_path, precision, clip):
    keywords = {"low_precision": "remainder"} if precision == "bf16-true" else {}
    callback = LightningQuantization()
    _, module = fit(tmp_path, Module(**keywords), callback, precision=precision, gradient_clip_val=clip)
    assert callback.reports[0].share_on_level == 1
    assert on_levels(module)


def test_lightning_does_not_clip_for_an_optimizer_that_unscales_by_itself(tmp_path):
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(tmp_path, Module(fused=True), precision="bf16-mixed", gradient_clip_val=0.5)


def test_a_resumed_fit_is_the_one_that_was_not_cut(tmp_path):
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    arguments = {"enable_checkpointing": True, "callbacks": [saving]}
    _, whole = fit(tmp_path / "a", callback=LightningQuantization(), **arguments)
    _, rest = fit(tmp_path / "b", callback=LightningQuantization(), path=str(tmp_path / "epoch=6.ckpt"))
    assert same(whole, rest)
    kept = torch.load(tmp_path / "epoch=6.ckpt", weights_only=False)["optimizer_states"][0]["param_groups"][0]
    assert 0 < kept["epsilon"] < 1


def test_validation_is_of_quantized_weights_and_checkpoints_of_trained_ones(tmp_path):
    def saving(folder):
        return lightning.pytorch.callbacks.ModelCheckpoint(
            folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=False
        )

    arguments = {"enable_checkpointing": True, "validate": True}
    _, seen = fit(tmp_path, callback=LightningQuantization(), callbacks=[saving(tmp_path / "a")], **arguments)
    assert len(seen.validated) > 72
    assert all(seen.validated)
    plain = LightningQuantization(quantized_evaluation=False)
    _, unseen = fit(tmp_path, callback=plain, callbacks=[saving(tmp_path / "b")], **arguments)
    assert not any(unseen.validated[:8])
    assert same(seen, unseen)
    for epoch in (0, 3, 6):
        one, two = (
            torch.load(tmp_path / folder / f"epoch={epoch}.ckpt", weights_only=False)["state_dict"] for folder in "ab"
        )
        assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_an_error_in_validation_leaves_the_trained_weights(tmp_path):
    module, callback = Module(fail=True), LightningQuantization()
    with pytest.raises(RuntimeError, match="no validation"):
        fit(tmp_path, module, callback, validate=True)
    assert module.validated[-1]
    assert not on_levels(module)


def test_logs_and_a_packed_file_at_the_end(tmp_path):
    class Keeping(lightning.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, module, *_):
            self.seen.append({k: float(v) for k, v in trainer.logged_metrics.items() if k.startswith("askew")})

    keeping = Keeping()
    callback = LightningQuantization(packed=tmp_path / "model.safetensors")
    trainer, module = fit(tmp_path, callback=callback, callbacks=[keeping])
    logged = {key: float(value) for key, value in trainer.logged_metrics.items()}
    assert logged["askew/share_on_level"] == 1
    assert 0 <= logged["askew/flips"] <= 1
    fresh = Module()
    askew.load_packed(tmp_path / "model.safetensors", fresh)
    assert same(fresh, module)


def test_what_does_not_fit_is_refused(tmp_path):
    class Theirs(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Two(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [super().configure_optimizers(), torch.optim.SGD(self.parameters()), super().configure_optimizers()]

    for module, given, error, message in (
        (Theirs(), {}, TypeError, r"returned SGD; an AskewSGD or AskewAdamW is needed"),
        (Module(steps=50), {}, ValueError, "total_steps = 50, and this training has 72 steps"),
        (Two(), {"packed": tmp_path / "two"}, ValueError, "2 optimizers; leave it None"),
    ):
        with pytest.raises(error, match=message):
            fit(tmp_path, module, LightningQuantization(**given))
    with pytest.raises(TypeError, match="total_steps = inf; a whole number is needed"):
        fit(tmp_path, Module(), max_epochs=-1)


def test_without_the_optimizers_state_a_fit_is_refused(tmp_path):
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(tmp_path, callbacks=[saving], enable_checkpointing=True, max_epochs=2, module=Module(steps=12))
    path = tmp_path / "epoch=1.ckpt"
    kept = torch.load(path, weights_only=False)
    group = kept["optimizer_states"][0]["param_groups"][0]
    assert group["steps_done"] == 12
    for each in kept["optimizer_states"][0]["param_groups"]:
        each["steps_done"] = 0
    torch.save(kept, path)
    with pytest.raises(ValueError, match="has made 0 steps, the Trainer 12"):
        fit(tmp_path, callback=LightningQuantization(), path=str(path))
