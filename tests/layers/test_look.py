"""Codes, snapped weights and what reports count: the compiled kernels against PyTorch, bit for bit."""

import math

import pytest
import torch

from askew_cuda import backends, fit, look, reference
from askew_cuda.packed.bits import PACKINGS, pack, width
from askew_cuda.quantizer import Codebook, Quantizer
from tests.cases import EXTENSION
from tests.compare import assert_same_bits
from tests.tensors import draw_weight

pytestmark = pytest.mark.skipif(EXTENSION is None, reason="the compiled extension is not built")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BOOKS = ["binary", "ternary", "4bit", "int8", "nf4", "fp4", "authors_4bit"]
SPECS = ["", "/channel", "/group6"]
SHAPES = [(5, 12), (7, 3, 2, 4), (3, 2130), (1, 6), (11, 6)]


@pytest.fixture(params=EXTENSION.cpu_capabilities() if EXTENSION else ())
def capability(request):
    before = EXTENSION.set_cpu_capability(request.param)
    yield request.param
    EXTENSION.set_cpu_capability(before)


def draw(shape, spec: str, dtype: torch.dtype, channel_dim=0) -> tuple[torch.Tensor, torch.Tensor, tuple[float, ...]]:
    """A hostile weight, a scale, levels."""
    generator, quantizer = torch.Generator().manual_seed(3), Quantizer.parse(spec)
    size = quantizer.scale_shape(torch.empty(shape), channel_dim)
    scale = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.3).to(reference.arithmetic(dtype))
    each, levels = reference.spread(scale, torch.empty(shape)).double(), quantizer.codebook.levels
    weight = draw_weight(generator, shape, each, levels, dtype, hostile=True).to(dtype)
    return weight, scale, levels


def both(monkeypatch, call):
    """With the kernels, and without."""
    compiled = call()
    with monkeypatch.context() as patch:
        patch.setattr(backends, "extension", None)
        return compiled, call()


def check(monkeypatch, weight, scale, levels) -> None:
    for function in (look.codes, look.snap):
        compiled, plain = both(monkeypatch, lambda function=function: function(weight, scale, levels))
        assert_same_bits(compiled, plain, function.__name__)
        assert compiled.stride() == plain.stride()
    in_place = weight.clone()
    look.snap_(in_place, scale, levels)
    assert_same_bits(in_place, look.snap(weight, scale, levels), "in place")
    earlier = torch.arange(weight.numel(), dtype=torch.int64).remainder_(len(levels)).to(torch.uint8)
    now = [earlier.clone(), earlier.clone()]
    compiled, plain = both(
        monkeypatch, lambda: look.counting(weight, scale, levels, 0.25, now[backends.extension is None], True)()
    )
    assert compiled == plain
    assert_same_bits(now[0], now[1], "codes")
    assert sum(compiled.occupancy) == weight.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("book", BOOKS)
def test_kernels_do_what_pytorch_does(book, spec, dtype, capability, monkeypatch):
    for shape in SHAPES:
        check(monkeypatch, *draw(shape, book + spec, dtype))


@pytest.mark.parametrize("channel_dim", [0, 1, (0, 1), -1])
@pytest.mark.parametrize("spec", ["4bit", "4bit/channel", "4bit/group2"])
def test_memory_order_changes_nothing(spec, channel_dim, monkeypatch):
    weight, scale, levels = draw((4, 6, 2, 8), spec, torch.float32, channel_dim)
    expected = look.snap(weight, scale, levels)
    spaced = torch.empty(4, 6, 2, 16)[..., ::2]
    for laid in (weight.to(memory_format=torch.channels_last), weight.mT.contiguous().mT, spaced.copy_(weight)):
        check(monkeypatch, laid, scale, levels)
        assert_same_bits(look.snap(laid, scale, levels), expected, "snapped")
        look.snap_(laid, scale, levels)
        assert_same_bits(laid, expected, "in place")


@pytest.mark.parametrize("book", ["binary", "ternary", "2bit", "4bit", "int8"])
@pytest.mark.parametrize("size", [1, 4, 9, 1280, 1281, 20480 + 3])
def test_codes_are_packed_on_the_way_out(book, size, capability):
    levels, scale = Codebook.named(book).levels, torch.tensor(0.4)
    weight = torch.randn(size, generator=torch.Generator().manual_seed(size))
    for bits in {width(len(levels)), width(len(levels), "2bit"), 8}:
        packed = look.packed_codes(weight, scale, levels, *PACKINGS[bits])
        assert_same_bits(packed, pack(look.codes(weight, scale, levels), bits), f"{bits} bits")


def test_neither_threads_nor_parts_matter(monkeypatch):
    weight, scale, levels = draw((13, 6000), "nf4/channel", torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(look.counting(weight, scale, levels, 0.1)())
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(backends, "extension", None)
    monkeypatch.setattr(fit, "AT_ONCE", 2 * 20480)
    assert found[0] == found[1] == look.counting(weight, scale, levels, 0.1)()


@pytest.mark.parametrize("scale", [math.nan, 0.0])
def test_a_scale_that_is_none_does_the_same_everywhere(scale, monkeypatch):
    weight = torch.tensor([0.0, 1.0, -2.0, math.nan, math.inf])
    check(monkeypatch, weight, torch.tensor(scale), (-1.0, 0.0, 1.0))


def test_autograd_sees_a_weight_that_was_snapped():
    weight = torch.nn.Parameter(torch.randn(4))
    loss = weight.square().sum()
    with torch.no_grad():
        look.snap_(weight, torch.tensor(1.0), (-1.0, 1.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_they_are_operators():
    weight, scale, levels = torch.randn(40), torch.rand(4) + 0.1, [-1.0, 0.0, 1.0]
    operators = torch.ops.askew_cuda
    torch.library.opcheck(operators.codes, (weight, scale, 10, levels, 3, 5))
    torch.library.opcheck(operators.snap, (weight, scale, 10, levels))
    torch.library.opcheck(operators.snap_, (weight, scale, 10, levels))
    for codes in (None, torch.zeros(40, dtype=torch.uint8)):
        torch.library.opcheck(operators.measure, (weight, scale, 10, levels, 0.1, codes, codes is not None))


def test_what_operators_refuse():
    weight, scale, levels = torch.randn(4, 10), torch.ones(4), [-1.0, 1.0]
    for arguments, error, message in (
        ((weight.T, scale, 10, levels), ValueError, "in order"),
        ((weight, scale.double(), 10, levels), TypeError, "scale is Double"),
        ((weight, scale, 0, levels), ValueError, "run = 0"),
        ((weight.int(), scale, 10, levels), TypeError, "dtype Int"),
        ((weight, scale, 10, [1.0]), ValueError, "1 entries; 2 to 256"),
    ):
        with pytest.raises(error, match=message):
            torch.ops.askew_cuda.snap(*arguments)
    with pytest.raises(ValueError, match="3 levels in base 2"):
        torch.ops.askew_cuda.codes(weight, scale, 10, [-1.0, 0.0, 1.0], 2, 8)
