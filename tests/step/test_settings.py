"""The scalars of the method are listed once in Python and once in C++, and every other list follows from these two."""

import inspect

import pytest
import torch

from askew_cuda import backends, checks, keywords, plan, reference

needs_extension = pytest.mark.skipif(backends.extension is None, reason="the compiled extension is not built")


@needs_extension
@pytest.mark.parametrize("operator", ["sgd_", "adamw_"])
def test_schemas_have_the_reference_s_settings(operator):
    arguments = getattr(torch.ops.askew_cuda, operator).default._schema.arguments
    keywords_only = {argument.name for argument in arguments if argument.kwarg_only}
    assert keywords_only == {*checks.OF_BOTH, *checks.OF_RULE[operator], "found_inf", *checks.ROUNDING}
    lists = [argument.name for argument in arguments if not argument.kwarg_only]
    signature = inspect.signature(getattr(reference, operator)).parameters
    positional = [name for name, each in signature.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    assert lists == [*positional, "remainders", "growths", "sums"]


@needs_extension
@pytest.mark.parametrize("operator", ["sgd_", "adamw_"])
def test_numbers_are_numbers_and_flags_are_flags(operator):
    kinds = {float: "float", bool: "bool", str: "str", float | None: "Optional[float]"}
    for argument in getattr(torch.ops.askew_cuda, operator).default._schema.arguments:
        kind = reference.Settings.__annotations__.get(argument.name)
        if kind in kinds:
            assert str(argument.type) in (kinds[kind], f"Optional[{kinds[kind]}]"), argument.name


def test_groups_and_plans_take_them_from_there():
    assert set(plan.SHARED) | {"grad_scale"} == set(checks.OF_BOTH)
    assert set(plan.SHARED) <= set(keywords.KEYWORDS)
    rules = [name for names in checks.OF_RULE.values() for name in names]
    assert {*checks.OF_BOTH, *rules} == set(reference.Settings._fields)


@pytest.mark.parametrize("backend", ["reference", *(["cpu"] if backends.extension else [])])
def test_a_setting_that_is_missing_or_unknown_is_named(backend):
    weight = torch.ones(3)
    settings = {"lr": 0.1, "weight_decay": 0.0, "maximize": False, "epsilon": 1.0, "anneal": "capture",
                "skew_at": "velocity", "recovery": 0.5, "alpha": None, "max_step": 0.5, "clip": True}  # fmt: skip
    with pytest.raises(TypeError, match="missing: dampening, momentum, nesterov, unknown: beta1"):
        backends.operators(backend).sgd_([weight], [weight], [], [], [], [], [], **settings, beta1=0.9)
    assert weight.tolist() == [1.0] * 3
