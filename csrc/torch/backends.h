// The kernels that a call is run by.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>

#include "../cpu/cpu.h"
#include "../cuda/cuda.h"

namespace askew {

extern std::atomic<const CpuKernels*> cpu_kernels;  // of the instruction set in use

// On the device's current stream. Raises where the launch fails.
void run_cuda(const Launch& launch, const DeviceNumbers& numbers, at::Device device);

}  // namespace askew
