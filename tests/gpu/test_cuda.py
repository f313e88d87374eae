"""The CUDA backend on a GPU: the reference's results bit for bit, nothing waits, one launch, graphs that anneal."""

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch

import askew_cuda as askew
from askew_cuda import backends, look, scales
from askew_cuda.packed import bits
from askew_cuda.quantizer import Codebook
from tests.cases import ANNEALINGS, CASES, CUDA, PLAIN, REFERENCE, RULES, Backend, build, call, case_id, run
from tests.compare import assert_close, assert_same_bits
from tests.layers import test_look, test_scales

if not CUDA:
    pytest.skip("no GPU that torch can use, or an extension without CUDA kernels", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),  # of captures that are refused
]
BACKEND = CUDA["cuda"]
CHECKED = Backend(*backends.operators("cuda"), device="cuda")  # as the library calls it
ADAMW = [name for name, rule in RULES.items() if "beta1" in rule]


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """torch raises where its own operations would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def there(value: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, device="cuda")


def same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float | None = None) -> None:
    assert actual.keys() == expected.keys()
    for key, values in expected.items():
        if bound is None or not values.is_floating_point():
            assert_same_bits(actual[key], values, key)
        else:
            finite = values.isfinite()
            assert torch.equal(actual[key].isfinite(), finite), key
            assert_close(
                actual[key][finite].double(),
                values[finite].double(),
                bound * values[finite].double().abs() + 1e-30,
                key,
            )


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_gpu_does_what_the_reference_does(case):
    same(run(case, BACKEND), run(case, REFERENCE))


@pytest.mark.parametrize("levels", [(-1, 0, 1), (0, 1), (-1, 0), (-2, -1, 0.25), (-3, -1, -0.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [askew.AskewSGD, askew.AskewAdamW])
def test_a_zero_keeps_its_sign(kind, dtype, levels):
    """Pruning leaves weights of -0, and a GPU's minimum and maximum tell the two zeros apart."""
    signs = torch.tensor([0.0, -0.0])
    found = []
    for device, backend in (("cpu", "reference"), ("cuda", "auto")):
        weight = torch.nn.Parameter(signs.repeat(64).to(device, dtype))
        weight.grad = signs.repeat_interleave(2).repeat(32).to(device, dtype)
        momentum = {"momentum": 0.9} if kind is askew.AskewSGD else {}
        quantizer = askew.Quantizer(levels, scale=0.5)
        optimizer = kind(
            [weight], lr=0.1, weight_decay=0.0, quantizer=quantizer, epsilon=0.5, backend=backend, **momentum
        )
        for _ in range(3):
            optimizer.step()
        found.append(weight.detach().cpu())
    assert_same_bits(found[1], found[0], "weight")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("annealing", ["capture", "capture_alpha", "interval", "gradient"])
def test_numbers_may_live_on_the_device(rule, annealing):
    case = PLAIN._replace(rule=rule, annealing=annealing, grad_scale=1024.0)
    expected = run(case, REFERENCE)
    numbers = {
        "lr": there(case.lr, torch.float32),
        "epsilon": there(case.epsilon),
        "grad_scale": there(1024.0, torch.float32),
    }
    lists = build(case, "cuda").lists
    found_inf = None if "beta1" in RULES[rule] else there(0.0, torch.float32)
    with nothing_waits():
        call(case, lists, BACKEND, found_inf=found_inf, **numbers)
    for key, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            if f"{key}[{i}]" in expected:
                assert_same_bits(tensor.cpu(), expected[f"{key}[{i}]"], key)


@pytest.mark.parametrize("rule", RULES)
def test_found_inf_on_the_device_leaves_all_as_it_is(rule):
    case = PLAIN._replace(rule=rule)
    lists = build(case, "cuda").lists
    lists["steps"] = [step.cuda() for step in lists["steps"]]
    before = {key: [tensor.clone() for tensor in tensors] for key, tensors in lists.items()}
    call(case, lists, BACKEND, found_inf=there(1.0, torch.float32))
    for key, tensors in before.items():
        for i, tensor in enumerate(tensors):
            assert_same_bits(lists[key][i], tensor, key)


# 1 / (1 - beta^t) from a device's pow: 2 ulp of double in pow, as much again in the division and the root; then it is
# rounded to the arithmetic type, where it may fall on the other side: one ulp. It goes into the displacement once, and
# that is rounded once more.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 4 * 2**-24), (torch.float64, 64 * 2**-53)])
@pytest.mark.parametrize("rule", ADAMW)
def test_step_counters_on_the_device_change_the_last_bits_at_most(rule, dtype, bound):
    case = PLAIN._replace(rule=rule, dtype=dtype, codebook="none", granularity="tensor", outputs=(), seed=3)
    expected = run(case, REFERENCE)
    lists = build(case, "cuda").lists
    before = [weight.clone() for weight in lists["weights"]]
    lists["steps"] = [step.to("cuda", torch.float32) for step in lists["steps"]]
    call(case, lists, BACKEND)
    for i, step in enumerate(lists["steps"]):
        assert float(step) == float(expected[f"steps[{i}]"])
        wanted = expected[f"weights[{i}]"].double()
        largest = torch.maximum(wanted.abs(), before[i].cpu().double().abs())
        assert_close(lists["weights"][i].cpu(), wanted, bound * largest + 1e-30, f"weights[{i}]")


