// The kernels that a call is run by.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <tuple>
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

// A call on the device's current stream; and an error, where it could not be launched.
CudaCall call_on(at::Device device, const DeviceNumbers& numbers);
void launched(const char* error, at::Device device);

// On the device's current stream. Raises where the launch fails. The table is that of the launch before, of the same
// call.
void run_cuda(const Launch& launch, const DeviceNumbers& numbers, at::Device device, SpanTable& table);

// (E7) The same of the sums of blocks, and of scales.
void add_up_cuda(const std::vector<SumSpan>& tensors, const DeviceNumbers& numbers, at::Device device);
void learn_scales_cuda(const ScaleSettings& settings, const DeviceNumbers& numbers, const std::vector<ScaleSpan>& spans,
                       at::Device device);

// The operators around the step; `scales` is in the device's memory.
void look_cuda(const Looking& looking, at::Device device);
std::tuple<at::Tensor, at::Tensor> measure_cuda(const Looking& looking, at::Device device);
void restore_cuda(const Restoring& restoring, at::Device device);
void fit_cuda(const Rows& rows, int64_t count, double* scales, at::Device device);

}  // namespace askew
