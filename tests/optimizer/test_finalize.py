"""From trained to quantized: quantized(), finalize(), quantized_parameters(), prepare()."""

import math

import pytest
import torch
from torch import nn

import askew_cuda as askew


def trained(epsilon: float = 0.0, **keywords) -> tuple[nn.Module, askew.AskewSGD]:
    """A small network after a few steps; its second layer never receives a gradient."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(8, 6), "unused": nn.Linear(6, 6)})
    groups = askew.param_groups(model, {"*": "2bit/channel"}, verbose=False, pretrained=True)
    optimizer = askew.AskewSGD(groups, lr=0.05, momentum=0.9, epsilon=epsilon, **keywords)
    for _ in range(3):
        optimizer.zero_grad()
        model["used"](torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def values(model: nn.Module) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def same(model: nn.Module, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(weight, old) for weight, old in zip(model.parameters(), before, strict=True))


def test_quantized_snaps_inside_and_restores_outside():
    model, optimizer = trained(epsilon=1.0)
    before = values(model)
    with optimizer.quantized():
        for weight, codes, levels, scale in optimizer.quantized_parameters():
            assert torch.equal(weight, scale * levels[codes.long()])
        assert not same(model, before)
        with optimizer.quantized():
            assert not same(model, before)
        assert not same(model, before)
    assert same(model, before)


def test_quantized_restores_after_an_exception():
    model, optimizer = trained(epsilon=1.0)
    before = values(model)
    with pytest.raises(KeyError), optimizer.quantized():
        raise KeyError
    assert same(model, before)
    optimizer.step()  # and lets steps through again


def test_quantized_restores_what_it_snapped_when_a_later_tensor_fails(monkeypatch):
    model, optimizer = trained(epsilon=1.0)
    before = values(model)
    snapped = []

    def failing(*arguments):
        snapped.append(arguments)
        if len(snapped) == 2:
            raise MemoryError
        snap_(*arguments)

    from askew_cuda import optimizer as module
    from askew_cuda.look import snap_

    monkeypatch.setattr(module, "snap_", failing)
    with pytest.raises(MemoryError), optimizer.quantized():
        pass
    assert len(snapped) == 2
    assert same(model, before)


def test_inside_quantized_a_step_is_refused_and_a_checkpoint_is_the_same():
    _model, optimizer = trained(epsilon=1.0)
    outside = optimizer.state_dict()
    with optimizer.quantized():
        with pytest.raises(RuntimeError, match=r"step\(\) inside quantized\(\)"):
            optimizer.step()
        with pytest.raises(RuntimeError, match=r"finalize\(\) inside quantized\(\)"):
            optimizer.finalize()
        inside = optimizer.state_dict()
    assert inside["param_groups"] == outside["param_groups"]
    for index, state in outside["state"].items():
        assert all(torch.equal(value, inside["state"][index][key]) for key, value in state.items())


def test_finalize_reports_and_snaps_for_good():
    _model, optimizer = trained()
    wanted = [(scale * levels[codes.long()]) for _, codes, levels, scale in optimizer.quantized_parameters()]
    with pytest.warns(UserWarning, match="most in unused.weight"):
        report = optimizer.finalize()
    for (weight, *_), snapped in zip(optimizer.quantized_parameters(), wanted, strict=True):
        assert torch.equal(weight, snapped)
    assert report.never_stepped == ("unused.weight",)
    assert [each.name for each in report.tensors] == ["used.weight", "unused.weight"]
    assert [each.numel for each in report.tensors] == [48, 36]
    assert report.max_distance == max(each.max_distance for each in report.tensors)
    assert math.isclose(report.share_on_level, sum(each.share_on_level * each.numel for each in report.tensors) / 84)
    again = optimizer.finalize()
    assert (again.max_distance, again.share_on_level) == (0.0, 1.0)


def test_finalize_by_hand():
    weight = nn.Parameter(torch.tensor([1.0, -1.0, 0.5, 3.0]))
    optimizer = askew.AskewSGD([("w", weight)], lr=0.1, quantizer=askew.Quantizer("binary", scale=1.0), epsilon=0.0)
    with pytest.warns(
        UserWarning, match=r"50.0% of the weights .* by up to 2 of half .* most in w \(50.0%, by up to 2\)"
    ):
        report = optimizer.finalize()
    assert torch.equal(weight, torch.tensor([1.0, -1.0, 1.0, 1.0]))
    assert (report.max_distance, report.share_on_level, report.never_stepped) == (2.0, 0.5, ("w",))


def test_finalize_before_the_annealing_has_ended_warns_with_the_distance():
    _, optimizer = trained(epsilon=0.5)
    with pytest.warns(UserWarning, match=r"epsilon is still 0\.5.*will move, by up to"):
        optimizer.finalize()


def test_nan_stays_nan_where_weights_are_on_their_levels():
    """A network that has diverged does not evaluate as a sound one."""
    model, optimizer = trained(epsilon=1.0)
    with torch.no_grad():
        model["used"].weight[0, 0] = math.nan
    with optimizer.quantized():
        assert model["used"].weight[0, 0].isnan()
        assert model["used"].weight.isnan().sum() == 1
        assert model["used"](torch.ones(8))[0].isnan()
    assert model["used"].weight[0, 0].isnan()


def test_finalize_refuses_nan_before_it_snaps_anything():
    model, optimizer = trained()
    with torch.no_grad():
        model["unused"].weight[0, 0] = math.nan
    before = values(model)
    with pytest.raises(ValueError, match=r"unused\.weight holds 1 NaN"):
        optimizer.finalize()
    assert torch.equal(model["used"].weight, before[0])


def test_scales_are_set_once_by_prepare_or_the_first_step_and_not_by_looking():
    model, _ = trained()
    optimizer = askew.AskewSGD(model.parameters(), lr=0.1, quantizer="ternary", pretrained=True)
    with optimizer.quantized():
        pass
    looked_at = [scale for *_, scale in optimizer.quantized_parameters()]
    assert not any("scale" in state for state in optimizer.state.values())
    optimizer.prepare()
    scales = [optimizer.state[weight]["scale"] for weight in model.parameters()]
    assert all(torch.equal(scale, looked) for scale, looked in zip(scales, looked_at, strict=True))
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    before = [scale.clone() for scale in scales]
    for _ in range(3):
        optimizer.step()
        optimizer.prepare()
    assert all(
        torch.equal(optimizer.state[weight]["scale"], scale)
        for weight, scale in zip(model.parameters(), before, strict=True)
    )


@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 3)])
def test_small_and_empty_weights_go_all_the_way(shape):
    weight = nn.Parameter(torch.full(shape, 0.7))
    weight.grad = torch.ones(shape)
    optimizer = askew.AskewAdamW(
        [weight], lr=0.1, quantizer="2bit/channel", pretrained=True, epsilon=0.0, outputs=["codes"]
    )
    optimizer.step()
    with optimizer.quantized():
        pass
    report = optimizer.finalize()
    assert report.tensors[0].numel == weight.numel()
    assert optimizer.outputs[weight]["codes"].shape == torch.Size(shape)


@pytest.mark.parametrize(
    "quantizer", ["binary", "ternary/channel", "2bit/group4", "4bit", "nf4/channel", "int8", "pow2/group16"]
)
@pytest.mark.parametrize("anneal", ["capture", "interval"])
def test_a_whole_training_ends_on_the_levels(quantizer, anneal):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    groups = askew.param_groups(model, {"*": quantizer}, verbose=False, anneal=anneal)
    optimizer = askew.AskewSGD(groups, lr=0.2, momentum=0.9)
    steps = askew.Anneal(optimizer, total_steps=400)
    x, y = torch.randn(64, 16), torch.randn(64, 16)
    for _ in range(400):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        steps.step()
    report = optimizer.finalize()
    assert report.never_stepped == ()
    if anneal == "capture":
        assert (report.share_on_level, report.max_distance) == (1.0, 0.0)
    else:  # the pull halves what is left in every step, and clips at the ends: a few units in the last place remain
        assert report.max_distance < 0.01
