"""The one order in which numbers of many weights are summed: the bits are the same whatever computes them.
``csrc/maths/order.h`` in PyTorch.

Numbers are dealt in turn to 16 lanes, each of which adds up its own, lanes are added as a tree, blocks of 1,280 numbers
in sequence, chunks of 16 blocks in sequence. Within a block sums are in the type of the numbers, beyond it in float64.
"""

import torch
from torch import Tensor

LANES, STEPS, BLOCKS = 16, 80, 16  # of a sum; steps of a block, blocks of a chunk
BLOCK = LANES * STEPS
CHUNK = BLOCKS * BLOCK


def add_lanes(lanes: Tensor) -> Tensor:
    """(..., LANES) to (...): upper halves onto lower ones."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def add_up(values: Tensor, factor: float | Tensor = 1.0) -> Tensor:
    """(rows, columns), float32 or float64, to (rows, chunks) float64: what each chunk adds up to; factor: as below."""
    rows, columns = values.shape
    chunks, steps, blocks = -(-columns // CHUNK), STEPS, BLOCKS
    if columns < CHUNK:  # zeros that are added at an end change nothing
        steps, blocks = min(STEPS, -(-columns // LANES)), -(-columns // BLOCK)
    size = chunks * blocks * steps * LANES
    dealt = torch.nn.functional.pad(values, (0, size - columns)).reshape(rows, chunks, blocks, steps, LANES)
    lanes = torch.zeros_like(dealt[:, :, :, 0])
    for step in dealt.unbind(3):
        lanes += step
    sums = add_lanes(lanes).double() * factor
    return in_sequence(torch.zeros_like(sums[:, :, 0]), sums)


def in_sequence(total: Tensor, parts: Tensor) -> Tensor:
    """total (...) and then each of the parts (..., n), added one by one."""
    for part in parts.unbind(-1):
        total = total + part
    return total


def total(values: Tensor, factor: float | Tensor = 1.0) -> Tensor:
    """(rows, columns), float32 or float64, to (rows,) float64. factor: multiplies what each block adds up to."""
    start = values.new_zeros(len(values), dtype=torch.float64)
    return in_sequence(start, add_up(values, factor)) if values.shape[1] else start
