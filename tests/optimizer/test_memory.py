"""Copies that quantized() holds: the weight's bits and its memory format, in large pages or not."""

import pytest
import torch

from askew_cuda import memory
from tests.compare import assert_same_bits

WEIGHTS = {
    "a matrix": lambda: torch.randn(700, 800),
    "channels last": lambda: torch.randn(64, 32, 30, 10).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(800, 700).T,
    "with holes": lambda: torch.randn(700, 1600)[:, ::2],
    "of 16 bits": lambda: torch.randn(1400, 800).bfloat16(),
    "a parameter": lambda: torch.nn.Parameter(torch.randn(700, 800)),
    "small": lambda: torch.randn(3),
    "empty": lambda: torch.empty(0, 4),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("page", [2**20, 2**30])
def test_a_copy_is_the_weight_and_its_own(name, page, monkeypatch):
    monkeypatch.setattr(memory, "PAGE", page)
    weight = WEIGHTS[name]()
    copy = memory.copy_of(weight)
    assert_same_bits(copy, weight.detach(), name)
    assert copy.stride() == weight.clone().stride()
    assert not copy.requires_grad
    before = weight.detach().clone()
    copy.zero_()
    assert_same_bits(weight.detach(), before, "the weight")


def test_without_large_pages_it_is_a_plain_copy(monkeypatch):
    monkeypatch.delattr("mmap.MADV_HUGEPAGE", raising=False)
    weight = torch.randn(1500, 1000)
    assert_same_bits(memory.copy_of(weight), weight, "copy")
