"""The monitor: what it counts, and that it changes nothing."""

import math

import pytest
import torch
from torch import nn

import askew_cuda as askew


def by_hand(values: list[float], grad: float = 0.0) -> tuple[nn.Parameter, askew.AskewSGD]:
    weight = nn.Parameter(torch.tensor(values))
    weight.grad = torch.full_like(weight, grad)
    return weight, askew.AskewSGD([("w", weight)], lr=0.1, quantizer=askew.Quantizer("ternary", scale=1.0), clip=False)


def train(watched: bool) -> tuple[list[torch.Tensor], askew.Monitor | None]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    optimizer = askew.AskewSGD(askew.param_groups(model, {"*": "2bit/channel"}, verbose=False), lr=0.1, momentum=0.9)
    anneal = askew.Anneal(optimizer, total_steps=60)
    watch = askew.monitor(optimizer, every=5) if watched else None
    x, y = torch.randn(32, 8), torch.randn(32, 8)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        anneal.step()
    return [weight.detach() for weight in model.parameters()], watch


def test_training_is_the_same_with_and_without_it():
    alone, _ = train(False)
    watched, watch = train(True)
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))
    assert [step for step, _ in watch.history] == list(range(5, 65, 5))
    assert set(watch.history[-1][1]) == {"0.weight", "2.weight", "all"}
    shares = [found["all"].share_on_level for _, found in watch.history]
    assert shares[0] < 0.5 < shares[-1]


def test_a_sample_by_hand():
    weight, optimizer = by_hand([1.0, 0.25, -1.5, 0.0])
    watch = askew.monitor(optimizer, every=1)
    first = watch.sample()["w"]
    assert first.share_on_level == 0.5
    assert first.max_distance == 1.0  # -1.5 is half a level below the lowest, where half the distance is 0.5
    assert first.flips is None
    assert first.occupancy == (0.25, 0.5, 0.25)
    assert first.error == pytest.approx(math.sqrt((0.25**2 + 0.5**2) / (1 + 0.25**2 + 1.5**2)))
    with torch.no_grad():
        weight[0] = -1.0
    assert watch.sample()["w"].flips == 0.25
    assert watch.sample()["all"].flips == 0.0


def test_flips_count_from_sample_to_sample_in_all_tensors():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(size)) for size in (10, 30)]
    optimizer = askew.AskewSGD(weights, lr=0.1, quantizer="binary", pretrained=True)
    watch = askew.monitor(optimizer)
    watch.sample()
    with torch.no_grad():
        weights[1].neg_()
    assert watch.sample()["all"].flips == 30 / 40


def test_bad_numbers_are_counted_and_do_not_hide_the_rest():
    weight, optimizer = by_hand([1.0, 0.25, math.nan, 0.0])
    weight.grad[:2] = torch.tensor([math.inf, math.nan])
    watch = askew.monitor(optimizer)
    found = watch.sample()["w"]
    assert (found.non_finite_grads, found.nan_weights) == (2, 1)
    assert found.max_distance == 0.5
    assert math.isfinite(found.error)
    assert watch.postfix()["nan"] == "1"
    assert watch.postfix()["bad grads"] == "2"


def test_log_and_postfix_are_plain():
    _, optimizer = by_hand([1.0, 0.25, -1.5, 0.0])
    watch = askew.monitor(optimizer)
    assert watch.log() == {}
    assert watch.postfix() == {}
    watch.sample()
    log = watch.log(prefix="run")
    assert log["run/w/occupancy/1"] == 0.5
    assert log["run/all/share_on_level"] == 0.5
    assert "run/w/flips" not in log
    assert all(isinstance(value, (int, float)) for value in log.values())
    assert watch.postfix() == {"on level": "50.0%", "flips": "-"}


def test_it_can_be_closed():
    _, optimizer = by_hand([1.0])
    watch = askew.monitor(optimizer, every=1)
    optimizer.step()
    watch.close()
    optimizer.step()
    assert len(watch.history) == 1


@pytest.mark.parametrize("quantizers", [("ternary",), ("ternary", "4bit"), ()])
def test_the_picture_is_drawn(tmp_path, quantizers):
    groups = [
        {"params": [(f"w{i}", nn.Parameter(torch.randn(8, 8)))], "quantizer": each} for i, each in enumerate(quantizers)
    ]
    optimizer = askew.AskewSGD([*groups, {"params": [("bias", nn.Parameter(torch.zeros(3)))]}], pretrained=True)
    watch = askew.monitor(optimizer)
    with pytest.raises(ValueError, match="no sample yet"):
        watch.picture(tmp_path / "none.png")
    watch.sample()
    watch.sample()
    figure = watch.picture(tmp_path / "watch.png")
    assert figure._repr_png_().startswith(b"\x89PNG")  # a notebook shows it
    assert [axes.get_title() for axes in watch.picture().axes] == [axes.get_title() for axes in figure.axes]
    assert (tmp_path / "watch.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "error"), [({"every": 0}, ValueError), ({"every": True}, ValueError), ({"every": 1.5}, ValueError)]
)
def test_wrong_arguments(arguments, error):
    with pytest.raises(error, match="every ="):
        askew.monitor(by_hand([1.0])[1], **arguments)


def test_only_our_optimizers():
    with pytest.raises(TypeError, match="optimizer is a SGD"):
        askew.monitor(torch.optim.SGD([nn.Parameter(torch.zeros(2))]))


def test_without_a_period_samples_are_taken_when_asked_for():
    (weight,) = weights = [torch.nn.Parameter(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))]
    optimizer = askew.AskewSGD(weights, lr=0.1, quantizer="ternary", pretrained=True)
    watch = askew.monitor(optimizer, every=None)
    for _ in range(3):
        weight.grad = torch.ones(8, 4)
        optimizer.step()
    assert watch.history == []
    watch.sample()
    assert [step for step, _ in watch.history] == [3]
