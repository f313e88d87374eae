"""The Triton backend against the reference, bit for bit: in Triton's interpreter, and on a GPU where there is one."""

import inspect
import os
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch

import askew_cuda as askew
from askew_cuda import backends, doctor, optimizer, reference
from askew_cuda.checks import Call, check_call
from tests.cases import BACKENDS, CASES, PLAIN, REFERENCE, Backend, Case, build, call, case_id, run
from tests.compare import assert_close, assert_same_bits
from tests.gpu.triton_copies import Recorder, load, on_gpu, triton
from tests.step import test_backends, test_by_hand, test_golden

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAUNCHER = load(interpreted=True)


def checked(name):
    """As the library calls it."""

    def call(*lists, **settings) -> None:
        given = Call.of(name, *lists, **settings)
        check_call(given)
        LAUNCHER.make(given)

    return call


BLOCK = LAUNCHER.where.PROGRAMS["cpu"].block
TRITON = {"interpreted": Backend(checked("sgd_"), checked("adamw_"))}
if on_gpu():
    TRITON["cuda"] = Backend(*backends.operators("triton"), device="cuda")
on_all = pytest.mark.parametrize("name", TRITON)


def smaller(case: Case) -> Case:
    """The largest size is four blocks and less than a vector: interpreting takes its time."""
    return case if case.size < 1000 else case._replace(size=4 * BLOCK + 7)


@on_all
@pytest.mark.parametrize(
    "case",
    [smaller(case) for case in CASES if case.dtype in DTYPES],
    ids=case_id,
)
def test_triton_does_what_the_reference_does(case, name):
    expected, actual = run(case, REFERENCE), run(case, TRITON[name])
    assert actual.keys() == expected.keys()
    for key, values in expected.items():
        assert_same_bits(actual[key], values, key)


# Blocks of many scales, of two, and of one; counts that wrap around in a transposed weight; groups larger than a block.
SCALED = [(1, 3), (7, 100), (513, 2), (100, 7), (3, BLOCK), (2, 3 * BLOCK + 1), (40, 40)]


@on_all
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("rows", "run_length"), SCALED)
def test_every_weight_finds_its_scale(rows, run_length, groups, layout, name):
    generator = torch.Generator().manual_seed(0)
    start, grad = torch.randn(2, rows, groups * run_length, generator=generator)
    scale = torch.rand(rows, groups, generator=generator) + 0.1
    results = []
    for backend in (REFERENCE, TRITON[name]):
        weight = start.t().contiguous().t() if layout == "transposed" else start.clone()
        weight = weight.to(backend.device)
        snapped = torch.empty_like(weight)
        settings = {**PLAIN_SETTINGS, "lr": 0.1, "epsilon": 0.3}
        backend.sgd_(
            [weight], [grad.to(weight)], [], [scale.to(weight)], (-1.5, -0.5, 0.5, 1.5), [], [snapped], **settings
        )
        results.append((weight.cpu(), snapped.cpu()))
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_same_bits(actual, expected, f"{rows} rows, {groups} groups of {run_length}")


@on_all
@pytest.mark.parametrize("scale_shape", [(1, 5, 1), (1, 1, 6), (4, 1, 6), (2, 5, 6), (4, 5, 2), (2, 1, 3)], ids=str)
def test_scales_along_other_dimensions(scale_shape, name):
    generator = torch.Generator().manual_seed(0)
    start, grad = torch.randn(2, 4, 5, 6, generator=generator)
    scale, results = torch.rand(scale_shape, generator=generator) + 0.1, []
    for backend in (REFERENCE, TRITON[name]):
        weight = start.permute(2, 0, 1).contiguous().permute(1, 2, 0).to(backend.device)
        settings = {**PLAIN_SETTINGS, "lr": 0.1, "epsilon": 0.3}
        backend.sgd_([weight], [grad.to(weight)], [], [scale.to(weight)], (-1, 0, 1), [], [], **settings)
        results.append(weight.cpu())
    assert_same_bits(*results, "weights")


