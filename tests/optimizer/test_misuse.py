"""Wrong input: an error that names the argument, its value and the remedy, and nothing has changed."""

import math
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import askew_cuda as askew
from askew_cuda.keywords import CONSTRAINT, KEYWORDS, check_keywords


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    made = nn.Parameter(torch.linspace(-1, 1, math.prod(shape)).reshape(shape).to(dtype))
    made.grad = torch.ones_like(made)
    return made


# keywords of AskewSGD, error, what its message says
WRONG = [
    ({"lr": -1.0}, ValueError, "lr = -1.0; a learning rate is at least 0"),
    ({"lr": "fast"}, TypeError, "lr = 'fast'; a number"),
    ({"momentum": -0.5}, ValueError, "momentum = -0.5"),
    ({"weight_decay": -1e-4}, ValueError, "weight_decay = -0.0001"),
    ({"nesterov": True}, ValueError, "nesterov = True with momentum = 0"),
    ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError, "dampening = 0.1"),
    ({"epsilon": 1.5}, ValueError, "epsilon = 1.5.*not Adam's eps"),
    ({"epsilon": -0.1}, ValueError, "epsilon = -0.1"),
    ({"epsilon": math.nan}, ValueError, "epsilon = nan"),
    ({"epsilon": True}, TypeError, "epsilon = True"),
    ({"recovery": 0.0}, ValueError, r"recovery = 0.0.*\(0, 1\]"),
    ({"recovery": 1.1}, ValueError, "recovery = 1.1"),
    ({"alpha": 0.0}, ValueError, "alpha = 0.0"),
    ({"alpha": math.inf}, ValueError, "alpha = inf"),
    ({"recovery": 0.5, "alpha": 1.0}, ValueError, "recovery = 0.5, alpha = 1.0: give one"),
    (
        {"recovery": 0.5, "skew_at": "gradient", "anneal": "interval"},
        ValueError,
        "recovery = 0.5; with skew_at = 'gradient' give alpha",
    ),
    ({"skew_at": "gradient"}, ValueError, "skew_at = 'gradient'.*interval"),
    ({"skew_at": "weights"}, ValueError, "skew_at = 'weights'"),
    ({"anneal": "linear"}, ValueError, "anneal = 'linear'; 'capture' or 'interval'"),
    ({"max_step": 0.0}, ValueError, "max_step = 0.0"),
    ({"clip": 1}, ValueError, "clip = 1"),
    ({"pretrained": "yes"}, ValueError, "pretrained = 'yes'"),
    ({"outputs": ["logits"]}, ValueError, "outputs = .*'logits'"),
    ({"outputs": "codes"}, ValueError, "outputs = 'codes'"),
    ({"outputs": ["codes"], "quantizer": None}, ValueError, "outputs need a quantizer"),
    ({"state_dtype": torch.float16}, ValueError, "state_dtype = torch.float16"),
    ({"differentiable": True}, ValueError, "differentiable = True"),
    ({"foreach": True, "fused": True}, ValueError, "foreach and fused"),
    ({"fused": True, "backend": "reference"}, RuntimeError, "fused = True, but the pure PyTorch reference"),
    ({"backend": "tpu"}, ValueError, "backend = 'tpu'"),
    ({"backend": "cuda"}, RuntimeError, "backend = 'cuda' is absent"),
    ({"backend": "triton"}, RuntimeError, "backend = 'triton' is absent"),
    ({"quantizer": "septenary"}, ValueError, "septenary"),
    ({"quantizer": "2bit/group5"}, ValueError, "5"),
    ({"quantizer": 3}, TypeError, "3"),
    ({"quantiser": "binary"}, TypeError, "quantiser.*quantizer"),
]


@pytest.mark.parametrize(("keywords", "error", "message"), WRONG, ids=[str(keywords) for keywords, *_ in WRONG])
def test_wrong_keywords(keywords, error, message):
    with pytest.raises(error, match=message):
        askew.AskewSGD([weight(4, 6)], **{"quantizer": "ternary", **keywords})
    optimizer = askew.AskewSGD([weight(4, 6)], quantizer="ternary")
    # in a group the same is wrong, but torch ignores keys of a group that it doesn't know
    if not {"quantiser", "foreach"} & set(keywords):
        with pytest.raises(error, match=message):
            optimizer.add_param_group({"params": [weight(4, 6)], **{"quantizer": "ternary", **keywords}})
        assert len(optimizer.param_groups) == 1


def test_one_changed_keyword_is_checked_alone_and_with_those_that_it_depends_on():
    group = askew.AskewSGD([weight(2)], lr=0.1, quantizer="ternary").param_groups[0]
    check_keywords(group)
    group.update(lr=-1.0, max_step=0.0)
    check_keywords(group, ("epsilon", "clip"))
    with pytest.raises(ValueError, match=r"^max_step = 0.0; above 0"):
        check_keywords(group, ("epsilon", "max_step"))
    group.update(skew_at="gradient")
    with pytest.raises(ValueError, match=r"recovery = 0.5; with skew_at = 'gradient' give alpha"):
        check_keywords(group, ("skew_at",))
    with pytest.raises(ValueError, match=r"lr = -1.0"):
        check_keywords(group)


