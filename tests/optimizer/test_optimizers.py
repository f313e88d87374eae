"""AskewSGD and AskewAdamW as optimizers: torch's arithmetic without a quantizer, torch's manners with one."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import askew_cuda as askew

# Ten steps on numbers around 1, against float64 truth: a rounding of 2^-24 (2^-53) per operation, some ten of them per
# step; in 16-bit storage the weight is rounded once per step, 2^-9 (2^-12) of its value each.
BOUND = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 10 * 2**-8, torch.float16: 10 * 2**-11}

RULES = {
    "sgd": (askew.AskewSGD, torch.optim.SGD, {"lr": 0.1}),
    "momentum": (askew.AskewSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "dampening": (
        askew.AskewSGD,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    ),
    "nesterov": (askew.AskewSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "adamw": (askew.AskewAdamW, torch.optim.AdamW, {"lr": 0.03}),
    "amsgrad": (
        askew.AskewAdamW,
        torch.optim.AdamW,
        {"lr": 0.03, "amsgrad": True, "betas": (0.8, 0.9), "weight_decay": 0.1},
    ),
    "maximize": (askew.AskewAdamW, torch.optim.AdamW, {"lr": 0.03, "maximize": True, "eps": 1e-4}),
}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Some weights with gradients, the same ones at each call; 37 is no multiple of any vector width."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in ((37,), (4, 33), (2, 3, 5, 7)):
        made.append(nn.Parameter((torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5).to(dtype)))
        made[-1].grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return made


def walk(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], steps: int = 10) -> None:
    """Steps with gradients that change from step to step."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for weight in weights:
            weight.grad = (
                torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(torch.float16).to(weight.dtype)
            )
        optimizer.step()


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_unquantized_group_does_what_torch_does(rule, dtype, backend):
    ours, torchs, keywords = RULES[rule]
    weights = parameters(dtype)
    truth = [nn.Parameter(weight.detach().double()) for weight in weights]
    state_dtype = torch.float32 if dtype.itemsize == 2 else None
    walk(ours(weights, backend=backend, state_dtype=state_dtype, **keywords), weights)
    walk(torchs(truth, foreach=False, **keywords), truth)
    for weight, wanted in zip(weights, truth, strict=True):
        error = (weight.double() - wanted).abs().max().item()
        assert not error > BOUND[dtype] * max(1.0, wanted.abs().max().item()), f"{error:.3g}"


def test_torch_is_the_oracle_of_momentum_to_the_last_bit_in_float64():
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    walk(askew.AskewSGD(ours, lr=0.5, momentum=0.5), ours)  # powers of two: no rounding differs
    walk(torch.optim.SGD(theirs, lr=0.5, momentum=0.5, foreach=False), theirs)
    for weight, wanted in zip(ours, theirs, strict=True):
        assert torch.equal(weight, wanted)


@pytest.mark.parametrize("rule", RULES)
def test_state_has_torchs_names_dtypes_and_shapes(rule):
    ours, torchs, keywords = RULES[rule]
    mine, theirs = parameters(torch.bfloat16), parameters(torch.bfloat16)
    a, b = ours(mine, **keywords), torchs(theirs, foreach=False, **keywords)
    a.step(), b.step()
    for weight, other in zip(mine, theirs, strict=True):
        kinds = [
            {k: (v.dtype, v.shape) for k, v in o.state[w].items() if torch.is_tensor(v)}
            for o, w in ((a, weight), (b, other))
        ]
        assert kinds[0] == kinds[1]
    assert set(b.param_groups[0]) <= set(a.param_groups[0]) | {"decoupled_weight_decay"}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("quantizer", [None, "ternary/channel"])
def test_gradients_are_read_only(rule, quantizer):
    ours, _, keywords = RULES[rule]
    weights = parameters()
    before = [weight.grad.clone() for weight in weights]
    optimizer = ours(weights, quantizer=quantizer, pretrained=True, **keywords)
    optimizer.step()
    for weight, grad in zip(weights, before, strict=True):
        assert torch.equal(weight.grad, grad)


