"""Scales that fit formats of others: when they are rounded, and when they are not."""

import pytest
import torch

import askew_cuda as askew
from askew_cuda.packed.export import export_gguf
from askew_cuda.scales import short
from tests.optimizer.test_learned_scale import RULES, groups, learning, network, scales, train

FORMATS = ("gguf:q1_0", "gguf:tq1_0", "gguf:tq2_0", "gguf:q2_0", "gguf:q2_k", "gguf:q4_0", "gguf:q4_1", "gguf:q8_0")


def are_short(optimizer) -> list[bool]:
    return [torch.equal(scale, short(scale)) for scale in scales(optimizer)]


@pytest.mark.parametrize("scale_lr", [0.0, 0.3])
@pytest.mark.parametrize("quantizer", ["binary", "ternary/channel", "4bit/group8"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_scales_are_short_once_annealing_has_begun(rule, quantizer, scale_lr):
    model, plain = network(), network()
    keywords = {"scale_lr": scale_lr, "total_steps": 60, "hold": 0.5, "end": 0.6}
    optimizer = rule(groups(model, quantizer), short_scales=True, **keywords)
    other = rule(groups(plain, quantizer), **keywords)
    train(model, optimizer, 31)
    train(plain, other, 31)
    assert bool(learning(optimizer)) == (scale_lr > 0)
    assert are_short(optimizer) == [scale_lr == 0] * 2
    train(model, optimizer, 1)
    train(plain, other, 1)
    assert are_short(optimizer) == [True] * 2
    assert not all(are_short(other))
    if scale_lr == 0:  # else the first scales, which are rounded too, have learned other things since
        assert all(torch.equal(a, short(b)) for a, b in zip(scales(optimizer), scales(other), strict=True))
    fixed = scales(optimizer)
    train(model, optimizer, 28)
    assert all(torch.equal(a, b) for a, b in zip(fixed, scales(optimizer), strict=True))
    assert optimizer.finalize().share_on_level == 1


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_a_tensor_as_epsilon_rounds_in_the_same_step(rule):
    runs = []
    for kind in (float, torch.tensor):
        model = network()
        optimizer = rule(groups(model, "ternary/channel"), scale_lr=0.3, short_scales=True, epsilon=kind(1.0))
        train(model, optimizer, 5)
        assert are_short(optimizer) == [False] * 2
        for group in optimizer.param_groups:
            group["epsilon"] = kind(0.9)
        train(model, optimizer, 1)
        assert are_short(optimizer) == [True] * 2
        train(model, optimizer, 2)
        runs.append([p.detach().clone() for p in model.parameters()] + scales(optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_compiled_step_rounds_as_an_eager_one_does():
    runs = []
    for compiles in (False, True):
        torch.compiler.reset()
        model, epsilon = network(), torch.tensor(1.0)
        optimizer = RULES["sgd"](groups(model, "ternary/channel"), scale_lr=0.3, short_scales=True, epsilon=epsilon)
        optimizer.prepare()
        step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager") if compiles else optimizer.step
        for value in (1.0, 1.0, 0.9, 0.8):
            optimizer.zero_grad()
            model(torch.ones(4, 16)).square().mean().backward()
            for group in optimizer.param_groups:
                group["epsilon"].fill_(value)
            step()
        assert are_short(optimizer) == [True] * 2
        runs.append([p.detach().clone() for p in model.parameters()] + scales(optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("format", FORMATS)
def test_training_for_a_format_ends_in_a_file_of_it(format, tmp_path):
    """From scratch, with scales that learn, nothing said but the format's name."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    made = askew.param_groups(model, {"0.weight": format, "*": None}, verbose=False)
    optimizer = askew.AskewSGD(made, lr=0.1, momentum=0.9, total_steps=40)
    assert optimizer.param_groups[0]["quantizer"] == format
    x, y = torch.randn(32, 256), torch.randn(32, 2)
    for _ in range(40):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    assert are_short(optimizer) == [True]
    askew.save_packed(model, optimizer, tmp_path / "a")
    type = format.removeprefix("gguf:").upper()
    assert export_gguf(tmp_path / "a", tmp_path / "a.gguf", type=type) == {"0.weight": type}


def test_who_asks_for_short_scales():
    """A format's name does, unless the group says otherwise; its levels and groups under another name don't."""
    for format, keywords, wanted in (
        ("gguf:q4_0", {}, True),
        ("gguf:q4_0", {"short_scales": False}, False),
        ("int4/group32", {}, False),
        ("int4/group32", {"short_scales": True}, True),
    ):
        torch.manual_seed(0)
        layer = torch.nn.Linear(64, 4)
        made = askew.param_groups(layer, {"weight": format}, verbose=False, **keywords)
        optimizer = askew.AskewSGD(made, lr=0.1)
        optimizer.prepare()
        assert are_short(optimizer) == [wanted]
        again = askew.AskewSGD(askew.param_groups(layer, {"weight": "ternary"}, verbose=False), lr=0.1)
        again.load_state_dict(optimizer.state_dict())
        del again.state[layer.weight]
        again.prepare()
        assert are_short(again) == [wanted]  # the checkpoint brings it along


def test_the_same_levels_by_both_names_are_two_groups():
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 4))
    made = askew.param_groups(model, {"0.weight": "gguf:q4_0", "1.weight": "int4/group32"}, verbose=False)
    assert [group["quantizer"] for group in made] == ["gguf:q4_0", "int4/group32", None]
    assert askew.Quantizer.parse("gguf:q4_0") == askew.Quantizer.parse("int4/group32")


def test_scales_that_are_given_or_found_stay():
    """Weights of a packed file lie on their levels already."""
    weight = torch.tensor([-0.1, 0.1, 0.3, -0.3])  # of a scale of 0.2, which has 24 bits
    keywords = {"quantizer": "2bit", "short_scales": True, "clip": False}
    for group, wanted in (
        ({"scales": [torch.tensor(0.2)]}, [False]),
        ({"pretrained": "packed"}, [False]),
        ({"pretrained": True}, [True]),
        ({"quantizer": askew.Quantizer("2bit", scale=0.2)}, [True]),  # the group's word is the last
    ):
        params = [torch.nn.Parameter(weight.clone())]
        optimizer = askew.AskewSGD([{"params": params, **keywords, **group}], lr=0.1)
        optimizer.prepare()
        assert are_short(optimizer) == wanted


@pytest.mark.parametrize("value", ["yes", 2, 0.5])
def test_what_is_neither_true_nor_false_is_refused(value):
    with pytest.raises(ValueError, match="short_scales"):
        RULES["sgd"](groups(network(), "ternary"), short_scales=value)
