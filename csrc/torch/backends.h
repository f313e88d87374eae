// The kernels that a call is run by.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <vector>

#include "../cpu/cpu.h"
#include "../cuda/cuda.h"

namespace askew {

extern std::atomic<const CpuKernels*> cpu_kernels;  // of the instruction set in use

// A launch's spans, then first_chunk, as the kernel reads them, in a device's memory. It belongs to one stream, which
// orders a copy behind the launches that read the old content and before those that read the new, and so does its
// memory, when torch's allocator gets that back.
struct SpanTable {
  std::vector<char> content;
  at::Tensor there;
  void* stream = nullptr;
};

// On the device's current stream. Raises where the launch fails. The table is that of the launch before, of the same
// call.
void run_cuda(const Launch& launch, const DeviceNumbers& numbers, at::Device device, SpanTable& table);

// (E7) The same of the sums of blocks, and of scales.
void add_up_cuda(const std::vector<SumSpan>& tensors, const DeviceNumbers& numbers, at::Device device);
void learn_scales_cuda(const ScaleSettings& settings, const DeviceNumbers& numbers, const std::vector<ScaleSpan>& spans,
                       at::Device device);

}  // namespace askew
