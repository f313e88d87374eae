"""What torch tests of its own optimizers, by its own table (OptimizerInfo): constructors, groups, steps, closures,
copies.
"""

import copy
import functools
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("expecttest", reason="expecttest, which torch's own tests need, is not installed: the dev extra")

from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import askew_cuda as askew

INFOS = {info.optim_cls: info for info in optim_db}
PAIRS = {askew.AskewSGD: torch.optim.SGD, askew.AskewAdamW: torch.optim.AdamW}
QUANTIZERS = [None, "ternary/channel"]
# Our class, torch's, and a set of keywords that torch tests.
INPUTS = [
    pytest.param(ours, torchs, given.kwargs, id=f"{ours.__name__}-{given.desc}")
    for ours, torchs in PAIRS.items()
    for given in INFOS[torchs].optim_inputs_func("cpu")
]
classes = pytest.mark.parametrize("ours", PAIRS)
quantizers = pytest.mark.parametrize("quantizer", QUANTIZERS)


def problem(dtype: torch.dtype = torch.float64, contiguous: bool = True) -> tuple[list[nn.Parameter], callable]:
    """A weight, a bias, and a closure on them; the same ones at each call."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((10, 5, 2), (10, 2)))
    given = torch.randn(5, generator=generator).to(dtype)
    params = [nn.Parameter(each[..., 0].contiguous() if contiguous else each[..., 0]) for each in (weight, bias)]

    def closure(optimizer):
        optimizer.zero_grad()
        loss = (params[0].mv(given) + params[1]).pow(2).sum()
        loss.backward()
        return loss.detach()

    return params, closure


def run(optimizer, closure, steps: int = 8) -> list[float]:
    return [float(optimizer.step(functools.partial(closure, optimizer))) for _ in range(steps)]


def fresh(keywords: dict) -> dict:
    """Keywords with tensors of their own: schedulers write to a tensor lr."""
    return copy.deepcopy(keywords)


@pytest.mark.parametrize(("ours", "torchs", "keywords"), INPUTS)
@pytest.mark.parametrize("flag", [{}, {"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}], ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_trajectory_is_torchs(ours, torchs, keywords, flag, contiguous):
    """Ten roundings of 2^-53 a step, on numbers that the square loss amplifies: 1e-11 is loose, and any wrong formula
    far off.
    """
    mine, closure = problem(contiguous=contiguous)
    theirs, their_closure = problem(contiguous=contiguous)
    losses = run(ours(mine, **fresh(keywords), **flag), closure)
    wanted = run(torchs(theirs, **fresh(keywords), foreach=False), their_closure)
    torch.testing.assert_close(losses, wanted, rtol=1e-11, atol=1e-11)
    for weight, truth in zip(mine, theirs, strict=True):
        torch.testing.assert_close(weight, truth, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("ours", "torchs", "keywords"), INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings(
    "ignore:.*did not move in the first step"
)  # lr = 0.01 is small for some of the bfloat16 weights
def test_a_quantized_run_goes_in_the_right_direction(ours, torchs, keywords, dtype):
    params, closure = problem(dtype)
    keywords = fresh(keywords) | {"lr": 0.01}
    losses = run(ours(params, quantizer="8bit", pretrained=True, clip=False, **keywords), closure, 30)
    assert losses[-1] > losses[0] if keywords.get("maximize") else losses[-1] < losses[0]


@classes
@quantizers
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_lr_as_a_tensor(ours, quantizer, shape):
    (mine, closure), (theirs, their_closure) = problem(), problem()
    lr = torch.full(shape, 0.05, dtype=torch.float64)
    first, second = (
        ours(params, lr=each, quantizer=quantizer, pretrained=True) for params, each in ((mine, lr), (theirs, 0.05))
    )
    assert first.param_groups[0]["lr"] is lr
    assert run(first, closure) == run(second, their_closure)
    lr.fill_(0.0)  # read at each step
    before = mine[0].detach().clone()
    run(first, closure, 1)
    assert torch.equal(mine[0], before)


@pytest.mark.parametrize("betas", [(torch.tensor(0.5), torch.tensor(0.75)), (torch.tensor(0.5), 0.75)], ids=str)
def test_betas_as_tensors(betas):
    (mine, closure), (theirs, their_closure) = problem(), problem()
    assert run(askew.AskewAdamW(mine, betas=betas), closure) == run(
        askew.AskewAdamW(theirs, betas=(0.5, 0.75)), their_closure
    )


@pytest.mark.parametrize(
    ("ours", "wrong"),
    [
        pytest.param(ours, wrong, id=f"{ours.__name__}-{k}")
        for ours, torchs in PAIRS.items()
        for k, wrong in enumerate(INFOS[torchs].optim_error_inputs_func("cpu", torch.float32))
    ],
)
def test_what_torch_refuses(ours, wrong):
    """By an error of the same type. That foreach takes no tensor for lr, nor for just one of the betas, is a limit of
    torch's.
    """
    given = wrong.optimizer_error_input
    assert wrong.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    params = [nn.Parameter(torch.ones(1))] if given.params is None else given.params
    if any(
        words in wrong.error_regex
        for words in ("as a Tensor is not supported", "betas must be either both floats or both Tensors")
    ):
        assert len(ours(params, **given.kwargs).param_groups) == 1
    elif issubclass(wrong.error_type, Warning):
        with pytest.warns(wrong.error_type, match=wrong.error_regex):
            ours(params, **given.kwargs)
    else:
        with pytest.raises(wrong.error_type):
            ours(params, **given.kwargs)


@classes
@quantizers
@pytest.mark.parametrize(
    "form", ["parameters", "generator", "named", "groups", "named groups", "one tensor in a group"]
)
def test_constructor_forms(ours, quantizer, form):
    weight, bias = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))
    named = [("weight", weight), ("bias", bias)]
    params = {
        "parameters": [weight, bias],
        "generator": (each for each in (weight, bias)),
        "named": named,
        "groups": [{"params": [weight], "lr": 0.5}, {"params": (each for each in [bias])}],
        "named groups": [{"params": named[:1], "lr": 0.5}, {"params": iter(named[1:])}],
        "one tensor in a group": [{"params": weight, "lr": 0.5}, {"params": bias}],
    }[form]
    optimizer = ours(params, lr=0.1, quantizer=quantizer)
    assert [each for group in optimizer.param_groups for each in group["params"]] == [weight, bias]
    assert [group["lr"] for group in optimizer.param_groups] == ([0.5, 0.1] if "group" in form else [0.1])
    names = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    assert names == (["weight", "bias"] if "named" in form else [])


@classes
def test_a_set_of_weights_has_no_order(ours):
    with pytest.raises(TypeError, match="ordered collections"):
        ours([{"params": {nn.Parameter(torch.ones(2))}}])


@classes
@quantizers
def test_duplicates_step_once(ours, quantizer):
    """torch warns of them; its own loops step them twice, or at the same time."""
    (once, closure), (twice, other) = problem(), problem()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = ours([*twice, twice[0]], lr=0.1, quantizer=quantizer, pretrained=True)
    assert len(optimizer.param_groups[0]["params"]) == 2
    assert run(optimizer, other) == run(ours(once, lr=0.1, quantizer=quantizer, pretrained=True), closure)


@classes
@quantizers
def test_group_overrides_and_groups_that_come_later(ours, quantizer):
    (mine, closure), (theirs, their_closure) = problem(), problem()
    early = ours(
        [{"params": mine[:1], "lr": 0.01}, {"params": mine[1:], "weight_decay": 0.5}],
        quantizer=quantizer,
        pretrained=True,
    )
    late = ours(
        [{"params": theirs[:1]}],
        lr=0.01,
        weight_decay=early.defaults["weight_decay"],
        quantizer=quantizer,
        pretrained=True,
    )
    late.add_param_group({"params": theirs[1:], "weight_decay": 0.5, "lr": early.defaults["lr"]})
    assert run(early, closure) == run(late, their_closure)
    # in the middle of the training
    late.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "quantizer": "binary"})
    run(late, their_closure, 1)
    assert late.param_groups[2]["quantizer"] == "binary"


@classes
def test_defaults_hold_for_later_groups_and_are_torchs(ours):
    weight = nn.Parameter(torch.ones(2))
    optimizer, theirs = ours([weight], lr=0.5), PAIRS[ours]([weight], lr=0.5)
    for key, value in theirs.defaults.items():
        assert key == "decoupled_weight_decay" or optimizer.defaults[key] == value, key
    optimizer.defaults["foreach"] = True  # as some libraries do
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert [group["foreach"] for group in optimizer.param_groups] == [None, True]


@classes
@quantizers
def test_no_gradients_no_step(ours, quantizer):
    params, _ = problem()
    before = [weight.detach().clone() for weight in params]
    optimizer = (
        ours(params, lr=0.1, momentum=0.9, quantizer=quantizer)
        if ours is askew.AskewSGD
        else ours(params, quantizer=quantizer)
    )
    optimizer.step()
    assert optimizer.state_dict()["state"] == {}
    for weight, wanted in zip(params, before, strict=True):
        assert torch.equal(weight, wanted)
    for weight in params:
        weight.grad = torch.zeros_like(weight)
    optimizer.param_groups[0].update(weight_decay=0, clip=False)
    optimizer.step()
    for weight, wanted in zip(params, before, strict=True):
        assert torch.equal(weight, wanted)


@classes
@quantizers
def test_zero_grad(ours, quantizer):
    params, closure = problem()
    optimizer = ours(params, quantizer=quantizer, pretrained=True)
    run(optimizer, closure, 1)
    grad = params[0].grad
    optimizer.zero_grad(set_to_none=False)
    assert params[0].grad is grad
    assert not grad.any()
    optimizer.zero_grad()
    assert params[0].grad is None


@classes
@quantizers
def test_the_profiler_shows_the_step_by_its_name(ours, quantizer):
    params, closure = problem()
    optimizer = ours(params, quantizer=quantizer, pretrained=True)
    with torch.profiler.profile(acc_events=True) as profile:
        run(optimizer, closure, 1)
    names = {event.key for event in profile.key_averages()}
    kernel = "askew_cuda::sgd_" if ours is askew.AskewSGD else "askew_cuda::adamw_"
    assert {f"Optimizer.step#{ours.__name__}.step", f"Optimizer.zero_grad#{ours.__name__}.zero_grad", kernel} <= names


@classes
@quantizers
def test_copies_have_all_public_attributes_and_go_on_alike(ours, quantizer):
    params, closure = problem()
    optimizer = ours([("weight", params[0]), ("bias", params[1])], lr=0.1, quantizer=quantizer, pretrained=True)
    run(optimizer, closure, 3)

    def public(one) -> set[str]:
        return {key for key in vars(one) if not key.startswith("_")}

    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert public(other) == public(optimizer)
        assert repr(other) == repr(optimizer)
        assert other.defaults == optimizer.defaults
        assert str(other.state_dict()) == str(optimizer.state_dict())


@classes
def test_what_capturable_differentiable_and_fused_mean(ours):
    weight = nn.Parameter(torch.ones(2))
    # if torch offers more, decide on it here
    assert INFOS[PAIRS[ours]].supported_impls == ("foreach", "differentiable", "fused")
    with pytest.raises(ValueError, match="differentiable = True; the step is not differentiable"):
        ours([weight], differentiable=True)
    with pytest.raises(ValueError, match="foreach and fused exclude each other"):
        ours([weight], foreach=True, fused=True)
    with pytest.raises(RuntimeError, match="fused = True, but the pure PyTorch reference"):
        ours([weight], fused=True, backend="reference")
    if ours is askew.AskewAdamW:
        with pytest.raises(ValueError, match=r"capturable = True, but params\[0\] is on the CPU"):
            ours([weight], capturable=True)


@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_positional_arguments_are_torchs(rule):
    weight = nn.Parameter(torch.ones(2))
    arguments = (0.1, 0.9, 0.0, 0.01, True) if rule == "SGD" else (0.1, (0.5, 0.6), 1e-6, 0.1, True)
    mine, theirs = (
        getattr(askew, f"Askew{rule}")([weight], *arguments),
        getattr(torch.optim, rule)([weight], *arguments),
    )
    for key in set(theirs.defaults) - {"decoupled_weight_decay"}:
        assert mine.param_groups[0][key] == theirs.param_groups[0][key]


@classes
def test_a_subclass_is_an_optimizer_of_its_own_name(ours):
    mine = type("Mine", (ours,), {})
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = mine([weight], lr=0.5)
    optimizer.step()
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert repr(optimizer).startswith("Mine (")


@classes
@quantizers
def test_nothing_warns(ours, quantizer):
    """Deprecations among them, at construction, step, save and load."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for params, closure in itertools.repeat(problem(), 2):
            optimizer = ours(params, quantizer=quantizer, pretrained=True)
            run(optimizer, closure, 2)
            optimizer.load_state_dict(optimizer.state_dict())
            copy.deepcopy(optimizer).step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_steps_are_counted_in_torchs_dtype_whatever_the_default_is(dtype):
    (mine, closure), (theirs, their_closure) = problem(), problem()
    torch.set_default_dtype(dtype)
    try:
        optimizer, other = askew.AskewAdamW(mine, lr=0.01), torch.optim.AdamW(theirs, lr=0.01, foreach=False)
        run(optimizer, closure, 2), run(other, their_closure, 2)
        optimizer.load_state_dict(optimizer.state_dict())
        run(optimizer, closure, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    step, wanted = optimizer.state[mine[0]]["step"], other.state[theirs[0]]["step"]
    assert (step, step.dtype) == (3, wanted.dtype)
