"""A few steps of one tensor, for a profiler.    python -m benchmarks.speed.one_step [RULE] [DTYPE] [BACKEND]

RULE: sgd (default) or adamw. DTYPE: float32 (default), bfloat16, .. BACKEND: cuda (default) or triton. 64 Mi weights on
a GPU; without one, 64 Ki by the CPU kernel, which tries this program itself.
"""

import sys

import torch

from benchmarks.speed.workloads import Tensors, default_device

STEPS = 3


def main(rule: str = "sgd", dtype: str = "float32", backend: str = "cuda") -> None:
    device = default_device()
    on_gpu = device.type == "cuda"
    tensors = Tensors(rule, 2**26 if on_gpu else 2**16, getattr(torch, dtype), device)
    step = tensors.ours(backend if on_gpu else "cpu")
    for _ in range(STEPS):
        step.run()
    if on_gpu:
        torch.cuda.synchronize()
    print(f"{STEPS} steps of {tensors.size} weights on {device}")


if __name__ == "__main__":
    main(*sys.argv[1:])