PLAIN_SETTINGS = {
    "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False, "anneal": "capture",
    "skew_at": "velocity", "recovery": 0.5, "alpha": None, "max_step": 0.5, "clip": True,
}  # fmt: skip


@on_all
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storage_is_rounded_to_nearest_even(dtype, name):
    """Snapped weights, scale * 1: between two numbers of the type, where ties go to the even one, subnormal ones, and
    beyond the last.
    """
    eps, tiny, device = torch.finfo(dtype).eps, torch.finfo(dtype).tiny, TRITON[name].device
    factors = [1 + eps * k / 8 for k in range(17)]
    values = [
        *factors,
        *(tiny * eps * x for x in (0.5, 0.75, 1.5, 2.5)),
        *(torch.finfo(dtype).max * x for x in factors[:5]),
    ]
    wanted = torch.tensor(values, dtype=torch.float64).float()
    assert wanted.isfinite().all()
    weight = wanted.reshape(-1, 1).to(device)
    snapped = torch.zeros(weight.shape, dtype=dtype, device=device)
    settings = PLAIN_SETTINGS | {"lr": 0.0, "epsilon": 0.0}
    TRITON[name].sgd_([weight], [torch.zeros_like(weight)], [], [weight.clone()], (0.0, 1.0), [], [snapped], **settings)
    assert_same_bits(snapped.cpu().reshape(-1), wanted.to(dtype), "snapped")
    assert snapped.isinf().sum() == 2  # from half a unit beyond the largest number on


@pytest.mark.parametrize(
    "test",
    [
        test_backends.test_a_nan_gradient_spoils_its_own_weight_and_its_code_is_zero,
        lambda name: [
            test_backends.test_found_inf_leaves_everything_as_it_is(name, rule) for rule in ("nesterov", "amsgrad")
        ],
        lambda name: [test_backends.test_a_grad_scale_is_divided_out(name, rule) for rule in ("maximize", "amsgrad")],
        lambda name: [
            test_backends.test_lr_and_epsilon_may_be_tensors_of_any_float_dtype(name, rule)
            for rule in ("nesterov", "amsgrad")
        ],
        lambda name: [
            test_by_hand.test_one_step(row, name, dtype) for row in test_by_hand.STEPS.values() for dtype in DTYPES
        ],
        lambda name: [
            test_by_hand.test_sgd(*row, (), name, dtype) for row in test_by_hand.SGD_STEPS.values() for dtype in DTYPES
        ],
        lambda name: [
            test_by_hand.test_adamw(*row, (), name, dtype)
            for row in test_by_hand.ADAMW_STEPS.values()
            for dtype in DTYPES
        ],
        lambda name: [test_by_hand.test_the_last_bit_of_the_way_is_taken_at_once(name, dtype) for dtype in DTYPES],
        test_by_hand.test_the_code_is_that_of_the_stored_weight,
        lambda name: test_golden.test_single_steps_of_the_specification(name, torch.float32),
    ],
    ids=["nan", "found_inf", "grad_scale", "tensors", "one step", "sgd", "adamw", "last bit", "code", "golden"],
)
def test_what_all_backends_are_tested_for(test, monkeypatch):
    monkeypatch.setitem(BACKENDS, "interpreted", TRITON["interpreted"])
    test("interpreted")


@on_all
@pytest.mark.parametrize("rule", ["nesterov", "amsgrad"])
@pytest.mark.parametrize("infinite", [1.0, float("nan")])
def test_found_inf_on_the_device_leaves_everything_as_it_is(infinite, rule, name):
    case = PLAIN._replace(rule=rule)
    untouched, lists = build(case).lists, build(case, TRITON[name].device).lists
    call(case, lists, TRITON[name], found_inf=torch.tensor(infinite, device=TRITON[name].device))
    for key, tensors in untouched.items():
        for i, tensor in enumerate(tensors):
            assert_same_bits(lists[key][i].cpu(), tensor, f"{key}[{i}]")


