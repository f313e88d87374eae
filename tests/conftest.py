"""Every test runs on one thread: the tensors are small, and tests run side by side."""

import torch

torch.set_num_threads(1)
