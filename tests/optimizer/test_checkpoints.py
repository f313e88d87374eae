"""Checkpoints: to and from torch's optimizers, between backends, at any step; by name, by position, or not at all."""

import copy
import io
import json

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import askew_cuda as askew

RULES = {
    "momentum": (
        askew.AskewSGD,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.01},
        ("momentum_buffer",),
    ),
    "amsgrad": (
        askew.AskewAdamW,
        torch.optim.AdamW,
        {"lr": 0.02, "amsgrad": True},
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"),
    ),
}
rules = pytest.mark.parametrize("rule", RULES)
QUANTIZERS = [
    "ternary/channel",
    "4bit/group2",
    "nf4",
    askew.Quantizer([-2, 0, 1], scale=torch.full((4, 1), 0.25), granularity="channel"),
]


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).to(dtype)


def grads(model: nn.Module, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)


def walk(model: nn.Module, optimizer, steps: range, *after) -> None:
    for k in steps:
        grads(model, k)
        optimizer.step()
        for each in after:
            each.step()


def through_a_file(*objects):
    """As torch.load(weights_only=True) gives them back."""
    file = io.BytesIO()
    torch.save(objects, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def state_by_name(model: nn.Module, optimizer) -> dict:
    return {name: optimizer.state[weight] for name, weight in model.named_parameters()}


def same_bits(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@rules
def test_quantized_training_starts_from_the_checkpoint_of_a_float_run(rule):
    """One group there, two here, in another order: the names say which is which."""
    ours, torchs, keywords, keys = RULES[rule]
    model = network()
    theirs = torchs(model.named_parameters(), **keywords)
    walk(model, theirs, range(3))
    start = copy.deepcopy(model)
    groups = askew.param_groups(
        start, {"2.weight": "ternary/channel", "0.weight": "ternary/channel"}, pretrained=True, verbose=False
    )
    mine = ours(groups, lr=7.0, backend="reference")
    mine.load_state_dict(through_a_file(theirs.state_dict())[0])
    wanted, found = state_by_name(model, theirs), state_by_name(start, mine)
    for name, state in wanted.items():
        assert set(found[name]) == set(keys)
        for key in keys:
            assert torch.equal(found[name][key], state[key]), (name, key)
    for group, quantizer in zip(mine.param_groups, ("ternary/channel", None), strict=True):
        assert group["lr"] == keywords["lr"]
        assert (group["quantizer"], group["backend"]) == (quantizer, "reference")
    assert mine.param_groups[0]["pretrained"] is True
    assert mine.param_groups[1]["param_names"] == [
        name for name, _ in start.named_parameters() if name not in ("0.weight", "2.weight")
    ]
    walk(start, mine, range(3, 5))
    assert "scale" in state_by_name(start, mine)["0.weight"]


@rules
@pytest.mark.parametrize("fused", [None, True])
def test_torch_goes_on_from_our_checkpoint(rule, fused):
    ours, torchs, keywords, keys = RULES[rule]
    model = network(torch.float64)
    mine = ours(model.named_parameters(), quantizer="ternary", pretrained=True, **keywords)
    walk(model, mine, range(3))
    theirs = torchs(model.named_parameters(), lr=7.0, fused=fused)
    theirs.load_state_dict(through_a_file(mine.state_dict())[0])
    for name, state in state_by_name(model, mine).items():
        for key in keys:
            torch.testing.assert_close(
                state_by_name(model, theirs)[name][key], state[key], check_dtype=key != "step", rtol=0, atol=0
            )
    unquantized = copy.deepcopy(model)
    same = ours(unquantized.named_parameters(), **keywords)
    same.load_state_dict(mine.state_dict())
    same.param_groups[0].update(quantizer=None)
    walk(unquantized, same, range(3, 6)), walk(model, theirs, range(3, 6))
    for weight, wanted in zip(unquantized.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(weight, wanted, rtol=1e-12, atol=1e-12)


@rules
@pytest.mark.parametrize(
    "quantizer", QUANTIZERS, ids=lambda quantizer: quantizer if isinstance(quantizer, str) else "custom"
)
def test_param_groups_hold_plain_values(rule, quantizer):
    ours, _, keywords, _ = RULES[rule]
    model = network()
    groups = askew.param_groups(model, {"*": quantizer}, pretrained=True, verbose=False, outputs=("codes",))
    optimizer = ours(groups, state_dtype=torch.float32, **keywords)
    walk(model, optimizer, range(1))
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert (
        json.loads(json.dumps(saved["param_groups"]), parse_constant=float)[0]["quantizer"]
        == saved["param_groups"][0]["quantizer"]
    )
    (loaded,) = through_a_file(saved)
    again = ours(askew.param_groups(network(), {"*": quantizer}, verbose=False), lr=0.5)
    again.load_state_dict(loaded)
    assert str(again.state_dict()["state"]) == str(saved["state"])
    assert again.param_groups[0]["quantizer"] == saved["param_groups"][0]["quantizer"]


TOTAL = 12
# Cut after how many steps; the backends before and after; lr and epsilon as floats or as tensors.
CUTS = [(cut, "cpu", "cpu", cut % 2 == 1) for cut in range(TOTAL + 1)]
CUTS += [(cut, *backends, cut == 7) for cut in (1, 7) for backends in (("cpu", "reference"), ("reference", "cpu"))]


@rules
@pytest.mark.parametrize(("cut", "before", "after", "tensors"), CUTS)
def test_a_resumed_run_is_the_run_that_was_not_cut(rule, cut, before, after, tensors):
    """Before, in and after the annealing, with a schedule; from one backend to another. Bit for bit."""
    ours, _, keywords, _ = RULES[rule]

    def start(backend):
        model = network()
        groups = askew.param_groups(model, {"*": "2bit/channel"}, pretrained=True, verbose=False)
        numbers = {"lr": torch.tensor(keywords["lr"]), "epsilon": torch.tensor(1.0)} if tensors else {}
        optimizer = ours(groups, backend=backend, **{**keywords, **copy.deepcopy(numbers)})
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TOTAL)
        return model, optimizer, schedule, askew.Anneal(optimizer, TOTAL, hold=0.25, end=0.75)

    straight = start(before)
    walk(straight[0], straight[1], range(TOTAL), *straight[2:])
    first = start(before)
    walk(first[0], first[1], range(cut), *first[2:])
    saved = through_a_file(*(each.state_dict() for each in first))
    second = start(after)
    for each, state in zip((second[0], *second[2:], second[1]), (saved[0], *saved[2:], saved[1]), strict=True):
        each.load_state_dict(state)
    walk(second[0], second[1], range(cut, TOTAL), *second[2:])
    assert same_bits(second[0], straight[0])
    assert second[1].param_groups[0]["backend"] == after
    assert float(second[1].param_groups[0]["epsilon"]) == 0.0


@rules
def test_torchs_helpers_for_distributed_checkpoints(rule):
    """Without a process group here: they give state by full names, and groups without the names of their weights."""
    ours, _, keywords, _ = RULES[rule]
    models = [network(), network()]
    first, second = (
        ours(askew.param_groups(each, {"*": "2bit"}, pretrained=True, verbose=False), **keywords) for each in models
    )
    walk(models[0], first, range(3))
    models[1].load_state_dict(models[0].state_dict())
    set_optimizer_state_dict(models[1], second, get_optimizer_state_dict(models[0], first))
    for model, optimizer in zip(models, (first, second), strict=True):
        walk(model, optimizer, range(3, 6))
    assert same_bits(*models)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_scale_keeps_its_dtype_and_bits(dtype):
    model, other = network(dtype), network(dtype)
    optimizer = askew.AskewSGD(model.parameters(), lr=0.1, momentum=0.9, quantizer=askew.Quantizer("4bit", scale=0.1))
    walk(model, optimizer, range(2))
    loaded = askew.AskewSGD(other.parameters(), lr=0.1, momentum=0.9, quantizer="4bit")
    loaded.load_state_dict(optimizer.state_dict())
    for weight in other.parameters():
        state = loaded.state[weight]
        assert state["scale"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert state["scale"] == torch.tensor(0.1, dtype=state["scale"].dtype)
        assert state["momentum_buffer"].dtype == dtype


def test_a_checkpoint_moves_to_weights_of_another_dtype():
    wide, narrow = network(), network(torch.bfloat16)
    optimizer = askew.AskewAdamW(wide.parameters(), quantizer="4bit", pretrained=True)
    walk(wide, optimizer, range(2))
    for state_dtype, wanted in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        loaded = askew.AskewAdamW(narrow.parameters(), quantizer="4bit", state_dtype=state_dtype)
        saved = optimizer.state_dict()
        saved["param_groups"][0]["state_dtype"] = loaded.param_groups[0]["state_dtype"]
        loaded.load_state_dict(saved)
        state = loaded.state[narrow[0].weight]
        assert (state["exp_avg"].dtype, state["step"].dtype, state["scale"].dtype) == (
            wanted,
            torch.float32,
            torch.float32,
        )
        walk(narrow, loaded, range(1))


@rules
def test_nothing_is_shared_with_the_checkpoint(rule):
    ours, _, keywords, _ = RULES[rule]
    model, other = network(), network()
    first, second = (
        ours(each.parameters(), quantizer="ternary", pretrained=True, **keywords) for each in (model, other)
    )
    walk(model, first, range(2))
    saved = first.state_dict()
    before = copy.deepcopy(saved)
    second.load_state_dict(saved)
    walk(other, second, range(3))
    assert str(saved) == str(before)
    assert str(first.state_dict()) == str(before)


def test_state_lies_in_memory_as_its_weight_does():
    convolution = nn.Conv2d(3, 5, 2)
    optimizer = askew.AskewSGD(convolution.parameters(), lr=0.1, momentum=0.9)
    walk(convolution, optimizer, range(1))
    other = nn.Conv2d(3, 5, 2).to(memory_format=torch.channels_last)
    loaded = askew.AskewSGD(other.parameters(), lr=0.1, momentum=0.9)
    loaded.load_state_dict(optimizer.state_dict())
    buffer = loaded.state[other.weight]["momentum_buffer"]
    assert buffer.stride() == other.weight.stride() != convolution.weight.stride()
    assert torch.equal(buffer, optimizer.state[convolution.weight]["momentum_buffer"])


@rules
@pytest.mark.parametrize("missing", ["maximize", "foreach", "differentiable", "fused", "epsilon", "quantizer"])
def test_checkpoints_of_older_versions_lack_keywords(rule, missing):
    ours, _, keywords, _ = RULES[rule]
    model = network()
    optimizer = ours(model.parameters(), quantizer="ternary", pretrained=True, **keywords)
    walk(model, optimizer, range(1))
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group[missing]
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = int(state["step"])  # a number, once
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["quantizer"] == "ternary"
    walk(model, optimizer, range(1, 2))
    if rule == "amsgrad":
        assert optimizer.state[model[0].weight]["step"].item() == 2


def test_how_a_machine_computes_is_not_loaded():
    model = network()
    there = askew.AskewSGD(model.parameters(), lr=0.1, fused=False, foreach=True, backend="reference")
    here = askew.AskewSGD(network().parameters(), lr=0.5, fused=True, backend="cpu")
    here.load_state_dict(there.state_dict())
    group = here.param_groups[0]
    assert (group["lr"], group["fused"], group["foreach"], group["backend"]) == (0.1, True, None, "cpu")


def split(saved):
    group = saved["param_groups"][0]
    saved["param_groups"] = [{**group, "params": [0, 1]}, {**group, "params": [2, 3, 4, 5]}]


def split_by_name(saved):
    (group,) = saved["param_groups"]
    names = ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
    saved["param_groups"] = [
        {**group, "params": [0, 1], "param_names": names[:2]},
        {**group, "params": [2, 3, 4, 5], "param_names": names[2:]},
    ]


WRONG = {
    "other groups": (False, split, r"param groups of \[2, 4\] weights, this optimizer of \[6\].*named_parameters"),
    "one group in two": (
        True,
        split_by_name,
        r"0.bias, 0.weight, 2.bias .. \(6 in all\) here\) lie in several groups .* \(0, 1\)",
    ),
    "other names": (
        True,
        lambda saved: saved["param_groups"][0]["param_names"].__setitem__(0, "stem.weight"),
        r"0.weight \(1 in all\) not in the checkpoint; stem.weight \(1 in all\) only there",
    ),
    "other shapes": (
        False,
        lambda saved: saved["state"][1].update(momentum_buffer=torch.ones(5)),
        r"momentum_buffer of params\[1\] has shape \(5,\) in the checkpoint; \(4,\)",
    ),
    "another scale": (
        True,
        lambda saved: saved["state"][2].update(scale=torch.ones(4, 1)),
        r"scale of 2.weight has shape \(4, 1\).*\(\)",
    ),
    "another rule": (
        False,
        lambda saved: saved["param_groups"][0].update(betas=(0.9, 0.99)),
        "the checkpoint is one of AdamW; this optimizer goes by the rule of SGD",
    ),
    "a negative lr": (False, lambda saved: saved["param_groups"][0].update(lr=-1.0), "lr = -1.0"),
    "an unknown quantizer": (False, lambda saved: saved["param_groups"][0].update(quantizer="septenary"), "septenary"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_and_nothing_is_loaded(case):
    named, change, message = WRONG[case]
    model, other = network(), network()
    source, target = (
        askew.AskewSGD(
            each.named_parameters() if named else each.parameters(),
            lr=0.1,
            momentum=0.9,
            quantizer="ternary",
            pretrained=True,
        )
        for each in (model, other)
    )
    walk(model, source, range(1)), walk(other, target, range(2))
    saved, before = copy.deepcopy(source.state_dict()), copy.deepcopy(target.state_dict())
    change(saved)
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(saved)
    assert str(target.state_dict()) == str(before)


def test_names_on_one_side_only_mean_by_position():
    model, other = network(), network()
    source = askew.AskewSGD(model.named_parameters(), lr=0.1, momentum=0.9)
    walk(model, source, range(1))
    target = askew.AskewSGD(other.parameters(), lr=0.1, momentum=0.9)
    target.load_state_dict(source.state_dict())
    assert target.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]  # as torch does it
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(source.state[a]["momentum_buffer"], target.state[b]["momentum_buffer"])


def test_state_that_belongs_to_no_weight_is_kept():
    model = network()
    optimizer = askew.AskewSGD(model.parameters(), lr=0.1)
    saved = optimizer.state_dict()
    saved["state"]["note"] = {"text": "of some library"}
    optimizer.load_state_dict(saved)
    assert optimizer.state["note"] == {"text": "of some library"}
    assert optimizer.state_dict()["state"]["note"] == {"text": "of some library"}


@pytest.mark.parametrize("there", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("here", ["", "module.", "_orig_mod."])
def test_prefixes_of_ddp_and_compile_do_not_count(there, here):
    def named(prefix: str, model: nn.Module):
        return [(prefix + name, weight) for name, weight in model.named_parameters()]

    model, other = network(), network()
    source = askew.AskewSGD(named(there, model), lr=0.1, momentum=0.9, quantizer="ternary", pretrained=True)
    walk(model, source, range(2))
    target = askew.AskewSGD(named(here, other)[::-1], lr=0.5, momentum=0.9, quantizer="ternary", pretrained=True)
    target.load_state_dict(source.state_dict())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert str(source.state[a]) == str(target.state[b])
    assert target.param_groups[0]["param_names"][-1] == f"{here}0.weight"


def test_prefixes_that_tell_two_weights_apart_do_count():
    first, second = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    names = ("a.w", "a.module.w")
    source, target = (askew.AskewSGD(list(zip(each, (first, second), strict=True))) for each in (names, ("b.w", "a.w")))
    with pytest.raises(ValueError, match=r"b.w \(1 in all\) not in the checkpoint; a.module.w \(1 in all\) only there"):
        target.load_state_dict(source.state_dict())
