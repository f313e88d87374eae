"""Wrong calls of the operators: the message names the argument and its value, and nothing has changed."""

import re
from collections.abc import Callable

import pytest

from askew_cuda import backends
from askew_cuda.checks import Call, check_call
from tests.cases import COMPILED, PLAIN, Backend, build, call
from tests.compare import assert_same_bits


def _first(change: Callable) -> Callable:
    """Changes the first tensor of a list."""
    return lambda tensors: [change(tensors[0]), *tensors[1:]]


def _last(change: Callable) -> Callable:
    return lambda tensors: [*tensors[:-1], change(tensors[-1])]


SGD_LISTS = ("grads", "momentum_buffers", "codes", "snapped")
ADAMW_LISTS = ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
LISTS = [*(("momentum", name) for name in SGD_LISTS), *(("amsgrad", name) for name in ADAMW_LISTS)]
HALVES = {
    name: lambda tensors: [tensor.bfloat16() for tensor in tensors] for name in ("weights", "grads", "momentum_buffers")
}
# rule, what becomes of the lists of PLAIN (of three tensors), what else is passed, error, what its message says
WRONG = {
    **{
        f"{name} short": (rule, {name: lambda x: x[:2]}, {}, ValueError, f"{name} has 2 tensors for 3 weights")
        for rule, name in LISTS
    },
    **{
        f"{name} shape": (
            rule,
            {name: _last(lambda x: x.new_zeros(6))},
            {},
            ValueError,
            rf"{name}\[2\] has shape \[6\] but .* has \[5\]",
        )
        for rule, name in LISTS
    },
    **{
        f"{name} dtype": (
            rule,
            {name: _first(lambda x: x.short())},
            {},
            TypeError,
            rf"{name}\[0\] (is|has dtype) torch.int16",
        )
        for rule, name in LISTS
    },
    "weights integer": (
        "momentum",
        {"weights": lambda x: [w.int() for w in x]},
        {},
        TypeError,
        "weight has dtype torch.int32; float32, ",
    ),
    "weights complex": (
        "momentum",
        {"weights": lambda x: [w.cfloat() for w in x]},
        {},
        TypeError,
        "weight has dtype torch.complex64",
    ),
    "weights mixed": (
        "momentum",
        {"weights": _last(lambda x: x.double())},
        {},
        TypeError,
        r"weights\[2\] is torch.float64 but weights\[0\] is torch.float32",
    ),
    "snapped mixed": (
        "momentum",
        {"snapped": _last(lambda x: x.double())},
        {},
        TypeError,
        r"snapped\[2\] is torch.float64 but snapped\[0\] is torch.float32",
    ),
    "state too wide": (
        "momentum",
        {"momentum_buffers": lambda x: [b.double() for b in x]},
        {},
        TypeError,
        r"momentum_buffers\[0\] is torch.float64",
    ),
    "state mixed": (
        "momentum",
        HALVES | {"momentum_buffers": _first(lambda x: x.bfloat16())},
        {},
        TypeError,
        r"momentum_buffers\[1\] is torch.float32 but momentum_buffers\[0\] is torch.bfloat16",
    ),
    "no buffers": (
        "momentum",
        {"momentum_buffers": lambda _: []},
        {},
        ValueError,
        "momentum = 0.9 needs momentum_buffers",
    ),
    "no moments": ("amsgrad", {"exp_avgs": lambda _: []}, {}, ValueError, "needs exp_avgs and exp_avg_sqs"),
    "no maxima": (
        "amsgrad",
        {"max_exp_avg_sqs": lambda _: []},
        {},
        ValueError,
        "amsgrad = True but max_exp_avg_sqs has 0",
    ),
    "maxima without amsgrad": (
        "amsgrad",
        {},
        {"amsgrad": False},
        ValueError,
        "amsgrad = False but max_exp_avg_sqs has 3",
    ),
    "steps short": ("amsgrad", {"steps": lambda x: x[:1]}, {}, ValueError, "steps has 1 tensors for 3 weights"),
    "steps dtype": ("amsgrad", {"steps": _last(lambda x: x.long())}, {}, TypeError, r"steps\[2\] is .*torch.int64"),
    "steps shape": (
        "amsgrad",
        {"steps": _last(lambda x: x.expand(2))},
        {},
        TypeError,
        r"steps\[2\] is .* of shape \[2\]",
    ),
    "scales short": ("momentum", {"scales": lambda x: x[:1]}, {}, ValueError, "scales has 1 tensors; 3 are needed"),
    "scales shape": (
        "momentum",
        {"scales": _first(lambda x: x[:2])},
        {},
        ValueError,
        r"scales\[0\] has shape \[2, 1\] .* \[3, 33\]",
    ),
    "scales groups": (
        "momentum",
        {"scales": _first(lambda x: x.expand(3, 2))},
        {},
        ValueError,
        r"scales\[0\] has shape \[3, 2\]",
    ),
    "scales in a list": (
        "momentum",
        {"scales": _last(lambda x: x.expand(2))},
        {},
        ValueError,
        r"scales\[2\] has shape \[2\]",
    ),
    "scales dtype": (
        "momentum",
        {"scales": _last(lambda x: x.double())},
        {},
        TypeError,
        r"scales\[2\] has dtype torch.float64; torch.float32",
    ),
    "scales half": (
        "momentum",
        HALVES | {"scales": _first(lambda x: x.bfloat16())},
        {},
        TypeError,
        r"scales\[0\] has dtype torch.bfloat16; torch.float32",
    ),
    "scales without levels": (
        "momentum",
        {"codes": lambda _: [], "snapped": lambda _: []},
        {"levels": []},
        ValueError,
        "scales has 3 tensors; 0",
    ),
    "outputs without levels": (
        "momentum",
        {"scales": lambda _: []},
        {"levels": []},
        ValueError,
        "codes and snapped need levels",
    ),
    "one level": ("momentum", {}, {"levels": [1.0]}, ValueError, "levels has 1 entries; 2 to 256"),
    "257 levels": (
        "momentum",
        {},
        {"levels": [float(k) for k in range(257)]},
        ValueError,
        "levels has 257 entries; 2 to 256",
    ),
    "levels repeated": (
        "momentum",
        {},
        {"levels": [0.0, 1.0, 1.0]},
        ValueError,
        r"levels\[2\] = 1 is not above levels\[1\] = 1",
    ),
    "levels falling": (
        "amsgrad",
        {},
        {"levels": [1.0, -1.0]},
        ValueError,
        r"levels\[1\] = -1 is not above levels\[0\] = 1",
    ),
    "levels in double": (
        "momentum",
        {},
        {"levels": [0.0, 0.3]},
        ValueError,
        r"levels\[1\] = 0.3 is not a float32 number",
    ),
    "level nan": ("momentum", {}, {"levels": [0.0, float("nan")]}, ValueError, r"levels\[1\] = nan"),
    "both rates": ("momentum", {}, {"alpha": 1.0}, ValueError, "recovery or alpha, not both"),
    "no rate": ("amsgrad", {}, {"recovery": None}, ValueError, "recovery or alpha, not both and not neither"),
    "gradient, capture": (
        "momentum",
        {},
        {"skew_at": "gradient", "alpha": 1.0, "recovery": None},
        ValueError,
        "skew_at = 'gradient' needs",
    ),
    "gradient, recovery": (
        "momentum",
        {},
        {"skew_at": "gradient", "anneal": "interval"},
        ValueError,
        "skew_at = 'gradient' needs alpha",
    ),
    "anneal": ("momentum", {}, {"anneal": "captured"}, ValueError, "anneal = 'captured'; 'interval' or 'capture'"),
    "skew_at": ("amsgrad", {}, {"skew_at": "weight"}, ValueError, "skew_at = 'weight'; 'gradient' or 'velocity'"),
}
for rule, name in [*LISTS, ("momentum", "scales")]:
    message = rf"{name}\[0\] is on meta but weights\[0\] is on cpu"
    WRONG[f"{name} on meta"] = (rule, {name: _first(lambda x: x.to("meta"))}, {}, ValueError, message)
