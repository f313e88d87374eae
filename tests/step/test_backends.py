"""The backends against each other, bit for bit, over the table of cases."""

import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import torch

import askew_cuda.backends  # noqa: F401  registers the fake kernels
from askew_cuda import reference
from tests.cases import (
    ANNEALINGS,
    BACKENDS,
    CASES,
    CODEBOOKS,
    COMPILED,
    COVERING,
    FACTORS,
    LEARNING,
    PLAIN,
    PLANNED,
    REFERENCE,
    RULES,
    build,
    call,
    case_id,
    draw,
    on_threads,
    required,
    run,
)
from tests.compare import assert_same_bits

compiled = pytest.mark.skipif(not COMPILED, reason="ASKEW_BUILD=none: nothing is compiled")


def test_the_table_covers_what_it_says():
    names, wanted = required()
    seen = set()
    for case in COVERING:
        cells = [(factor, FACTORS[name].index(getattr(case, name))) for factor, name in enumerate(names)]
        seen.update(frozenset(some) for size in (2, 3) for some in itertools.combinations(cells, size))
    assert not set(wanted) - seen
    for name, values in FACTORS.items():
        left = set(values) - {getattr(case, name) for case in LEARNING}
        assert left == ({"none"} if name == "codebook" else set()), name
    assert len({case_id(case) for case in CASES}) == len(CASES)


def test_the_table_reaches_every_branch(monkeypatch):
    """Counts, by what the reference's skew is given and returns, the branches that the cases take."""
    count = Counter()

    def spy(skew):
        def spying(d, w, unit, book, h):
            out = skew(d, w, unit, book, h)
            at = reference.locate(w, unit, book)
            distance, cap = at.e.abs(), h.max_step * at.half
            outside = ((at.level == book.lowest) & (at.e > 0)) | ((at.level == book.highest) & (at.e < 0))
            seen = {
                "nan": out.isnan(),
                "unscaled": (unit == 0).expand_as(w),
                "midpoint": (distance == at.half) & ~outside & (distance > 0),
            }
            if skew is original["skew_capture"]:
                captured = distance < h.capture_radius * at.half
                lands = captured & (distance > 0) & (out == at.e)
                seen |= {
                    "free": ~captured & ~outside,
                    "free outside": ~captured & outside,
                    "on its level": captured & (distance == 0),
                }
                seen |= {
                    "the last bit": lands & (distance <= 2**-16 * at.half),
                    "no further than the level": lands & (d.abs() > distance),
                }
                seen |= {
                    "captured, as fast as d": captured & (out == d) & (distance > 0),
                    "captured, capped": captured & (out.abs() == cap),
                }
                seen |= {"captured, against d": captured & (out * d < 0)}
            else:
                half_width = h.root / (1 + torch.where(outside, 1 + h.root, 1 - h.root).sqrt())
                feasible = distance <= half_width * at.half
                kept, side = out == d, {"inside": ~outside, "outside": outside}
                for name, here in side.items():
                    seen |= {
                        f"feasible {name}": here & feasible & kept,
                        f"heals {name}": here & ~feasible & kept & (d != 0),
                    }
                    seen |= {
                        f"pulled {name}": here & ~feasible & ~kept,
                        f"pulled, capped {name}": here & ~kept & (out.abs() == cap),
                    }
            count.update({name: int(mask.sum()) for name, mask in seen.items()})
            return out

        return spying

    original = {name: getattr(reference, name) for name in ("skew_capture", "skew_interval")}
    for name, skew in original.items():
        monkeypatch.setattr(reference, name, spy(skew))
    for case in CASES:
        run(case, REFERENCE)
    rare = {name: seen for name, seen in count.items() if seen < 50}
    assert len(count) == 19, sorted(count)
    assert not rare


@compiled
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_cpu_does_what_the_reference_does(case):
    expected = run(case, REFERENCE)
    for threads, (name, backend) in itertools.product((1, 2), (COMPILED | PLANNED).items()):
        actual = run(case, on_threads(threads, backend))
        assert actual.keys() == expected.keys()
        for key, values in expected.items():
            assert_same_bits(actual[key], values, f"{name}, {threads} threads: {key}")


@compiled
@pytest.mark.parametrize("rule", ["momentum", "amsgrad"])
@pytest.mark.parametrize("name", COMPILED)
def test_three_hundred_small_tensors_in_one_call(rule, name):
    case = PLAIN._replace(rule=rule, layout="misaligned")
    together = {REFERENCE: {}, on_threads(2, COMPILED[name]): {}}
    for backend, lists in together.items():
        for k in range(100):  # of three tensors each, one of them empty
            for key, tensors in build(case._replace(seed=k, size=k % 41)).lists.items():
                lists.setdefault(key, []).extend(tensors)
        call(case, lists, backend)
    expected, actual = together.values()
    assert len(actual["weights"]) == 300
    for key, tensors in expected.items():
        for i, tensor in enumerate(tensors):
            assert_same_bits(actual[key][i], tensor, f"{key}[{i}]")