def test_numbers_and_weights_elsewhere_are_refused():
    lists = build(PLAIN).lists
    with pytest.raises(ValueError, match="epsilon is on meta but weights"):
        call(PLAIN, lists, TRITON["interpreted"], epsilon=torch.tensor(0.1, device="meta"))
    with pytest.raises(ValueError, match=r"weights\[0\] is on meta; this Triton steps cpu tensors"):
        call(
            PLAIN,
            {name: [tensor.to("meta") for tensor in tensors] for name, tensors in lists.items()},
            TRITON["interpreted"],
        )
    compiled = load(interpreted=False)
    with pytest.raises(ValueError, match=r"weights\[0\] is on cpu; this Triton steps cuda and xpu tensors"):
        call(PLAIN, lists, Backend(compiled.sgd_, compiled.adamw_))


@pytest.fixture
def counted(monkeypatch):
    """The interpreted launcher with its launches, layouts and tables counted; nothing is computed."""
    recorder, made = Recorder(LAUNCHER.step_kernel, compiles=False), Counter()

    def counting(name: str):
        maker = getattr(LAUNCHER.where, name)

        def make(*arguments):
            made[name] += 1
            return maker(*arguments)

        return make

    for name in ("make_layout", "make_table"):
        monkeypatch.setattr(LAUNCHER.where, name, counting(name))
    monkeypatch.setattr(LAUNCHER, "step_kernel", recorder)
    monkeypatch.setattr(LAUNCHER.where, "layouts", LAUNCHER.where.Latest(64))
    return recorder, lambda: (len(recorder.given), made["make_layout"], made["make_table"])


def test_a_call_is_one_launch_and_its_table_is_kept(counted):
    recorder, count = counted
    case = PLAIN._replace(rule="amsgrad", size=BLOCK)
    lists: dict[str, list] = {}
    for k in range(100):  # of three tensors each, one of them empty
        for key, tensors in build(case._replace(seed=k)).lists.items():
            lists.setdefault(key, []).extend(tensors)
    for lr in (0.1, 0.2, 0.3):
        call(case, lists, TRITON["interpreted"], lr=lr, epsilon=lr)
    assert count() == (3, 1, 1)
    assert recorder.given[0][0] == (100 * (3 + 1),)  # blocks: three of the 3 x BLOCK weights, one of the five
    kept = lists["grads"]
    for grads in ([grad.clone() for grad in kept], kept):  # as after zero_grad()
        call(case, lists | {"grads": grads}, TRITON["interpreted"])
        call(case, lists | {"grads": grads}, TRITON["interpreted"])
        assert count()[1:] == (1, 2)
    # another memory order: gradient and state are copied
    lists["weights"][0] = torch.empty(BLOCK, 3).t().copy_(lists["weights"][0])
    call(case, lists, TRITON["interpreted"])
    call(case, lists, TRITON["interpreted"])
    assert count() == (9, 3, 4)
    lists = {name: tensors[3:] for name, tensors in lists.items()}
    call(case, lists, TRITON["interpreted"])
    call(case, lists, TRITON["interpreted"])
    assert count() == (11, 4, 5)


@pytest.fixture
def plans(counted, monkeypatch):
    """How many plans optimizers of the interpreted backend have made."""
    made = []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("askew_cuda.triton.launch", LAUNCHER, raising=False)
    monkeypatch.setattr(optimizer, "Plan", lambda owner, make=optimizer.Plan: made.append(owner) or make(owner))
    backends._choose.cache_clear()
    yield lambda: len(made)
    backends._choose.cache_clear()