# The last of three: when it is refused, the first two must not have moved.
WRONG["weights overlapping"] = (
    "momentum",
    {"weights": _last(lambda x: x[:1].expand(5))},
    {},
    ValueError,
    r"weights\[2\]",
)


def refused(wrong: tuple, backend: Backend) -> str:
    """What the backend says; it has raised the error that it should, and has changed nothing."""
    rule, changes, settings, error, _ = wrong
    case = PLAIN._replace(rule=rule)
    lists = build(case).lists
    for key, change in changes.items():
        lists[key] = change(lists[key])
    before = {key: [tensor.clone() for tensor in tensors] for key, tensors in lists.items()}
    with pytest.raises(error) as caught:
        call(case, lists, backend, **settings)
    for key, tensors in before.items():
        for i, tensor in enumerate(tensors):
            if not tensor.is_meta:
                assert_same_bits(lists[key][i], tensor, f"{key}[{i}]")
    return str(caught.value)


@pytest.mark.parametrize("name", ["reference", *(["cpu"] if backends.extension else [])])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_call_names_the_argument_and_changes_nothing(wrong, name):
    assert re.search(wrong[-1], refused(wrong, Backend(*backends.operators(name))))


@pytest.mark.parametrize("name", [*COMPILED][-1:])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_the_operator_by_itself_refuses_it_too(wrong, name):
    """In its own words: whoever calls torch.ops.askew_cuda directly must not get beyond the tensors' memory."""
    refused(wrong, COMPILED[name])


def test_names_are_asked_for_when_something_is_wrong():
    """There may be thousands, and a list of them takes as long as all the rest."""

    def names() -> list[str]:
        raise AssertionError("names were asked for")

    lists = build(PLAIN).lists
    given = []
    keep = lambda name: lambda *lists, **settings: given.append(Call.of(name, *lists, **settings))  # noqa: E731
    call(PLAIN, lists, Backend(keep("sgd_"), keep("adamw_")))
    check_call(given[0], names)