def parameters(count: int, size: int = 1000) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(size, generator=generator).cuda() * 0.1) for _ in range(count)]
    for parameter in made:
        parameter.grad = torch.randn(size, generator=generator).cuda() * 0.01
    return made


def kernels(work) -> list[str]:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profile:
        work()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and "kernel" in event.name
    ]


@pytest.mark.parametrize("count", [1, 20, 1000])
def test_one_launch_for_a_list_and_nothing_else_on_the_device(count):
    optimizer = askew.AskewSGD(
        parameters(count), lr=0.1, momentum=0.9, quantizer="4bit", pretrained=True, outputs=("codes",)
    )
    optimizer.step()
    optimizer.step()
    names = kernels(optimizer.step)
    assert len(names) == 1
    assert "step_kernel" in names[0]


@pytest.mark.parametrize("count", [3, 100])
@pytest.mark.parametrize("kind", [askew.AskewSGD, askew.AskewAdamW])
def test_once_it_is_prepared_nothing_waits(kind, count):
    optimizer = kind(parameters(count), lr=0.1, quantizer="ternary", pretrained=True)
    anneal = askew.Anneal(optimizer, total_steps=100)
    optimizer.prepare()
    with nothing_waits():
        for _ in range(3):
            optimizer.step()
            anneal.step()


