"""Mixed precision: GradScaler's scale is divided out in the step, and a step with an infinity does not happen."""

import copy

import pytest
import torch
from torch import nn

import askew_cuda as askew

RULES = {
    "sgd": (askew.AskewSGD, {"lr": 0.1}),
    "momentum": (askew.AskewSGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "dampening": (askew.AskewSGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "amsgrad": (askew.AskewAdamW, {"lr": 0.02, "amsgrad": True}),
}
rules = pytest.mark.parametrize("rule", RULES)
FUSED = {"fused": True}  # as with torch's optimizers, the scaler leaves unscaling to a fused step only
SCALE = 1024.0  # a power of two: dividing it out changes no bit


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    model[1].double()  # two dtypes in one group
    return model


def scaler_of(scale: float) -> torch.amp.GradScaler:
    """A GradScaler that has scaled a loss, without which it refuses a step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(1))
    return scaler


def made(rule: str, model: nn.Module, backend: str = "auto", **more):
    ours, keywords = RULES[rule]
    groups = askew.param_groups(
        model, {"1.weight": "ternary/channel", "0.weight": "2bit"}, pretrained=True, outputs=["codes"], verbose=False
    )
    optimizer = ours(groups, backend=backend, **{**keywords, **({} if backend == "reference" else FUSED), **more})
    optimizer._step_supports_amp_scaling = True  # on the reference, too, which refuses fused=True
    return optimizer


def fill(model: nn.Module, k: int, factor: float, bad: float | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(k)
    for weight in model.parameters():
        weight.grad = (torch.randn(weight.shape, generator=generator) * factor).to(weight.dtype)
    if bad is not None:
        model[2].bias.grad[1] = bad
    return [weight.grad.clone() for weight in model.parameters()]


def everything(model: nn.Module, optimizer) -> str:
    torch.set_printoptions(threshold=10_000, precision=20)
    try:
        outputs = [each for weight in model.parameters() for each in optimizer.outputs.get(weight, {}).items()]
        return str((model.state_dict(), optimizer.state_dict(), outputs))
    finally:
        torch.set_printoptions(profile="default")


@rules
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_scale_is_divided_out_and_gradients_are_left_alone(rule, backend):
    plain, scaled = network(), network()
    first, second = made(rule, plain, backend), made(rule, scaled, backend)
    scaler = scaler_of(SCALE)
    for k in range(3):
        fill(plain, k, 1.0)
        given = fill(scaled, k, SCALE)
        first.step()
        scaler.step(second)
        scaler.update()
        for weight, grad in zip(scaled.parameters(), given, strict=True):
            assert torch.equal(weight.grad, grad)
    assert everything(plain, first) == everything(scaled, second)
    assert not {"grad_scale", "found_inf"} & set(vars(second))  # torch took them back


@rules
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("when", [0, 2])
def test_an_overflow_leaves_everything_as_it_is(rule, backend, bad, when):
    """In all groups and dtypes, wherever the infinity is: weights, moments, step counters, codes, scales. The first
    step as well: torch's fused SGD starts from uninitialised momentum then, and with dampening the next step must still
    count as the first.
    """
    plain, scaled = network(), network()
    first, second = made(rule, plain, backend), made(rule, scaled, backend)
    scaler = scaler_of(2 * SCALE)
    for k in range(4):
        if k == when:
            before = everything(scaled, second)
            fill(scaled, 77, 2 * SCALE, bad)
            scaler.step(second)
            scaler.update()
            assert everything(scaled, second) == before
            assert scaler.get_scale() == SCALE  # backed off
        fill(plain, k, 1.0), fill(scaled, k, scaler.get_scale())
        first.step()
        scaler.step(second)
        scaler.update()
    assert everything(plain, first) == everything(scaled, second)


@rules
@pytest.mark.parametrize("overflow", [False, True])
def test_explicit_unscaling_and_clipping(rule, overflow):
    """Lightning's recipe: unscale_, clip, step. The scale is not divided out twice."""
    plain, scaled = network(), network()
    first, second = made(rule, plain), made(rule, scaled)
    scaler = scaler_of(SCALE)
    for k in range(3):
        skip = overflow and k == 1
        fill(scaled, k, scaler.get_scale(), float("inf") if skip else None)
        before = everything(scaled, second)
        scaler.unscale_(second)
        torch.nn.utils.clip_grad_norm_(scaled.parameters(), 0.5)
        scaler.step(second)
        scaler.update()
        if skip:
            assert everything(scaled, second) == before
            continue
        fill(plain, k, 1.0)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        first.step()
    assert everything(plain, first) == everything(scaled, second)


@rules
def test_a_whole_training_step_under_autocast(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    ours, keywords = RULES[rule]
    optimizer = ours(askew.param_groups(model, {"*": "4bit"}, verbose=False), **keywords)
    scaler, losses = torch.amp.GradScaler("cpu"), []
    data, wanted = torch.randn(32, 4), torch.randn(32, 2)
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.mse_loss(model(data).float(), wanted)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@rules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights(rule, dtype):
    ours, keywords = RULES[rule]
    results = []
    for scale in (None, SCALE):
        weight = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4).to(dtype))
        optimizer = ours([weight], quantizer="4bit", pretrained=True, state_dtype=torch.float32, **keywords, **FUSED)
        for k in range(3):
            weight.grad = (torch.linspace(1, -1, 12).reshape(3, 4) * (scale or 1) * (k + 1)).to(dtype)
            optimizer.step() if scale is None else scaler_of(SCALE).step(optimizer)
        results.append((weight.tolist(), str(optimizer.state_dict()["state"])))
    assert results[0] == results[1]


def test_two_optimizers_share_a_scaler_and_one_overflows():
    models = [network(), network()]
    optimizers = [made("momentum", model) for model in models]
    scaler = scaler_of(SCALE)
    fill(models[0], 0, SCALE, float("inf")), fill(models[1], 0, SCALE)
    before = [everything(*each) for each in zip(models, optimizers, strict=True)]
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert everything(models[0], optimizers[0]) == before[0]
    assert everything(models[1], optimizers[1]) != before[1]


def test_a_scaler_over_weights_without_gradients():
    """torch's sum over no device is the number 0."""
    model = network()
    optimizer = made("momentum", model)
    before = everything(model, optimizer)
    scaler_of(SCALE).step(optimizer)
    assert everything(model, optimizer) == before


@rules
@pytest.mark.parametrize("fused", [None, False, True])
def test_the_scaler_sees_what_torch_lets_it_see(rule, fused):
    """A flag, with fused=True only: what clips gradients (Lightning) refuses optimizers that unscale in their step."""
    ours, keywords = RULES[rule]
    optimizer = ours(network().parameters(), **keywords, fused=fused)
    theirs = torch.optim.SGD(network().parameters(), lr=0.1, fused=fused)
    for each in (optimizer, copy.deepcopy(optimizer)):
        assert bool(getattr(each, "_step_supports_amp_scaling", False)) is (fused is True)
    assert bool(getattr(theirs, "_step_supports_amp_scaling", False)) is (fused is True)


@rules
@pytest.mark.parametrize("fused", [None, False, True])
def test_lightning_clips_and_steps_where_the_scaler_unscales(rule, fused):
    """Its MixedPrecision plugin: unscale, refuse to clip where the optimizer would unscale by itself, clip, step."""

    def lightning_step(model, optimizer, scaler) -> None:
        scaler.unscale_(optimizer)
        if getattr(optimizer, "_step_supports_amp_scaling", False):  # as in its clip_gradients
            raise RuntimeError("The current optimizer does not allow for gradient clipping")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()

    ours, keywords = RULES[rule]
    models = [network(), network()]
    plain, scaled = (
        ours(each.parameters(), quantizer="4bit", pretrained=True, fused=fused, **keywords) for each in models
    )
    scaler = scaler_of(SCALE)
    fill(models[1], 0, SCALE)
    if fused:
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            lightning_step(models[1], scaled, scaler)
        return
    lightning_step(models[1], scaled, scaler)
    fill(models[0], 0, 1.0)
    torch.nn.utils.clip_grad_norm_(models[0].parameters(), 0.5)
    plain.step()
    assert everything(models[0], plain) == everything(models[1], scaled)


@rules
def test_without_fused_the_scaler_unscales_and_skips(rule):
    ours, keywords = RULES[rule]
    plain, scaled = network(), network()
    first, second = (ours(each.parameters(), quantizer="4bit", pretrained=True, **keywords) for each in (plain, scaled))
    scaler = scaler_of(SCALE)
    fill(scaled, 7, SCALE, float("inf"))
    before = everything(scaled, second)
    scaler.step(second)
    assert everything(scaled, second) == before
    scaler.update()
    fill(plain, 0, 1.0), fill(scaled, 0, scaler.get_scale())
    first.step(), scaler.step(second)
    assert everything(plain, first) == everything(scaled, second)


def test_a_disabled_scaler_changes_nothing():
    plain, scaled = network(), network()
    first, second = made("momentum", plain), made("momentum", scaled)
    fill(plain, 0, 1.0), fill(scaled, 0, 1.0)
    first.step()
    torch.amp.GradScaler("cpu", enabled=False).step(second)
    assert everything(plain, first) == everything(scaled, second)


def test_a_step_that_fails_leaves_no_scale_behind():
    """torch takes grad_scale back after a step that succeeds; left there, the next step would divide by it once
    more.
    """
    model = network()
    optimizer = made("momentum", model)
    fill(model, 0, SCALE)
    with optimizer.quantized(), pytest.raises(RuntimeError, match="inside quantized"):
        scaler_of(SCALE).step(optimizer)
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))


@rules
def test_found_inf_on_a_device_is_read_only_where_the_host_must_know(rule, monkeypatch):
    """The operator looks at it there. The host must know only whether a momentum buffer came to be (dampening)."""
    model = network()
    optimizer, asked = made(rule, model), []
    own = askew.AskewSGD._overflowed

    def overflowed(self, wait=False):
        asked.append(wait)
        return own(self, wait) if wait else False  # as if it lay on a device

    monkeypatch.setattr(type(optimizer), "_overflowed", overflowed)
    before = copy.deepcopy(model.state_dict())
    fill(model, 0, 1.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert any(asked) == (rule == "dampening")
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    for weight in model.parameters():
        assert "momentum_buffer" not in optimizer.state[weight] or not optimizer.state[weight]["momentum_buffer"].any()
        assert rule != "dampening" or "momentum_buffer" not in optimizer.state[weight]
    asked.clear()
    del optimizer.grad_scale, optimizer.found_inf
    plain = network()
    first = made(rule, plain)
    fill(plain, 1, 1.0), fill(model, 1, 1.0)
    first.step(), optimizer.step()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
