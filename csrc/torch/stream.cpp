// From a launch to the CUDA kernel: device, stream, and the table of spans that do not fit into a kernel's arguments.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstring>
#include <utility>
#include <vector>

#include "backends.h"

namespace askew {
namespace {

std::vector<char> table_of(const Launch& launch, int64_t chunk) {
  const size_t spans = launch.span_count * sizeof(Span);
  std::vector<int64_t> first_chunk(launch.span_count + 1, 0);
  for (int64_t i = 0; i < launch.span_count; ++i)
    first_chunk[i + 1] = first_chunk[i] + chunks_of(launch.spans[i].size, chunk);
  std::vector<char> content(spans + first_chunk.size() * sizeof(int64_t));
  std::memcpy(content.data(), launch.spans, spans);
  std::memcpy(content.data() + spans, first_chunk.data(), content.size() - spans);
  return content;
}

// Copies the launch's table to the device where it differs from the one before, or that one is another stream's.
void bring_there(SpanTable& table, const Launch& launch, const CudaCall& call, at::Device device) {
  std::vector<char> content = table_of(launch, call.chunk);
  if (table.there.defined() && table.stream == call.stream && table.content == content) return;
  // Pinned memory goes back to torch's allocator, which does not hand it out before the copy is done.
  const at::Tensor here =
      at::empty({static_cast<int64_t>(content.size())}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
  std::memcpy(here.mutable_data_ptr(), content.data(), content.size());
  table.there = here.to(device, at::kByte, true);
  table.content = std::move(content);
  table.stream = call.stream;
}

}  // namespace

CudaCall call_on(at::Device device, const DeviceNumbers& numbers) {
  void* stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
  return {device.index(), stream, numbers, largest_chunk, nullptr, nullptr};
}

void launched(const char* error, at::Device device) {
  TORCH_CHECK(!error, "askew_cuda: a kernel on ", device, " could not be launched: ", error);
}

void add_up_cuda(const std::vector<SumSpan>& tensors, const DeviceNumbers& numbers, at::Device device) {
  const c10::DeviceGuard guard(device);
  launched(cuda_add_up(tensors.data(), static_cast<int64_t>(tensors.size()), call_on(device, numbers)), device);
}

void learn_scales_cuda(const ScaleSettings& settings, const DeviceNumbers& numbers, const std::vector<ScaleSpan>& spans,
                       at::Device device) {
  const c10::DeviceGuard guard(device);
  launched(cuda_learn(settings, spans.data(), static_cast<int64_t>(spans.size()), call_on(device, numbers)), device);
}

void run_cuda(const Launch& launch, const DeviceNumbers& numbers, at::Device device, SpanTable& table) {
  const c10::DeviceGuard guard(device);
  CudaCall call = call_on(device, numbers);
  call.chunk = chunk_of(launch);
  at::Tensor captured;  // of the graph's own pool, where it may be used again behind the step
  if (launch.span_count > few_spans) {
    const bool captures = cuda_is_capturing(call.stream);
    if (captures) {
      const int64_t bytes = launch.span_count * sizeof(Span) + (launch.span_count + 1) * sizeof(int64_t);
      captured = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device));
    } else {
      bring_there(table, launch, call, device);
    }
    call.spans = static_cast<const Span*>((captures ? captured : table.there).const_data_ptr());
    call.first_chunk = reinterpret_cast<const int64_t*>(call.spans + launch.span_count);
    if (captures) launched(cuda_write_table(launch, call), device);
  }
  launched(cuda_step(launch, call), device);
}

}  // namespace askew
