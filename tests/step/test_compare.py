"""The comparisons can fail."""

import math

import pytest
import torch

from tests.compare import TOLERANCES, assert_close, assert_same_bits

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("actual", "expected"),
    [(1.0, NAN), (NAN, 1.0), (INF, -INF), (1.0, INF), (1.0, -1.0), (0.0, 1e-7), (INF, NAN)],
    ids=str,
)
def test_what_differs_is_not_the_same(actual, expected, dtype):
    with pytest.raises(AssertionError, match=r"weights: 1 of 3 values differ, first at \[0, 1\]"):
        assert_same_bits(
            torch.tensor([[2, actual, 2]], dtype=dtype), torch.tensor([[2, expected, 2]], dtype=dtype), "weights"
        )


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_what_is_the_same_passes(dtype):
    values = torch.tensor([0.0, -0.0, 1.0, NAN, INF, -INF], dtype=dtype)
    assert_same_bits(values, torch.tensor([-0.0, 0.0, 1.0, -NAN, INF, -INF], dtype=dtype), "weights")
    assert_same_bits(values[:0], values[:0], "nothing")


def test_neighbouring_numbers_differ_and_bits_are_shown():
    one = torch.ones(2)
    with pytest.raises(
        AssertionError, match=r"first at \[0\]: 1.0000001\d* \(0x3f800001\), expected 1.0 \(0x3f800000\)"
    ):
        assert_same_bits(one.nextafter(2 * one), one, "weights")
    with pytest.raises(AssertionError, match=r"-1.0 \(0xbf80\), expected 1.0 \(0x3f80\)"):
        assert_same_bits(-one.bfloat16(), one.bfloat16(), "weights")


def test_dtypes_and_shapes_differ():
    with pytest.raises(AssertionError, match=r"dtype torch.float64, expected torch.float32"):
        assert_same_bits(torch.ones(2).double(), torch.ones(2), "weights")
    for compare in (assert_same_bits, lambda *args: assert_close(*args[:2], 1.0, args[2])):
        with pytest.raises(AssertionError, match=r"shape \(2,\), expected \(1,\)"):
            compare(torch.ones(2), torch.ones(1), "weights")


@pytest.mark.parametrize(
    ("actual", "expected"),
    [(NAN, 1.0), (1.0, NAN), (NAN, NAN), (INF, INF), (INF, 1.0), (1.25, 1.0), (0.75, 1.0)],
    ids=str,
)
def test_nothing_but_a_small_error_is_close(actual, expected):
    with pytest.raises(AssertionError, match=r"weights: 1 of 2 values are too far away, first at \[1\]"):
        assert_close(torch.tensor([1.0, actual]), torch.tensor([1.0, expected]), 0.125, "weights")
    with pytest.raises(AssertionError, match="too far"):
        assert_close(torch.tensor([1.0, actual]), torch.tensor([1.0, expected]), torch.tensor([9.0, 0.125]), "weights")


def test_an_error_of_the_bound_is_close():
    assert_close(torch.tensor([1.125, 0.875]), torch.ones(2), 0.125, "weights")
    with pytest.raises(AssertionError, match="> nan"):
        assert_close(torch.ones(1), torch.ones(1), NAN, "weights")
