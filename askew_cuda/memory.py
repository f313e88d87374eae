"""Memory that is filled once and held for a while. In pages of 2 MiB, where Linux has them: new pages of 4 KiB are
cleared one by one when they are touched first, which takes three times as long as to fill them.
"""

import contextlib
import mmap

import torch
from torch import Tensor

PAGE = 2**21


def empty(size: int) -> Tensor:
    """(size,), uint8, on the CPU, of any content."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or size < 2 * PAGE:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel that was built without them
        pages.madvise(advice)
    return torch.frombuffer(pages, dtype=torch.uint8)


def copy_of(weight: Tensor) -> Tensor:
    """A copy in the weight's memory format, on its device."""
    weight = weight.detach()
    plain = type(weight) is Tensor and weight.is_cpu and weight.numel() > 0
    if not plain or torch.empty_like(weight, device="meta").stride() != weight.stride():
        return weight.clone()
    flat = empty(weight.numel() * weight.element_size()).view(weight.dtype)
    return flat.as_strided(weight.size(), weight.stride()).copy_(weight)
