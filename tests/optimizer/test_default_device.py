"""A default device, or dtype, of the program's own is none of a training's business: weights step where they are."""

import pytest
import torch
from torch import Tensor, nn

import askew_cuda as askew

pytestmark = pytest.mark.filterwarnings("ignore:finalize", "ignore:.*clipping to the outermost", "ignore:annealing")


class Model(nn.Module):
    """Weights that are on the CPU, wherever others are made."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32):
        super().__init__()
        generator = torch.Generator(device="cpu").manual_seed(seed)
        self.a, self.b = (
            nn.Parameter(torch.randn(shape, generator=generator, device="cpu").to(dtype)) for shape in ((4, 8), (3,))
        )


def fill(model: nn.Module, k: int) -> None:
    generator = torch.Generator(device="cpu").manual_seed(k)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator, device="cpu").to(weight.dtype)


def values(model: nn.Module, optimizer) -> list[Tensor]:
    kept = [value for weight in model.parameters() for value in optimizer.state[weight].values()]
    return [each.detach().clone() for each in [*model.parameters(), *kept]]


def train(rule: str, backend: str, dtype: torch.dtype, quantizer, path) -> list[Tensor]:
    """Everything that there is to do, from beginning to end."""
    ours, keywords = {
        "sgd": (askew.AskewSGD, {"momentum": 0.9, "dampening": 0.5}),
        "adamw": (askew.AskewAdamW, {"amsgrad": True}),
    }[rule]
    half = {"low_precision": "stochastic", "seed": 3, "state_dtype": torch.float32} if dtype.itemsize == 2 else {}

    def optimizer_of(model, **more):
        return ours(model.named_parameters(), lr=0.1, quantizer=quantizer, backend=backend, **keywords, **half, **more)

    model, again, loaded = Model(dtype=dtype), Model(1, dtype), Model(2, dtype)
    optimizer = optimizer_of(model, total_steps=6, outputs=["codes", "snapped"], pretrained=True)
    optimizer.prepare()
    watch = askew.monitor(optimizer, every=2)
    for k in range(4):
        fill(model, k)
        optimizer.step()
    with optimizer.quantized():
        watch.sample()
    other = optimizer_of(again)
    annealing = askew.Anneal(other, total_steps=4)
    for k in range(4):
        fill(again, k)
        other.step()
        annealing.step()
    resumed = optimizer_of(loaded, total_steps=6, pretrained=True)
    resumed.load_state_dict(optimizer.state_dict())
    fill(loaded, 4)
    resumed.step()
    repr(resumed)
    optimizer.finalize()
    found = [*values(model, optimizer), *values(again, other), *values(loaded, resumed)]
    askew.save_packed(model, optimizer, path)
    askew.load_packed(path, loaded)
    return [*found, *(weight.detach().clone() for weight in loaded.parameters())]


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantizer", ["ternary/channel", "nf4", askew.Quantizer([-1, 0, 2], scale=0.5)], ids=str)
def test_a_training_under_a_default_device(rule, backend, dtype, quantizer, tmp_path):
    wanted = train(rule, backend, dtype, quantizer, tmp_path / "wanted")
    torch.set_default_device("meta")
    try:
        found = train(rule, backend, dtype, quantizer, tmp_path / "found")
        torch.set_default_device("cpu")
        again = train(rule, backend, dtype, quantizer, tmp_path / "again")
    finally:
        torch.set_default_device(None)
    for mine in (found, again):
        assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))
    assert (tmp_path / "found").read_bytes() == (tmp_path / "wanted").read_bytes()


def test_a_codebook_is_made_under_a_default_device():
    with torch.device("meta"):
        assert askew.Codebook([-1, 0.5, 2]).levels == (-1.0, 0.5, 2.0)
        assert askew.Quantizer("binary", scale=[[0.5], [2.0]], granularity="channel").scale == ((0.5,), (2.0,))
