"""The search for scales: the compiled kernel against its reference, bit for bit, however rows lie and whoever sums."""

import itertools
import math

import pytest
import torch

from askew_cuda import fit, scales, summation
from askew_cuda.quantizer import Codebook
from tests.cases import EXTENSION
from tests.compare import assert_same_bits
from tests.layers.test_scales import draw

needs_extension = pytest.mark.skipif(EXTENSION is None, reason="the compiled extension is not built")
LEVELS = {
    name: Codebook.named(name).levels for name in ("binary", "ternary", "4bit", "nf4", "fp4", "int8", "authors_4bit")
} | {"aside": (1.0, 2.0, 3.0, 4.0), "negative": (-3.0, -1.0), "steep": tuple(float(k * abs(k)) for k in range(-9, 10))}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def kernel(rows: torch.Tensor, levels) -> torch.Tensor:
    return torch.ops.askew_cuda.fit_scales(rows, levels)


@pytest.fixture(params=EXTENSION.cpu_capabilities() if EXTENSION else ())
def capability(request):
    before = EXTENSION.set_cpu_capability(request.param)
    yield request.param
    EXTENSION.set_cpu_capability(before)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LEVELS)
def test_the_kernel_is_its_reference(name, dtype, capability):
    columns = (1, 15, 17, 130) if len(LEVELS[name]) <= 17 else (17, 70)
    for count, kind in zip(columns, itertools.cycle(("normal", "heavy", "negative", "coarse"))):
        rows = draw(kind, 3, count, seed=count).to(dtype)
        rows[1] = 0
        assert_same_bits(kernel(rows, LEVELS[name]), fit.fit_scales(rows, LEVELS[name]), f"{kind}, {count}")


@needs_extension
@pytest.mark.parametrize(
    "size", [summation.BLOCK - 1, summation.BLOCK, summation.BLOCK + 1, summation.CHUNK + 5, 2 * summation.CHUNK]
)
def test_blocks_and_chunks_are_added_in_the_order_that_is_written(size, capability):
    rows = draw("normal", 1, size, dtype=torch.float32)
    assert_same_bits(kernel(rows, (-1, 0, 1)), fit.fit_scales(rows, (-1, 0, 1)), "scale")


@needs_extension
def test_neither_threads_nor_company_matter():
    """One long row is summed by all threads, many are by one each."""
    rows, threads = draw("normal", 5, 3 * summation.CHUNK + 77, dtype=torch.float32), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = kernel(rows, LEVELS["4bit"])
        torch.set_num_threads(3)
        assert_same_bits(kernel(rows, LEVELS["4bit"]), alone, "five rows, three threads")
        assert_same_bits(kernel(rows[:1], LEVELS["4bit"]), alone[:1], "one row, three threads")
    finally:
        torch.set_num_threads(threads)


@needs_extension
def test_rows_may_lie_anyhow():
    whole = draw("normal", 40, 33, dtype=torch.float32)
    for rows in (whole.T.contiguous().T, whole[:, ::2], whole[::3], whole.flip(0)):
        assert_same_bits(kernel(rows, LEVELS["4bit"]), kernel(rows.contiguous(), LEVELS["4bit"]), "scales")


@pytest.mark.parametrize("search", [fit.fit_scales, *([kernel] if EXTENSION else [])])
def test_rows_that_have_no_scale(search):
    """As the rules say: 0 for zeros, and a scale of the weights' size where levels are of the other sign; a row with
    NaN gets one that its other weights say nothing about.
    """
    rows = torch.tensor([[0.0, -0.0], [-3.0, -2.0], [math.nan, 2.0], [5.0, 0.0]])
    assert search(rows, (1.0, 2.0)).tolist() == [0.0, 1.5, 1.0, 2.0]
    assert search(torch.empty(3, 0), (-1, 1)).tolist() == [0, 0, 0]
    assert search(torch.empty(0, 3), (-1, 1)).shape == (0,)


@needs_extension
def test_what_the_operator_refuses():
    with pytest.raises(ValueError, match="two dimensions"):
        kernel(torch.ones(3), (-1, 1))
    with pytest.raises(ValueError, match="strictly increasing"):
        kernel(torch.ones(1, 3), (1, -1))
    with pytest.raises(TypeError, match="dtype"):
        kernel(torch.ones(1, 3, dtype=torch.int32), (-1, 1))


@needs_extension
def test_it_is_an_operator():
    torch.library.opcheck(torch.ops.askew_cuda.fit_scales, (draw("normal", 3, 20), [-1.0, 0.0, 1.0]))


def test_without_a_kernel_the_reference_is_taken(monkeypatch):
    rows = draw("normal", 5, 40)
    found = scales.min_mse(rows, Codebook.named("4bit"))
    monkeypatch.setattr("askew_cuda.backends.extension", None)
    monkeypatch.setattr(fit, "AT_ONCE", 80)
    assert_same_bits(scales.min_mse(rows, Codebook.named("4bit")), found, "scales")
