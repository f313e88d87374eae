"""The one order in which numbers of many weights are summed, in float64: the bits are the same whatever computes them.
``csrc/maths/order.h`` in PyTorch.

Numbers are dealt in turn to 16 lanes, each of which adds up its own, lanes are added as a tree, blocks of 1,280 numbers
in sequence, chunks of 16 blocks in sequence.
"""

import torch
from torch import Tensor

LANES, STEPS, BLOCKS = 16, 80, 16  # of a sum; steps of a block, blocks of a chunk
BLOCK = LANES * STEPS
CHUNK = BLOCKS * BLOCK


def add_lanes(lanes: Tensor) -> Tensor:
    """(..., LANES) float64 to (...): upper halves onto lower ones."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def add_up(values: Tensor) -> Tensor:
    """(rows, columns) float64 to (rows, chunks): what each chunk adds up to."""
    rows, columns = values.shape
    chunks, steps, blocks = -(-columns // CHUNK), STEPS, BLOCKS
    if columns < CHUNK:  # zeros that are added at an end change nothing
        steps, blocks = min(STEPS, -(-columns // LANES)), -(-columns // BLOCK)
    size = chunks * blocks * steps * LANES
    dealt = torch.nn.functional.pad(values, (0, size - columns)).reshape(rows, chunks, blocks, steps, LANES)
    lanes = torch.zeros_like(dealt[:, :, :, 0])
    for step in dealt.unbind(3):
        lanes += step
    return in_sequence(torch.zeros_like(lanes[:, :, 0, 0]), add_lanes(lanes))


def in_sequence(total: Tensor, parts: Tensor) -> Tensor:
    """total (...) and then each of the parts (..., n), added one by one."""
    for part in parts.unbind(-1):
        total = total + part
    return total


def total(values: Tensor) -> Tensor:
    """(rows, columns) float64 to (rows,)."""
    start = values.new_zeros(len(values))
    return in_sequence(start, add_up(values)) if values.shape[1] else start