def test_a_step_before_a_backward_pass_through_the_old_graph_is_an_error():
    layer = nn.Linear(4, 4)
    loss = layer(layer(torch.ones(1, 4))).sum()
    loss.backward(retain_graph=True)
    askew.AskewSGD(layer.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_none_gradients_and_frozen_weights_are_left_alone():
    weights = parameters()
    weights[1].grad = None
    weights[2].requires_grad_(False)
    weights[2].grad = None
    before = [weight.detach().clone() for weight in weights]
    optimizer = askew.AskewSGD(weights, lr=0.1, quantizer="ternary", pretrained=True)
    optimizer.step()
    assert not torch.equal(weights[0], before[0])
    assert torch.equal(weights[1], before[1])
    assert torch.equal(weights[2], before[2])
    assert "scale" in optimizer.state[weights[0]]
    assert "scale" not in optimizer.state[weights[1]]


def test_a_weight_whose_first_gradient_comes_late_gets_its_undamped_first_step():
    weights = parameters()[:2]
    late = weights[1].grad
    weights[1].grad = None
    optimizer = askew.AskewSGD(weights, lr=0.1, momentum=0.9, dampening=0.5)
    optimizer.step()
    weights[1].grad = late
    optimizer.step()
    assert torch.equal(optimizer.state[weights[1]]["momentum_buffer"], late)
    first = weights[0].grad
    torch.testing.assert_close(optimizer.state[weights[0]]["momentum_buffer"], 0.9 * first + 0.5 * first)


def test_closure_sees_the_trained_weights_and_its_loss_is_returned():
    layer = nn.Linear(3, 2)
    optimizer = askew.AskewSGD(layer.parameters(), lr=0.1, quantizer="binary", pretrained=True)
    trained = layer.weight.detach().clone()

    def closure():
        assert torch.equal(layer.weight, trained)
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0


def test_schedulers_and_groups_with_their_own_keywords():
    weights = parameters()
    optimizer = askew.AskewSGD([{"params": weights[:1], "lr": 0.5}, {"params": weights[1:]}], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=5)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["momentum"] != 0.9  # cycled by the scheduler
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "quantizer": "binary", "recovery": 0.25})
    assert optimizer.param_groups[2]["quantizer"] == "binary"
    assert optimizer.param_groups[2]["recovery"] == 0.25


def test_lr_and_epsilon_may_be_tensors():
    first, second = parameters(), parameters()
    a = askew.AskewSGD(first, lr=torch.tensor(0.25), epsilon=torch.tensor(0.5), quantizer="2bit", pretrained=True)
    b = askew.AskewSGD(second, lr=0.25, epsilon=0.5, quantizer="2bit", pretrained=True)
    a.step(), b.step()
    for weight, wanted in zip(first, second, strict=True):
        assert torch.equal(weight, wanted)


