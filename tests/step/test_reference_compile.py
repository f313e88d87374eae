"""The reference under torch's switches: compiled, where it must be one graph, and with another default device."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from askew_cuda import reference
from tests.cases import CASES, PLAIN, REFERENCE, STATES, Backend, Case, build, call, case_id
from tests.compare import assert_same_bits

# torch's own, from inside of its compiler
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
WRITTEN = ("weights", *STATES, "steps", "codes", "snapped", "remainders")
ADAMW = PLAIN._replace(rule="amsgrad", annealing="interval", codebook="nf4", granularity="group")
CHANCE = PLAIN._replace(dtype=torch.bfloat16, rounding="stochastic")


def selection() -> list[Case]:
    """Small cases, in which every value occurs of every factor that the reference branches on."""
    factors = ("dtype", "rule", "codebook", "granularity", "annealing", "outputs", "clip", "grad_scale", "rounding")
    seen: set[tuple[str, object]] = set()
    chosen = []
    for case in CASES:
        values = {(factor, getattr(case, factor)) for factor in factors}
        if case.size < 1000 and not values <= seen:
            chosen.append(case)
            seen |= values
    return chosen


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(backend: str | Callable) -> Backend:
    operators = (reference.sgd_, reference.adamw_)
    return Backend(*(torch.compile(operator, backend=backend, fullgraph=True) for operator in operators))


def step(case: Case, backend: Backend, **changes: object) -> dict[str, Tensor]:
    """What a step leaves of the case's own tensors; the small ones beside them would only take time."""
    lists = {name: tensors[:1] for name, tensors in build(case).lists.items()}
    call(case, lists, backend, **changes)
    return {name: lists[name][0] for name in WRITTEN if lists[name]}


def in_tensors(case: Case) -> dict[str, Tensor]:
    """The numbers that may change from step to step."""
    numbers = {"lr": case.lr, "epsilon": case.epsilon, "grad_scale": case.grad_scale or 1.0, "found_inf": 0.0}
    return {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_same_bits(found[name], tensor, f"{what}: {name}")


@pytest.mark.parametrize("case", selection(), ids=case_id)
def test_a_step_is_one_graph(case):
    """And does what it does in eager mode, bit for bit; but for the last bits of AdamW in float64, whose bias
    corrections take another function for the power.
    """
    changes = in_tensors(case) if case.seed % 2 else {}
    wanted, found = (step(case, backend, **changes) for backend in (REFERENCE, compiled("aot_eager")))
    if case.is_adamw and case.dtype == torch.float64:
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12, equal_nan=True)
    else:
        assert_same(found, wanted, case_id(case))


@pytest.mark.parametrize("case", [PLAIN, ADAMW, CHANCE._replace(annealing="capture_alpha")], ids=case_id)
def test_numbers_in_tensors_change_without_a_new_graph(case):
    counter = CompileCounterWithBackend("aot_eager")
    backend, counts = compiled(counter), []
    for k in range(4):
        numbers = {"lr": 0.1 * k, "epsilon": 1 - k / 3, "grad_scale": 1.0 + k, "found_inf": float(k == 2)}
        changes = {name: torch.tensor(number) for name, number in numbers.items()}
        changes |= {"seed": torch.tensor(2**62 + k)} if case.rounding == "stochastic" else {}
        assert_same(step(case, backend, **changes), step(case, REFERENCE, **changes), f"step {k}")
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 4


@pytest.mark.parametrize("case", [PLAIN, ADAMW, PLAIN._replace(dtype=torch.float16, rounding="remainder")], ids=case_id)
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_an_overflow_that_only_a_tensor_knows_of_leaves_everything_as_it_is(case, how):
    before = {name: tensors[0] for name, tensors in build(case).lists.items() if tensors and name in WRITTEN}
    backend = REFERENCE if how == "eager" else compiled("aot_eager")
    assert_same(step(case, backend, found_inf=torch.ones(())), before, how)


def test_random_bits_of_a_whole_number_need_no_new_graph():
    counter = CompileCounterWithBackend("eager")
    backend = compiled(counter)
    for seed in (1, 2, 2**62 + 5):
        assert_same(step(CHANCE, backend, seed=seed), step(CHANCE, REFERENCE, seed=seed), f"seed {seed}")
    assert counter.frame_count == 2  # torch makes a number part of the graph until it has seen it change


@pytest.mark.parametrize("case", [PLAIN, ADAMW], ids=case_id)
def test_inductor_computes_the_same_to_a_few_last_bits(case):
    wanted, found = (step(case, backend, **in_tensors(case)) for backend in (REFERENCE, compiled("inductor")))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "case",
    [PLAIN, ADAMW, ADAMW._replace(dtype=torch.float64), CHANCE, CHANCE._replace(rounding="remainder")],
    ids=case_id,
)
def test_weights_step_where_they_are_whatever_the_default_device(case):
    changes = {"seed": 3} if case.rounding == "stochastic" else {}
    wanted = step(case, REFERENCE, **changes)

    def elsewhere(operator: Callable) -> Callable:
        def on_meta(*lists, **settings) -> None:
            with torch.device("meta"):
                operator(*lists, **settings)

        return on_meta

    found = step(case, Backend(elsewhere(reference.sgd_), elsewhere(reference.adamw_)), **changes)
    assert_same(found, wanted, case_id(case))