@pytest.mark.parametrize("count", [3, 100])
def test_gradients_that_move_are_followed(count):
    """With set_to_none, every backward pass allocates gradients anew: the table of spans must be built again."""
    here, there_ = (
        [torch.nn.Parameter(p.detach().to(device)) for p in parameters(count)] for device in ("cpu", "cuda")
    )
    optimizers = [
        askew.AskewSGD(each, lr=0.1, momentum=0.9, quantizer="binary", pretrained=True, epsilon=0.3)
        for each in (here, there_)
    ]
    generator, kept = torch.Generator().manual_seed(1), []
    for _ in range(4):
        for mine, theirs in zip(here, there_, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            kept.append(theirs.grad)  # so that its memory is not used again
            theirs.grad = mine.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    for i, (mine, theirs) in enumerate(zip(here, there_, strict=True)):
        assert_same_bits(theirs.detach().cpu(), mine.detach(), f"weights[{i}]")


def test_the_current_stream_is_used():
    """A step that ran on another stream would not wait for the gradient."""
    weight = torch.nn.Parameter(torch.zeros(1 << 20, device="cuda"))
    optimizer = askew.AskewSGD([weight], lr=1.0)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        weight.grad.fill_(1.0)
        optimizer.step()
        result = weight.detach().clone()
    torch.cuda.synchronize()
    assert bool((result == -1).all())


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("count", [3, 60])
def test_a_captured_graph_anneals_and_follows_the_schedule(kind, count):
    """Replays against eager steps with the same numbers: bit for bit, AdamW with its counters on the device in both."""
    results = []
    for captured in (False, True):
        weights = parameters(count)
        lr, epsilon = there(0.1), there(1.0)
        quantized = {"lr": lr, "quantizer": "2bit", "pretrained": True, "epsilon": epsilon}
        if kind == "sgd":
            optimizer = askew.AskewSGD(weights, momentum=0.9, **quantized)
        else:
            optimizer = askew.AskewAdamW(weights, capturable=True, **quantized)
        anneal = askew.Anneal(optimizer, total_steps=20, hold=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for _ in range(12):
            anneal.step()
            scheduler.step()
            graph.replay() if captured else optimizer.step()
        results.append([weight.detach().clone() for weight in weights])
    for i, (eager, replayed) in enumerate(zip(*results, strict=True)):
        assert_same_bits(replayed, eager, f"weights[{i}]")


# What is wrong when a capture begins, how far the optimizer is then, and the message.
@pytest.mark.parametrize(
    ("keywords", "before", "message"),
    [
        ({"epsilon": 1.0}, "step", "epsilon = 1.0: the graph would never anneal"),
        ({}, "nothing", "Step once before the capture"),
        ({}, "prepare", "would set up exp_avg: every replay"),
        ({"capturable": False}, "step", "capturable = False: the step would never be counted"),
        ({"epsilon": 1.0, "total_steps": 100}, "step", "a replay counts no step"),
        ({"low_precision": "stochastic"}, "step", "every replay would round by the same random bits"),
    ],
    ids=["epsilon", "new", "prepared", "capturable", "total_steps", "seed"],
)
def test_a_capture_that_would_go_wrong_is_refused(keywords, before, message):
    weights = [torch.nn.Parameter(each.detach().bfloat16()) for each in parameters(2)]
    for weight in weights:
        weight.grad = torch.full_like(weight, 0.5)
    keywords = {"epsilon": there(1.0), "capturable": True} | keywords
    optimizer = askew.AskewAdamW(weights, quantizer="binary", pretrained=True, lr=0.1, **keywords)
    if before != "nothing":
        getattr(optimizer, before)()
    torch.cuda.synchronize()
    kept = [weight.detach().clone() for weight in weights]
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    for weight, old in zip(weights, kept, strict=True):
        assert_same_bits(weight.detach().cpu(), old.cpu(), "weights")


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("kind", [askew.AskewSGD, askew.AskewAdamW])
def test_gradscaler_on_the_gpu_skips_and_counts_as_torchs_optimizer_does(kind, fused):
    """No step with an infinity counts, the first one included; with fused=True the device alone knows."""
    weights = parameters(3)
    optimizer = kind(weights, lr=0.1, quantizer="ternary", pretrained=True, fused=fused)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    scaler.scale(torch.zeros((), device="cuda"))  # makes its scale
    taken = []
    for overflow in (True, False, True, False):
        before = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.grad = torch.full_like(weight, math.inf if overflow else 0.5)
        scaler.step(optimizer)
        scaler.update()
        taken.append([bool((weight != old).any()) for weight, old in zip(weights, before, strict=True)])
    assert taken == [[False] * 3, [True] * 3, [False] * 3, [True] * 3]
    if kind is askew.AskewAdamW:
        steps = [optimizer.state[weight]["step"] for weight in weights]
        assert [float(step) for step in steps] == [2.0, 2.0, 2.0]
        assert steps[0].device == (weights[0].device if fused else torch.device("cpu"))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_streams_that_take_turns_do_not_share_what_is_kept(backend):
    """Each step on the other stream, with gradients that lie elsewhere, while the stream before is still at work."""
    reason = backends.absent(backend, torch.device("cuda"), torch.float32)
    if reason:
        pytest.skip(reason)
    here, there_ = ([torch.nn.Parameter(p.detach().to(device)) for p in parameters(60)] for device in ("cpu", "cuda"))
    optimizers = [
        askew.AskewSGD(each, lr=0.1, momentum=0.9, quantizer="2bit", pretrained=True, epsilon=0.3, backend=name)
        for each, name in ((here, "auto"), (there_, backend))
    ]
    streams, generator = [torch.cuda.Stream(), torch.cuda.Stream()], torch.Generator().manual_seed(1)
    torch.cuda.synchronize()
    for k in range(8):
        now, last = streams[k % 2], streams[1 - k % 2]
        now.wait_stream(last)
        with torch.cuda.stream(now):
            torch.cuda._sleep(1_000_000)
            for mine, theirs in zip(here, there_, strict=True):
                mine.grad = torch.randn(mine.shape, generator=generator)
                theirs.grad = mine.grad.cuda()
            for optimizer in optimizers:
                optimizer.step()
    torch.cuda.synchronize()
    for i, (mine, theirs) in enumerate(zip(here, there_, strict=True)):
        assert_same_bits(theirs.detach().cpu(), mine.detach(), f"weights[{i}]")


def test_more_than_two_to_the_31_weights():
    size = (1 << 31) + 12345
    if torch.cuda.mem_get_info()[0] < 6 * size:
        pytest.skip(f"needs {6 * size / 2**30:.0f} GiB of GPU memory")
    weight = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    grad = torch.zeros_like(weight)
    grad[-3:] = -1.0
    codes = torch.zeros(size, dtype=torch.uint8, device="cuda")
    scale = torch.ones((), device="cuda")
    settings = RULES["sgd"] | ANNEALINGS["capture"] | {"epsilon": 1.0, "max_step": math.inf, "clip": True}
    backends.operators("cuda").sgd_([weight], [grad], [], [scale], [-1.0, 0.0, 1.0], [codes], [], lr=1.0, **settings)
    assert weight[-4:].tolist() == [0.0, 1.0, 1.0, 1.0]
    assert codes[-4:].tolist() == [1, 2, 2, 2]
    assert int(codes[:-3].max()) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_several_gpus_in_one_optimizer():
    weights = [torch.nn.Parameter(torch.ones(100, device=f"cuda:{i}")) for i in range(2)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    askew.AskewSGD(weights, lr=0.25).step()
    assert all(weight.tolist() == [0.75] * 100 for weight in weights)


# By the library's own check, and by that of the operators.
@pytest.mark.parametrize(
    ("backend", "message"),
    [(CHECKED, r" is on cpu but weights\[1\] is on cuda:0; move it there"), (BACKEND, " is ")],
    ids=["checked", "operators"],
)
@pytest.mark.parametrize("name", ["grads", "momentum_buffers", "scales", "codes", "snapped"])
def test_tensors_on_two_devices_are_refused(name, backend, message):
    lists = build(PLAIN, "cuda").lists
    lists[name][1] = lists[name][1].cpu()
    before = [weight.clone() for weight in lists["weights"]]
    with pytest.raises((ValueError, TypeError), match=rf"{name}\[1\]{message}"):
        call(PLAIN, lists, backend)
    for i, weight in enumerate(before):
        assert_same_bits(lists["weights"][i], weight, f"weights[{i}]")


BOOKS = ["binary", "ternary", "4bit", "nf4", "int8"]


@pytest.mark.parametrize("dtype", test_look.DTYPES, ids=str)
@pytest.mark.parametrize("spec", [f"{book}{rows}" for book in BOOKS for rows in ("", "/channel", "/group6")])
def test_what_weights_are_beside_their_levels(spec, dtype):
    """Codes, plain and packed, snapped weights, counts and sums, and weights of packed codes, as on the CPU."""
    for shape in (*test_look.SHAPES, (70, 3000)):
        weight, scale, levels = test_look.draw(shape, spec, dtype)
        here, beside = (weight, scale), (weight.cuda(), scale.cuda())
        for function in (look.codes, look.snap):
            assert_same_bits(function(*beside, levels).cpu(), function(*here, levels), function.__name__)
        in_place = beside[0].clone()
        look.snap_(in_place, beside[1], levels)
        assert_same_bits(in_place.cpu(), look.snap(*here, levels), "in place")
        width = bits.width(len(levels))
        packed = [look.packed_codes(*each, levels, *bits.PACKINGS[width]) for each in (here, beside)]
        assert_same_bits(packed[1].cpu(), packed[0], "packed")
        restored = [torch.empty_like(each[0]) for each in (here, beside)]
        for to, codes, each in zip(restored, packed, (here, beside), strict=True):
            bits.restore_(to, codes, width, each[1], levels)
        assert_same_bits(restored[1].cpu(), restored[0], "restored")
        earlier = torch.zeros(weight.numel(), dtype=torch.uint8)
        now = [earlier.clone(), earlier.cuda()]
        counts = [look.counting(*each, levels, 0.25, to, True)() for each, to in zip((here, beside), now, strict=True)]
        assert counts[0] == counts[1]
        assert_same_bits(now[1].cpu(), now[0], "codes")


FEW_ROWS = [
    (shape, book, dtype) for shape in ((3, 1), (5, 17), (70, 130)) for book in BOOKS for dtype in test_look.DTYPES
]
LONG_ROWS = [((2, 45000), book, torch.float32) for book in BOOKS] + [((300, 21000), "ternary", torch.bfloat16)]


@pytest.mark.parametrize(("shape", "book", "dtype"), FEW_ROWS + LONG_ROWS, ids=str)
def test_the_same_scales_are_found(shape, book, dtype):
    """By a block of threads for each row, and by many for each of few long ones."""
    rows = test_scales.draw("heavy", *shape, seed=1).to(dtype)
    rows[1] = 0
    found = [scales.min_mse(each, Codebook.named(book)) for each in (rows, rows.cuda(), rows.T.contiguous().cuda().T)]
    assert found[1].device == rows.cuda().device
    assert_same_bits(found[1].cpu(), found[0], "scales")
    assert_same_bits(found[2].cpu(), found[0], "scales of rows that lie side by side")


def test_a_monitor_does_not_wait_in_the_step():
    weights = parameters(3)
    optimizer = askew.AskewSGD(weights, lr=0.1, quantizer="ternary", pretrained=True)
    watch = askew.monitor(optimizer, every=1)
    optimizer.prepare()
    with nothing_waits():
        for _ in range(3):
            optimizer.step()
    assert [step for step, _ in watch.history] == [1, 2, 3]
    last = watch.history[-1][1]["all"]
    assert last.share_on_level == watch.sample()["all"].share_on_level
    assert last.flips is not None


def test_host_counters_with_a_device_side_overflow_are_refused():
    case = PLAIN._replace(rule="adamw")
    lists = build(case, "cuda").lists
    with pytest.raises(ValueError, match="keep the steps with the weights"):
        call(case, lists, BACKEND, found_inf=there(0.0, torch.float32))


def test_auto_takes_the_gpu():
    assert backends.choose("auto", torch.device("cuda:0"), torch.float32) == "cuda"