@pytest.mark.parametrize("ours", [askew.AskewSGD, askew.AskewAdamW])
def test_what_does_not_change_is_kept_from_step_to_step(ours, plans, counted):
    recorder, count = counted
    weights = [torch.nn.Parameter(torch.ones(4, 6)) for _ in range(3)]
    groups = [{"params": weights[:2], "quantizer": "ternary"}, {"params": weights[2:]}]
    optimizer = ours(groups, lr=0.1, backend="triton", pretrained=True, scale_lr=0, epsilon=0.5)
    gradients = [[torch.ones(4, 6) for _ in weights] for _ in range(2)]
    for step in range(1, 7):
        for weight, gradient in zip(weights, gradients[step > 3], strict=True):
            weight.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * step
        optimizer.step()
        tables = 2 if step <= 3 else 4  # of two groups; gradients have moved once
        assert (plans(), *count()) == (1, 2 * step, 2, tables)
        assert [given[1][2] for given in recorder.given[-2:]] == [0.1 * step] * 2
    weights[0].data = weights[0].data.clone()
    optimizer.step()
    assert (plans(), *count()) == (2, 14, 2, 5)


def test_what_optimizers_are_tested_for_between_steps_holds_here():
    """Two files of tests/optimizer, interpreted."""
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton"]
    command += ["tests/optimizer/test_changes.py", "tests/optimizer/test_main_grad.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert run.returncode == 0, run.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 100


def test_others_at_the_same_place_are_not_taken_for_those_before(counted):
    _, count = counted
    case = PLAIN._replace(granularity="tensor")
    lists = build(case).lists
    call(case, lists, TRITON["interpreted"])
    call(case, lists, TRITON["interpreted"])
    assert count() == (2, 1, 1)
    folded = {name: [t.view(-1, 1) if t.dim() == 1 else t for t in tensors] for name, tensors in lists.items()}
    call(case, folded, TRITON["interpreted"])
    assert count()[1] == 2


def test_what_is_kept_is_dropped_one_by_one(counted):
    _, count = counted
    every = [build(PLAIN._replace(size=size)).lists for size in range(1, 71)]
    for lists in [*every, *every[-64:]]:
        call(PLAIN, lists, TRITON["interpreted"])
    assert count()[1:] == (70, 70)
    assert len(LAUNCHER.where.layouts) == 64
    call(PLAIN, every[0], TRITON["interpreted"])
    assert count()[1:] == (71, 71)
    every = [build(PLAIN).lists for _ in range(9)]
    for lists in [*every, *every[-8:], every[0]]:
        call(PLAIN, lists, TRITON["interpreted"])
    assert count()[2] == 71 + 9 + 1  # a layout keeps eight tables


def test_a_graph_captures_what_was_seen_before(counted, monkeypatch):
    recorder, _ = counted
    lists = build(PLAIN).lists
    monkeypatch.setattr(LAUNCHER, "captured", [])
    call(PLAIN, build(PLAIN).lists, TRITON["interpreted"])  # others of the same layout
    monkeypatch.setattr(LAUNCHER.where, "capturing", lambda device: True)
    for case in (PLAIN, PLAIN._replace(size=34)):
        with pytest.raises(RuntimeError, match="no step has seen where they lie"):
            call(case, lists if case is PLAIN else build(case).lists, TRITON["interpreted"])
    assert len(recorder.given) == 1
    monkeypatch.setattr(LAUNCHER.where, "capturing", lambda device: False)
    call(PLAIN, lists, TRITON["interpreted"])
    monkeypatch.setattr(LAUNCHER.where, "capturing", lambda device: True)
    call(PLAIN, lists, TRITON["interpreted"])
    assert LAUNCHER.captured[0][:2] == recorder.given[-1][1][:2]  # table and map are kept for it


def test_a_stream_that_reads_what_is_kept_is_recorded(counted, monkeypatch):
    """Else what is dropped is overwritten while a launch on another stream still reads it."""
    recorder, _ = counted
    used = []
    monkeypatch.setattr(LAUNCHER, "in_use", lambda tensors, device: used.append((tensors, device)))
    call(PLAIN._replace(codebook="nf4"), build(PLAIN._replace(codebook="nf4")).lists, TRITON["interpreted"])
    table, owner, *_, book, _, _ = recorder.given[0][1]
    assert all(one is other for one, other in zip(used[0][0], (table, owner, book[-1]), strict=True))


def test_it_is_the_current_stream(monkeypatch):
    recorded = []
    one = types.SimpleNamespace(record_stream=recorded.append)
    device = types.SimpleNamespace(current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(torch, "get_device_module", lambda kind: device)
    LAUNCHER.in_use([one, one], torch.device("cpu"))
    assert recorded == []
    LAUNCHER.in_use([one, one], torch.device("cuda", 1))
    assert recorded == ["stream of cuda:1"] * 2


def test_nothing_is_launched_for_nothing(counted):
    recorder, _ = counted
    for operator in ("sgd_", "adamw_"):  # without weights nothing is looked at
        names = list(inspect.signature(getattr(reference, operator)).parameters)
        getattr(LAUNCHER, operator)(*([] for _ in names[: names.index("snapped") + 1]), momentum=0.9)
    weight = torch.zeros(3, 0)
    TRITON["interpreted"].sgd_(
        [weight], [weight], [], [torch.ones(3, 1)], (-1.0, 1.0), [], [], **PLAIN_SETTINGS, lr=0.1, epsilon=0.3
    )
    assert not recorder.given


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.99, 0.9999)])
def test_bias_corrections_of_steps_on_a_device_are_an_ulp_away_at_most(betas):
    counts = torch.cat([torch.arange(1000), torch.logspace(3, 7, 200).round()]).float()
    expected = [
        torch.tensor(each) for each in zip(*(host_corrections(count, betas) for count in counts.tolist()), strict=True)
    ]
    for device in ("cpu", *on_gpu()):
        for found, wanted in zip(LAUNCHER.device_bias_corrections(counts.to(device), *betas), expected, strict=True):
            assert found.dtype == torch.float32
            assert_close(found.cpu(), wanted.float(), 2**-23 * wanted.double(), f"{betas} on {device}")