THREADS = """
import os, torch
from askew_cuda import _C

def tasks():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
# a chunk each, and too small for torch to use threads itself
weights, grads = ([torch.ones(30000) for _ in range(8)] for _ in range(2))
base = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
constraint = {"anneal": "capture", "skew_at": "velocity", "recovery": 0.5, "alpha": None, "max_step": 0.5, "clip": True}
number, before = torch.tensor(0.1, dtype=torch.float64), tasks()
empty = [[]] * 8
torch.ops.askew_cuda.sgd_(weights, grads, *empty, lr=number, epsilon=number, **base, **constraint)
print(tasks() - before)
"""


@compiled
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_call_uses_torchs_threads():
    """Otherwise all the comparisons on two threads would compare one thread with itself."""
    started = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True).stdout
    assert int(started) == 1


# Shapes of a weight and of its scale: per tensor, per channel, per group.
SCALE_SHAPES = [
    ((), ()), ((1,), ()), ((1,), (1,)), ((4, 6), (1, 1)),
    ((4,), (4,)), ((4, 1), (4, 1)), ((4, 6), (4, 1)), ((2, 3, 4), (2, 1)), ((2, 3, 4), (2, 1, 1)), ((2, 3, 1, 1), (2,
    1, 1, 1)),
    ((4, 6), (4, 3)), ((4, 6), (4, 6)), ((1, 6), (1, 3)), ((2, 3, 4), (2, 4)), ((2, 3, 4, 5), (2, 15)), ((5, 1, 7, 1),
    (5, 7)),
    ((3, 0), (3, 1)), ((0, 4), (0, 1)), ((2, 0), (2, 3)),
]  # fmt: skip


@compiled
@pytest.mark.parametrize(("shape", "scale_shape"), SCALE_SHAPES, ids=str)
def test_scales_belong_to_rows_and_groups_in_every_memory_order(shape, scale_shape):
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    scale = torch.rand(scale_shape, generator=generator) + 0.1
    settings = RULES["sgd"] | ANNEALINGS["capture"] | {"lr": 0.1, "epsilon": 0.3, "clip": True}
    for order in itertools.permutations(range(len(shape))):
        back, results = [order.index(dim) for dim in range(len(order))], []
        for backend in BACKENDS.values():
            weight = start.permute(order).clone(memory_format=torch.contiguous_format).permute(back)
            codes = torch.empty_like(weight, dtype=torch.uint8)
            backend.sgd_([weight], [grad], [], [scale], CODEBOOKS["2bit"], [codes], [], **settings)
            results.append((weight, codes))
        for weight, codes in results[1:]:
            assert_same_bits(weight, results[0][0], f"weights in memory order {order}")
            assert_same_bits(codes, results[0][1], f"codes in memory order {order}")


@pytest.mark.parametrize("name", BACKENDS)
def test_memory_beside_a_tensor_and_gradients_are_watched(name):
    """run() notices backends that write where they must not."""
    backend = BACKENDS[name]

    def careless(target: str, shift: int) -> Callable[..., None]:
        def sgd_(weights, grads, *rest, **settings) -> None:
            backend.sgd_(weights, grads, *rest, **settings)
            tensor = (weights if target == "weights" else grads)[0]
            tensor.as_strided((1,), (1,), tensor.storage_offset() + shift).fill_(3)

        return sgd_

    for target, shift in (("weights", -1), ("weights", 33), ("grads", -1), ("grads", 0)):
        with pytest.raises(AssertionError, match=rf"{target}\[0\]"):
            run(PLAIN._replace(granularity="tensor"), backend._replace(sgd_=careless(target, shift)))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_nan_gradient_spoils_its_own_weight_and_its_code_is_zero(name):
    backend = BACKENDS[name]
    for rule, annealing, epsilon in itertools.product(
        ("sgd", "amsgrad"), ("capture", "interval", "gradient"), (0.0, 0.3, 1.0)
    ):
        case = PLAIN._replace(rule=rule, annealing=annealing, epsilon=epsilon)
        clean, spoilt = build(case).lists, build(case).lists
        at = (torch.arange(3), torch.tensor([0, 17, 32]))
        spoilt["grads"][0][at] = float("nan")
        call(case, clean, backend)
        call(case, spoilt, backend)
        assert spoilt["weights"][0][at].isnan().all()
        assert not spoilt["codes"][0][at].any()
        assert spoilt["snapped"][0][at].isnan().all()
        clean["weights"][0][at] = float("nan")
        clean["codes"][0][at] = 0
        clean["snapped"][0][at] = float("nan")
        for key in ("weights", "codes", "snapped"):
            for i in range(3):
                assert_same_bits(spoilt[key][i], clean[key][i], f"{rule} {annealing}: {key}[{i}]")


