"""Copies of weights that are held for a while. On a CPU in pages of 2 MiB, where Linux has them: a copy in new pages of
4 KiB takes three times as long, since the system clears each one when it is touched first.
"""

import contextlib
import mmap

import torch
from torch import Tensor

PAGE = 2**21


def held(weight: Tensor) -> Tensor:
    """A copy in the weight's memory format."""
    weight = weight.detach()
    memory = _large_pages(weight.numel() * weight.element_size()) if type(weight) is Tensor and weight.is_cpu else None
    if memory is None or torch.empty_like(weight, device="meta").stride() != weight.stride():
        return weight.clone()
    flat = torch.frombuffer(memory, dtype=weight.dtype, count=weight.numel())
    return flat.as_strided(weight.size(), weight.stride()).copy_(weight)


def _large_pages(size: int) -> mmap.mmap | None:
    """So many bytes of private memory; None where there are no large pages, or the copy would not fill a few."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or size < 2 * PAGE:
        return None
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel that was built without them
        memory.madvise(advice)
    return memory