@pytest.mark.parametrize("rule", ["adamw", "amsgrad"])
def test_a_step_with_a_devices_bias_corrections_is_bounded(rule, monkeypatch):
    """They are an ulp away at most, each factor of the direction: 2^-23 relative twice, and two roundings more."""
    case = PLAIN._replace(rule=rule, codebook="none", granularity="tensor", outputs=(), size=1000)
    expected = run(case, REFERENCE)
    monkeypatch.setattr(
        LAUNCHER,
        "bias_corrections",
        lambda steps, *betas: LAUNCHER.device_bias_corrections(torch.stack(steps), *betas[:2]),
    )
    for key, values in run(case, TRITON["interpreted"]).items():
        bound = 2**-21 * (values.abs().double() + case.lr * 100) if key.startswith("weights") else 0.0
        assert_close(values, expected[key], bound, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_on_a_device_stand_still_where_an_infinity_was_found(dtype):
    steps = [torch.tensor(float(count), dtype=dtype) for count in (0, 7)]
    for infinite, expected in (
        (0.0, [1, 8]),
        (torch.tensor(1.0), [1, 8]),
        (torch.tensor(0.0), [2, 9]),
        (torch.tensor(float("nan")), [2, 9]),
    ):
        LAUNCHER.count_steps(steps, infinite)
        assert [step.item() for step in steps] == expected


def host_corrections(count: float, betas: tuple[float, float]) -> tuple[float, float]:
    return LAUNCHER.bias_corrections([torch.tensor(count)], *betas, torch.device("cpu"))


TRAINING = """
import torch, askew_cuda as askew
from askew_cuda import backends

print("before:", "triton" in __import__("sys").modules)
results = []
for backend in ("cpu" if backends.extension else "reference", "triton"):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    quantized = {"params": [model[0].weight, model[2].weight], "quantizer": "ternary/channel", "outputs": ("codes",)}
    groups = [quantized, {"params": [model[0].bias, model[2].bias]}]
    rule = askew.AskewAdamW(groups, lr=torch.tensor(0.01), backend=backend)
    anneal = askew.Anneal(rule, total_steps=10)
    compiled = torch.compile(rule.step, backend="aot_eager") if backend == "triton" else rule.step
    for count in range(10):
        rule.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        compiled() if count > 7 else rule.step()
        anneal.step()
    print(repr(rule).count(f"runs on: {backend} for torch.float32 on cpu"), [w._version for w in model.parameters()])
    results.append([*model.parameters(), *(each["codes"] for each in rule.outputs.values())])
print("same:", all(torch.equal(a, b) for a, b in zip(*results, strict=True)), len(results[0]))
print("auto:", backends.choose("auto", torch.device("cpu"), torch.float32))
"""


def test_an_optimizer_trains_with_it():
    """As users get there: TRITON_INTERPRET in the environment, backend="triton"; "auto" is not led to an interpreter.
    The last steps are compiled, but for the launch.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", TRAINING], capture_output=True, text=True, env=environment, check=True
    )
    before, own, triton_, same, auto = run.stdout.splitlines()
    assert before == "before: False"
    assert triton_ == own
    assert own.startswith("2 [1")  # both groups; weights that know that they were changed
    assert same == "same: True 6"
    assert auto == "auto: cpu" if backends.extension else "auto: reference"


CUDA = torch.device("cuda")


def why(monkeypatch, device: torch.device | str = CUDA, dtype=torch.float32, **changes: object) -> str:
    """The reason of absent() on a machine with a GPU, which ``changes`` make another one."""
    machine = {
        "version": triton.__version__,
        "interpret": "",
        "available": True,
        "capability": (9, 0),
        "compiler": "gcc",
    } | changes
    monkeypatch.setenv("TRITON_INTERPRET", machine["interpret"])
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(backends, "triton_version", lambda: machine["version"])
    monkeypatch.setattr(backends.shutil, "which", lambda name: machine["compiler"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine["available"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: machine["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    return backends.absent("triton", torch.device(device), dtype)


def test_why_it_is_absent(monkeypatch):
    assert why(monkeypatch) == ""
    assert why(monkeypatch, "xpu") == ""
    assert why(monkeypatch, "cpu", interpret="1") == ""
    assert "TRITON_INTERPRET=1 is set before" in why(monkeypatch, "cpu")
    assert "TRITON_INTERPRET=1 is set: it steps CPU tensors only" in why(monkeypatch, interpret="1")
    assert "the weights are on mps" in why(monkeypatch, "mps")
    assert "compute in float32" in why(monkeypatch, dtype=torch.float64)
    assert "not supported" in why(monkeypatch, dtype=torch.int32)
    assert "triton is not installed" in why(monkeypatch, version="")
    assert "triton 3.6 or newer is needed, and 3.5.1 is installed" in why(monkeypatch, version="3.5.1")
    assert "torch finds no GPU" in why(monkeypatch, available=False)
    assert "compute capability 8.0, and Old GPU has less" in why(monkeypatch, capability=(7, 5))
    assert "a C compiler" in why(monkeypatch, compiler=None)


def test_the_doctor_tests_what_is_interpreted(monkeypatch, capsys):
    operators = backends.operators
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        backends,
        "operators",
        lambda name: backends.Operators(*TRITON["interpreted"][:2]) if name == "triton" else operators(name),
    )
    assert doctor.doctor() == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        "triton        present (interpreted on the CPU); self-test: 48 of 48 cases equal the reference bit for bit"
        in lines
    )


def test_auto_takes_it_on_a_gpu_without_cuda_kernels_and_says_why(monkeypatch):
    assert why(monkeypatch) == ""
    absent = backends.absent
    monkeypatch.setattr(
        backends, "absent", lambda backend, *kind: "no kernels" if backend == "cuda" else absent(backend, *kind)
    )
    backends._choose.cache_clear()  # what it has found before is of another machine
    assert (
        backends.explain("auto", CUDA, torch.float32) == "triton for torch.float32 on cuda (cuda is absent: no kernels)"
    )
    assert backends.explain("triton", CUDA, torch.float32) == "triton for torch.float32 on cuda"
    with pytest.raises(RuntimeError, match="backend = 'triton' is absent: it steps GPU tensors"):
        backends.choose("triton", torch.device("cpu"), torch.float32)