def test_lr_zero_moves_nothing_not_even_into_the_box():
    weights = parameters()
    before = [weight.detach().clone() for weight in weights]
    optimizer = askew.AskewSGD(
        weights, lr=0.0, momentum=0.9, quantizer=askew.Quantizer("binary", scale=0.01), pretrained=True, epsilon=0.0
    )
    optimizer.step()
    for weight, wanted in zip(weights, before, strict=True):
        assert torch.equal(weight, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_outputs_are_what_quantized_parameters_gives(dtype):
    weights = parameters(dtype)
    optimizer = askew.AskewSGD(
        weights,
        lr=0.1,
        momentum=0.9,
        quantizer="nf4/channel",
        pretrained=True,
        epsilon=0.3,
        outputs=("codes", "snapped"),
    )
    for _ in range(3):  # from the first step on
        walk(optimizer, weights, 1)
        seen = 0
        for weight, codes, levels, scale in optimizer.quantized_parameters():
            outputs = optimizer.outputs[weight]
            assert torch.equal(outputs["codes"], codes)
            assert torch.equal(outputs["snapped"], (scale * levels[codes.long()]).to(dtype))
            seen += 1
        assert seen == len(weights)


def test_state_dtype_keeps_float32_state_for_16_bit_weights():
    weights = parameters(torch.bfloat16)
    optimizer = askew.AskewSGD(weights, lr=0.1, momentum=0.9, state_dtype=torch.float32)
    optimizer.step()
    assert all(state["momentum_buffer"].dtype == torch.float32 for state in optimizer.state.values())
    copy_of = askew.AskewSGD(parameters(torch.bfloat16), lr=0.1, momentum=0.9, state_dtype=torch.float32)
    copy_of.load_state_dict(optimizer.state_dict())
    assert all(state["momentum_buffer"].dtype == torch.float32 for state in copy_of.state.values())


@pytest.mark.parametrize("how", ["state_dict", "file", "pickle", "deepcopy"])
@pytest.mark.parametrize("rule", ["momentum", "dampening", "amsgrad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_training_goes_on_bit_for_bit_from_a_checkpoint(rule, dtype, how):
    ours, _, keywords = RULES[rule]
    keywords = keywords | {"quantizer": "ternary/channel", "pretrained": True, "epsilon": 0.6}
    straight = parameters(dtype)
    optimizer = ours(straight, **keywords)
    walk(optimizer, straight, 3)
    if how in ("pickle", "deepcopy"):
        resumed_optimizer = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        resumed = [weight for group in resumed_optimizer.param_groups for weight in group["params"]]
    else:
        saved = copy.deepcopy(optimizer.state_dict())  # torch's state_dict shares its tensors
        if how == "file":
            buffer = io.BytesIO()
            torch.save(saved, buffer)
            buffer.seek(0)
            saved = torch.load(buffer, weights_only=True)
        resumed = [nn.Parameter(weight.detach().clone()) for weight in straight]
        resumed_optimizer = ours(resumed, **{**keywords, "epsilon": 1.0})
        resumed_optimizer.load_state_dict(saved)
    for weight, other in zip(straight, resumed, strict=True):
        ours_scale, theirs = optimizer.state[weight]["scale"], resumed_optimizer.state[other]["scale"]
        assert ours_scale.dtype == theirs.dtype
        assert torch.equal(ours_scale, theirs)
    walk(optimizer, straight, 3)
    walk(resumed_optimizer, resumed, 3)
    for weight, other in zip(straight, resumed, strict=True):
        assert torch.equal(weight, other)


@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_checkpoints_go_to_torch_and_back(rule):
    ours, torchs, keywords = RULES[rule]
    floats, quantized = parameters(), parameters()
    theirs = torchs(floats, **keywords)
    walk(theirs, floats, 2)
    mine = ours(quantized, quantizer="4bit", pretrained=True, backend="reference", **keywords)
    mine.step()
    mine.load_state_dict(theirs.state_dict())
    group = mine.param_groups[0]
    assert (group["quantizer"], group["backend"], group["pretrained"]) == ("4bit", "reference", True)
    assert "scale" not in mine.state[quantized[0]]  # set again, from the weights that the checkpoint goes with
    walk(mine, quantized, 1)
    assert "scale" in mine.state[quantized[0]]
    back = torchs(parameters(), **keywords)
    back.load_state_dict(mine.state_dict())
    back.step()


def test_a_checkpoint_of_an_old_torch_may_hold_a_momentum_buffer_that_is_none():
    weights = parameters()
    optimizer = askew.AskewSGD(weights, lr=0.1, momentum=0.9)
    saved = optimizer.state_dict()
    saved["state"] = {index: {"momentum_buffer": None} for index in range(len(weights))}
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert torch.equal(optimizer.state[weights[0]]["momentum_buffer"], weights[0].grad)


def test_repr_names_the_backend_that_runs():
    text = repr(askew.AskewSGD(parameters(torch.float16), lr=0.1))
    assert "backend: auto" in text
    assert "runs on: cpu for torch.float16 on cpu" in text


def test_repr_does_not_spell_out_scales():
    weight = nn.Parameter(torch.ones(64, 64))
    text = repr(
        askew.AskewSGD([weight], quantizer=askew.Quantizer("nf4", scale=torch.ones(64, 1), granularity="channel"))
    )
    assert "quantizer: nf4, scale per channel: given, one by one" in text
    assert len(text) < 1500


def test_mixed_dtypes_in_one_group():
    weights = parameters() + parameters(torch.bfloat16) + parameters(torch.float64)
    before = [weight.detach().clone() for weight in weights]
    askew.AskewSGD(weights, lr=0.1, momentum=0.9, quantizer="2bit", pretrained=True).step()
    assert all(not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


def test_a_fresh_he_initialised_network_is_warned_about_and_a_default_one_is_not():
    he = nn.Linear(64, 64)
    nn.init.kaiming_normal_(he.weight)
    he.weight.grad = torch.zeros_like(he.weight)
    with pytest.warns(UserWarning, match=r"0\.weight.*pretrained=True.*clip=False"):
        askew.AskewSGD([("0.weight", he.weight)], lr=0.1, quantizer="binary").step()
    plain = nn.Linear(256, 256)
    plain.weight.grad = torch.zeros_like(plain.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        askew.AskewSGD([plain.weight], lr=0.1, quantizer="binary").step()
