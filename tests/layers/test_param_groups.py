"""param_groups(): which weights are quantized, and the table that says so."""

import pytest
import torch
from torch import nn

import askew_cuda as askew


class Transformer(nn.Module):
    """Embedding, two blocks, norm, tied head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(8), "attn": nn.Linear(8, 8), "mlp": nn.Linear(8, 8)}) for _ in range(2)
        )
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.norm = nn.LayerNorm((8, 8))
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight


def names(groups: list[dict]) -> dict[object, list[str]]:
    return {str(group["quantizer"]): [name for name, _ in group["params"]] for group in groups}


def test_one_specification_leaves_out_embeddings_norms_first_and_last_layer(capsys):
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2)
    )
    found = names(askew.param_groups(net, "ternary"))
    assert found["ternary"] == ["2.weight", "4.weight"]
    assert set(found["None"]) == {"0.weight", "0.bias", "1.weight", "1.bias", "2.bias", "4.bias", "5.weight", "5.bias"}
    table = capsys.readouterr().out
    lines = {line.split()[0]: line for line in table.splitlines() if line}
    assert "first layer" in lines["0.weight"]
    assert "last layer" in lines["5.weight"]
    assert "1-d" in lines["2.bias"]
    assert "4x4x3x3" in lines["2.weight"]
    assert "2 of 10 parameters quantized: 160 of" in table


def test_a_transformer_with_a_tied_head():
    found = names(askew.param_groups(Transformer(), "2bit/channel", verbose=False))
    assert found["2bit/channel"] == [f"blocks.{i}.{part}.weight" for i in range(2) for part in ("attn", "mlp")] + [
        "frozen.weight"  # so that it trains when it is unfrozen
    ]
    everything = [name for group in found.values() for name in group]
    assert len(everything) == len(set(everything))
    assert "head.weight" not in everything  # the same tensor as the embedding, listed there
    assert "frozen.bias" in found["None"]


def test_include_and_exclude():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    found = names(askew.param_groups(net, "binary", include="0.weight", exclude=["re:2.*"], verbose=False))
    assert found["binary"] == ["0.weight", "1.weight"]
    with pytest.raises(ValueError, match=r"'9\.weight' matches no parameter"):
        askew.param_groups(net, "binary", include=["9.weight"])


def test_rules_are_tried_in_order_and_quantize_exactly_what_they_say(capsys):
    rules = {
        "blocks.0.attn.weight": None,
        "re:.*attn.*": "ternary",
        "embedding.weight": "4bit/channel",
        "*": "2bit/group4",
    }
    groups = askew.param_groups(Transformer(), rules)
    found = names(groups)
    assert found["ternary"] == ["blocks.1.attn.weight"]
    assert found["4bit/channel"] == ["embedding.weight"]
    assert found["2bit/group4"] == ["blocks.0.mlp.weight", "blocks.1.mlp.weight", "frozen.weight"]
    assert {"norm.weight", "norm.bias"} <= set(found["None"])  # of two dimensions, but of a norm
    assert "blocks.0.attn.weight" in found["None"]
    assert "blocks.0.attn.bias" in found["None"]  # a pattern means matrices
    assert "name it to quantize it" in capsys.readouterr().out


def test_a_named_bias_is_quantized():
    net = nn.Linear(4, 4)
    found = names(askew.param_groups(net, {"weight": "binary", "bias": "8bit"}, verbose=False))
    assert found == {"binary": ["weight"], "8bit": ["bias"]}


def test_the_groups_drive_an_optimizer():
    groups = askew.param_groups(
        Transformer(), {"*": "ternary"}, pretrained=True, verbose=False, anneal="interval", recovery=0.25
    )
    optimizer = askew.AskewSGD(groups, lr=0.1, weight_decay=0.1)
    quantized, rest = optimizer.param_groups
    assert (quantized["quantizer"], quantized["pretrained"], quantized["anneal"], quantized["recovery"]) == (
        "ternary",
        True,
        "interval",
        0.25,
    )
    assert rest["quantizer"] is None
    assert quantized["param_names"][0] == "embedding.weight"


def test_a_quantizer_object_and_its_plain_form():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    quantizer = askew.Quantizer([-2, 0, 1], scale=0.5)
    for given in (quantizer, quantizer.plain()):
        groups = askew.param_groups(net, given, verbose=False)
        assert groups[0]["quantizer"] == quantizer.plain()
        assert askew.AskewSGD(groups).param_groups[0]["quantizer"] == quantizer.plain()


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ("ternary", ValueError, r"no weight is left.*\{'\*': 'ternary'\}"),
        ({"re:.*conv.*": "binary", "*": "binary"}, ValueError, r"'re:\.\*conv\.\*' matches no weight"),
        ({"re:.*bias": "binary"}, ValueError, "two or more dimensions"),
        ({"*": "2bit/group3"}, ValueError, "3"),
        ({"*": "9bit"}, ValueError, "9bit"),
        (3, TypeError, "weights = 3"),
        ({"*": None}, ValueError, "no weight is left"),
    ],
    ids=str,
)
def test_wrong_rules(weights, error, message):
    with pytest.raises(error, match=message):
        askew.param_groups(nn.Linear(4, 4), weights)


def test_rules_and_include_exclude_each_other():
    with pytest.raises(ValueError, match="include= and exclude= go with one specification"):
        askew.param_groups(nn.Linear(4, 4), {"*": "binary"}, include=["weight"])


def test_channels_last_and_named_parameters_keep_their_tensors():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3)).to(
        memory_format=torch.channels_last
    )
    groups = askew.param_groups(net, "4bit/channel", verbose=False)
    (name, weight), *_ = groups[0]["params"]
    assert name == "1.weight"
    assert weight is net[1].weight


def test_a_matrix_of_many_inputs_takes_a_share_of_the_learning_rate():
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 32), nn.Conv2d(32, 4, 3), nn.Linear(16, 9))
    rules = {"3.weight": "binary", "*": "ternary"}
    groups = askew.param_groups(model, rules, lr=0.5, lr_inputs=64, momentum=0.5, verbose=False)
    found = {
        name: (group.get("lr"), group.get("momentum"), group["quantizer"])
        for group in groups
        for name, _ in group["params"]
    }
    ternary, binary = askew.Quantizer.parse("ternary").plain(), askew.Quantizer.parse("binary").plain()
    assert found["0.weight"] == (0.125, 0.5, ternary)
    assert found["1.weight"] == (0.5, 0.5, ternary)
    assert found["2.weight"] == (0.5 * 64 / 288, 0.5, ternary)
    assert found["3.weight"] == (0.5, 0.5, binary)
    assert found["0.bias"] == (None, None, None)
    optimizer = askew.AskewSGD(groups, lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert schedule.get_last_lr() == [0.0625, 0.25, 0.25 * 64 / 288, 0.25, 0.25]
    bare = askew.param_groups(model, rules, lr=0.5, lr_inputs=64, names=False, verbose=False)
    assert sorted(group.get("lr", 0.0) for group in bare) == sorted([0.125, 0.5, 0.5 * 64 / 288, 0.5, 0.0])


def test_a_matrix_of_many_inputs_decays_as_fast_as_the_others():
    model = nn.Sequential(nn.Linear(256, 64), nn.LayerNorm(64), nn.Linear(64, 32))
    groups = askew.param_groups(
        model, {"*": "ternary"}, lr=0.5, lr_inputs=64, weight_decay=0.01, no_decay=["2.weight"], verbose=False
    )
    found = {name: (group.get("lr"), group.get("weight_decay")) for group in groups for name, _ in group["params"]}
    assert found["0.weight"] == (0.125, 0.04)
    assert found["2.weight"] == (0.5, 0.0)
    assert found["0.bias"] == (None, None)
    (wide, *_) = askew.param_groups(
        model, {"0.weight": "ternary"}, lr=0.5, lr_inputs=64, weight_decay=0.01, no_decay=["0.weight"], verbose=False
    )
    assert (wide["lr"], wide["weight_decay"]) == (0.125, 0.0)


@pytest.mark.parametrize("value", [0, -1, 64.0, True, "64"])
def test_a_wrong_number_of_inputs(value):
    with pytest.raises(ValueError, match="lr_inputs = "):
        askew.param_groups(nn.Linear(4, 4), {"*": "ternary"}, lr=0.5, lr_inputs=value)


@pytest.mark.parametrize("value", [None, "0.1", True])
@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_what_is_no_number_has_no_share_and_is_refused_by_name(key, value):
    keywords = {"lr": 0.5, "weight_decay": 0.1, key: value}
    groups = askew.param_groups(nn.Linear(128, 4), {"*": "ternary"}, lr_inputs=64, verbose=False, **keywords)
    with pytest.raises((TypeError, ValueError), match=key):
        askew.AskewSGD(groups, lr=0.1)


def test_a_share_needs_a_whole():
    with pytest.raises(ValueError, match="give lr= here, too"):
        askew.param_groups(nn.Linear(4, 4), {"*": "ternary"}, lr_inputs=64)
