"""Comparisons, element by element, that no NaN passes unseen; and the tolerances against float64 truth."""

import torch
from torch import Tensor

# How far a step may be from its value in exact arithmetic, relative to the largest of |w|, |d| and scale * |level| in
# it.
#
# A step is a chain of fewer than 32 operations, each with a rounding error of half an ulp: 2^-53 of its result in
# float64, 2^-24 in float32. The truth is computed from the same numbers before they are rounded to the type, which adds
# less than one more each.
TOLERANCES = {
    # 32 * 2^-53 = 4e-15 of our own; golden.json's truth is computed in float64 too, by another formula, and promises
    # 1e-12.
    torch.float64: 1e-12,
    # 32 * 2^-24, rounded up.
    torch.float32: 2e-6,
    # Float32 arithmetic; but weight, gradient and state are rounded to 8 significant bits when they are read, and the
    # weight once more when it is stored: four times 2^-9.
    torch.bfloat16: 4 * 2**-9 + 2e-6,
    # The same with 11 significant bits.
    torch.float16: 4 * 2**-12 + 2e-6,
}

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns of a tensor as integers."""
    return tensor.contiguous().view(_WORDS[tensor.itemsize])


def _pattern(tensor: Tensor, at: tuple[int, ...]) -> str:
    word = bits(tensor)[at].item() & ((1 << 8 * tensor.itemsize) - 1)
    return f"{tensor[at].item()!r} ({word:#0{2 + 2 * tensor.itemsize}x})"


def _alike(actual: Tensor, expected: Tensor, what: str) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Raises unless dtypes, shapes and all values are the same: NaN where NaN is expected, of whatever payload, and -0
    counts as +0.
    """
    _alike(actual, expected, what)
    if actual.dtype != expected.dtype:
        raise AssertionError(f"{what}: dtype {actual.dtype}, expected {expected.dtype}")
    same = (actual == expected) | ((actual != actual) & (expected != expected))
    if same.all():
        return
    wrong = (~same).nonzero()
    at = tuple(wrong[0].tolist())
    raise AssertionError(
        f"{what}: {len(wrong)} of {same.numel()} values differ, first at {list(at)}: "
        f"{_pattern(actual, at)}, expected {_pattern(expected, at)}"
    )


def assert_close(actual: Tensor, expected: Tensor, bound: float | Tensor, what: str) -> None:
    """Raises unless |actual - expected| <= bound everywhere, in float64. A NaN or an infinity on either side is never
    close.
    """
    _alike(actual, expected, what)
    error = (actual.double() - expected.double()).abs()
    wrong = ~(error <= bound)
    if not wrong.any():
        return
    at = tuple(wrong.nonzero()[0].tolist())
    limit = torch.as_tensor(bound, dtype=torch.float64).expand(error.shape)[at].item()
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {error.numel()} values are too far away, first at {list(at)}: "
        f"{actual[at].item()!r}, expected {expected[at].item()!r}, error {error[at].item():.3g} > {limit:.3g}"
    )