def test_every_keyword_has_a_default_that_is_good():
    assert set(CONSTRAINT) == set(KEYWORDS) - {"lr", "weight_decay", "maximize", "differentiable"}
    check_keywords({**CONSTRAINT, "foreach": None, "fused": None}, CONSTRAINT)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"betas": (1.0, 0.9)}, r"betas = \(1.0, 0.9\)"),
        ({"betas": (0.9,)}, "betas"),
        ({"eps": -1.0}, "eps = -1.0"),
        ({"capturable": True}, "capturable = True"),
    ],
    ids=str,
)
def test_wrong_keywords_of_adamw(keywords, message):
    with pytest.raises(ValueError, match=message):
        askew.AskewAdamW([weight(4)], **keywords)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8], ids=str)
def test_wrong_weights(dtype):
    wrong = nn.Parameter(torch.zeros(3, dtype=dtype), requires_grad=dtype.is_complex)
    with pytest.raises(TypeError, match=re.escape(str(dtype))):
        askew.AskewSGD([("layer.weight", wrong)], lr=0.1)


def test_a_groups_own_rate_wins():
    optimizer = askew.AskewSGD(
        [{"params": [weight(2, 2)], "alpha": 2.0}, {"params": [weight(2, 2)]}], recovery=0.25, quantizer="binary"
    )
    assert [(group["recovery"], group["alpha"]) for group in optimizer.param_groups] == [(None, 2.0), (0.25, None)]
    plain = askew.AskewSGD([weight(2, 2)], quantizer="binary", anneal="interval", skew_at="gradient")
    assert (plain.param_groups[0]["recovery"], plain.param_groups[0]["alpha"]) == (None, 1.0)


def test_a_sparse_gradient_stops_the_whole_step():
    dense, embedding = weight(2, 2), nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    optimizer = askew.AskewSGD([("dense", dense), ("table", embedding.weight)], lr=0.1)
    before = dense.detach().clone()
    with pytest.raises(ValueError, match=r"gradient of table is sparse.*sparse=False"):
        optimizer.step()
    assert torch.equal(dense, before)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_weights_without_a_scale_stop_the_whole_step(value):
    good, bad = weight(2, 2), weight(2, 2)
    with torch.no_grad():
        bad.fill_(value)
    optimizer = askew.AskewSGD([("good", good), ("bad", bad)], lr=0.1, quantizer="ternary", pretrained=True)
    before = good.detach().clone()
    with pytest.raises(ValueError, match="bad.*scale=" if value == 0 else "bad"):
        optimizer.step()
    assert torch.equal(good, before)
    with pytest.raises(ValueError, match="bad"):
        optimizer.prepare()


@pytest.mark.parametrize("grad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("anneal", ["capture", "interval"])
@pytest.mark.parametrize("epsilon", [1.0, 0.5, 0.0])
def test_a_bad_gradient_touches_only_its_own_weight(grad, anneal, epsilon):
    clean, hit = weight(4, 6), weight(4, 6)
    hit.grad[2, 3] = grad
    for each in (clean, hit):
        askew.AskewSGD(
            [each], lr=0.1, momentum=0.9, quantizer="2bit", pretrained=True, anneal=anneal, epsilon=epsilon
        ).step()
    others = torch.ones(4, 6, dtype=torch.bool)
    others[2, 3] = False
    assert torch.equal(clean[others], hit[others])
    assert hit[2, 3].isnan() == math.isnan(grad)


WITHOUT_EXTENSION = """
    import sys, warnings
    sys.modules["askew_cuda._C"] = None     # as where nothing was compiled
    import torch, askew_cuda as askew
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 24).reshape(4, 6))
    weight.grad = torch.ones_like(weight)
    try:
        askew.AskewSGD([weight], backend="cpu")
    except RuntimeError as error:
        print(error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = askew.AskewSGD([weight], lr=0.1, quantizer="ternary", pretrained=True)
        askew.AskewSGD([weight], lr=0.1)
    print(len(caught), caught[0].message)
    optimizer.step()
    print(repr(optimizer).splitlines()[-2])
    print(askew.build_info(), weight.flatten().tolist())
"""


def test_without_the_compiled_extension_the_reference_steps_and_says_so():
    code = textwrap.dedent(WITHOUT_EXTENSION)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    absent, warned, representation, weights = run.stdout.splitlines()
    assert "backend = 'cpu' is absent" in absent
    assert "C++20 compiler" in absent
    assert "pip install" in absent
    assert warned.startswith("1 ")
    assert "slow pure PyTorch reference" in warned
    assert "reference for torch.float32" in representation
    expected = weight(4, 6)
    askew.AskewSGD([expected], lr=0.1, quantizer="ternary", pretrained=True).step()
    assert weights == f"None {expected.flatten().tolist()}"