@pytest.mark.parametrize("rule", ["nesterov", "amsgrad"])
@pytest.mark.parametrize("name", BACKENDS)
def test_found_inf_leaves_everything_as_it_is(name, rule):
    backend, case = BACKENDS[name], PLAIN._replace(rule=rule)
    untouched = build(case).lists
    lists = build(case).lists
    call(case, lists, backend, found_inf=1.0)
    for key, tensors in untouched.items():
        for i, tensor in enumerate(tensors):
            assert_same_bits(lists[key][i], tensor, f"{key}[{i}]")
    moved = run(case, backend, found_inf=0.0)
    for key, expected in run(case, backend).items():
        assert_same_bits(moved[key], expected, key)
    assert not torch.equal(moved["weights[0]"], untouched["weights"][0])


@pytest.mark.parametrize("rule", ["nesterov", "maximize", "amsgrad"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_grad_scale_is_divided_out(name, rule):
    backend, case = BACKENDS[name], PLAIN._replace(rule=rule)
    plain, scaled = build(case).lists, build(case).lists
    for grad in scaled["grads"]:
        grad.mul_(4096)  # a power of two: exactly
    call(case, plain, backend)
    call(case, scaled, backend, grad_scale=4096.0)
    for key in plain.keys() - {"grads"}:
        for i, tensor in enumerate(plain[key]):
            assert_same_bits(scaled[key][i], tensor, f"{key}[{i}]")


@pytest.mark.parametrize("rule", ["nesterov", "amsgrad"])
@pytest.mark.parametrize("name", BACKENDS)
def test_lr_and_epsilon_may_be_tensors_of_any_float_dtype(name, rule):
    backend, case = BACKENDS[name], PLAIN._replace(rule=rule, annealing="interval_alpha")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        lr, epsilon = torch.tensor(0.1, dtype=dtype), torch.tensor(0.3, dtype=dtype)
        given = run(case, backend, lr=lr, epsilon=epsilon, grad_scale=torch.tensor(3.0), found_inf=torch.tensor(0.0))
        for key, expected in run(case, backend, lr=lr.item(), epsilon=epsilon.item(), grad_scale=3.0).items():
            assert_same_bits(given[key], expected, f"{dtype}: {key}")


@pytest.mark.parametrize("name", [*COMPILED, *PLANNED])
@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_autograd_sees_that_weights_and_outputs_changed(rule, name):
    case = PLAIN._replace(rule=rule)
    lists = build(case).lists
    before = {key: [tensor._version for tensor in lists[key]] for key in ("weights", "codes", "snapped", "grads")}
    call(case, lists, (COMPILED | PLANNED)[name])
    for key, versions in before.items():
        for i, version in enumerate(versions):
            changed = lists[key][i]._version > version
            assert changed == (key != "grads"), f"{key}[{i}]"


@compiled
@pytest.mark.parametrize("utility", ["test_schema", "test_faketensor"])
@pytest.mark.parametrize("rounding", ["nearest", "remainder", "stochastic"])
@pytest.mark.parametrize("rule", ["momentum", "amsgrad"])
def test_opcheck(rule, rounding, utility):
    case = PLAIN._replace(
        rule=rule,
        rounding=rounding,
        dtype=torch.float32 if rounding == "nearest" else torch.bfloat16,
        wide_grad=rounding == "remainder",
        learns=rounding != "stochastic",
    )

    def check(*lists, lr, epsilon, grad_scale, remainders=(), growths=(), sums=(), **settings) -> None:
        scalars = {key: torch.tensor(value, dtype=torch.float64) for key, value in (("lr", lr), ("epsilon", epsilon))}
        operator = getattr(torch.ops.askew_cuda, "adamw_" if case.is_adamw else "sgd_").default
        lists = (*lists, *map(list, (remainders, growths, sums)))
        torch.library.opcheck(operator, lists, settings | scalars, test_utils=utility)

    call(case, build(case).lists, REFERENCE._replace(sgd_=check, adamw_=check))


def test_cases_are_drawn_alike_every_time():
    case = CASES[0]
    first = [drawn.values.clone() for drawn in draw(case)[0]]
    draw.cache_clear()
    for again, values in zip(draw(case)[0], first, strict=True):
        assert_same_bits(again.values, values, again.name)
