"""accelerate: prepared optimizers wherever one is taken, accumulation, and saving and loading of state."""

import pytest
import torch
from torch import nn

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed; `make test-integrations` does it")

import askew_cuda as askew

X = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


def prepared(accumulate: int = 1, steps: int = 48, precision: str = "no"):
    """An accelerator with a model, an optimizer that anneals itself, a schedule and batches of 8, prepared."""
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision)
    model = network()
    optimizer = askew.AskewSGD(
        askew.param_groups(model, "ternary", verbose=False), lr=0.2, momentum=0.9, total_steps=steps
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8)
    return accelerator, *accelerator.prepare(model, optimizer, schedule, loader)


def train(accelerator, model, optimizer, schedule, loader, epochs: int) -> None:
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_are_counted_and_weights_end_on_their_levels(accumulate):
    parts = prepared(accumulate, steps=48)
    train(*parts, epochs=8 * accumulate)
    inner = parts[2].optimizer
    assert {group["steps_done"] for group in inner.param_groups} == {48}
    assert inner.finalize().share_on_level == 1


def test_a_prepared_optimizer_is_taken_wherever_one_is(tmp_path):
    accelerator, model, optimizer, *rest = prepared()
    assert type(optimizer).__name__ == "AcceleratedOptimizer"
    watch = askew.monitor(optimizer, every=6)
    train(accelerator, model, optimizer, *rest, epochs=8)
    assert len(watch.history) == 8
    askew.save_packed(model, optimizer, tmp_path / "model.safetensors")
    fresh = network()
    askew.load_packed(tmp_path / "model.safetensors", fresh)
    optimizer.optimizer.finalize()
    assert same(fresh, model)
    wanted = model(X)
    assert torch.equal(askew.pack_modules(model, optimizer)(X), wanted)

    accelerator, model, optimizer, *_ = prepared(steps=None)
    anneal = askew.Anneal(optimizer, total_steps=10)
    anneal.steps_done = 9
    anneal.step()
    assert optimizer.param_groups[0]["epsilon"] == 0


def test_a_saved_state_goes_on_bit_for_bit(tmp_path):
    whole = prepared()
    train(*whole, epochs=4)
    whole[0].save_state(str(tmp_path))
    assert 0 < whole[2].param_groups[0]["epsilon"] < 1
    train(*whole, epochs=4)
    rest = prepared()
    rest[0].load_state(str(tmp_path))
    train(*rest, epochs=4)
    assert same(whole[1], rest[1])
    assert whole[2].optimizer.param_groups[0]["steps_done"] == rest[2].optimizer.param_groups[0]["steps_done"] == 48


def test_bf16():
    parts = prepared(precision="bf16")
    train(*parts, epochs=8)
    assert parts[2].optimizer.finalize().share_on_level == 1
