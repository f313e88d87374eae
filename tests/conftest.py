"""Every test runs on one thread: the tensors are small, and tests run side by side.

ASKEW_CPU_CAPABILITY=avx2 runs all of them with that instruction set of the CPU kernels.
"""

import os

import torch

torch.set_num_threads(1)
if name := os.environ.get("ASKEW_CPU_CAPABILITY"):
    from askew_cuda import backends

    backends.extension.set_cpu_capability(name)
