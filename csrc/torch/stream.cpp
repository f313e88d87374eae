// From a launch to the CUDA kernel: device, stream, and the table of spans that do not fit into a kernel's arguments.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstring>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "backends.h"

namespace askew {
namespace {

// Spans, then first_chunk, as the kernel reads them, for one stream.
struct Table {
  std::vector<char> content;
  at::Tensor there;
};

std::vector<char> table_of(const Launch& launch) {
  const size_t spans = launch.span_count * sizeof(Span);
  std::vector<int64_t> first_chunk(launch.span_count + 1, 0);
  for (int64_t i = 0; i < launch.span_count; ++i)
    first_chunk[i + 1] = first_chunk[i] + chunks_of(launch.spans[i].size, block_chunk);
  std::vector<char> content(spans + first_chunk.size() * sizeof(int64_t));
  std::memcpy(content.data(), launch.spans, spans);
  std::memcpy(content.data() + spans, first_chunk.data(), content.size() - spans);
  return content;
}

// The launch's table in device memory. It is copied there when it differs from the one before of these weights on this
// stream: the stream orders the copy behind the launches that read the old one and before those that read the new.
at::Tensor table_there(const Launch& launch, at::Device device, void* stream) {
  using Key = std::tuple<void*, void*, int64_t>;
  static auto& tables = *new std::map<Key, Table>;  // never destroyed: at exit the driver may be gone before
  static std::mutex mutex;
  constexpr size_t kept = 256;  // lists of weights; a program with more copies its tables again
  std::vector<char> content = table_of(launch);
  const std::lock_guard<std::mutex> lock(mutex);
  if (tables.size() > kept) tables.clear();
  Table& table = tables[Key{stream, launch.spans[0].weight, launch.span_count}];
  if (table.content != content) {
    // Pinned memory goes back to torch's allocator, which does not hand it out before the copy is done.
    const at::Tensor here =
        at::empty({static_cast<int64_t>(content.size())}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
    std::memcpy(here.mutable_data_ptr(), content.data(), content.size());
    table.there = here.to(device, at::kByte, true);
    table.content = std::move(content);
  }
  return table.there;
}

}  // namespace

void run_cuda(const Launch& launch, const DeviceNumbers& numbers, at::Device device) {
  const c10::DeviceGuard guard(device);
  void* stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
  CudaCall call{device.index(), stream, numbers, nullptr, nullptr};
  at::Tensor table;
  // A captured graph would read the table when it is replayed, and the table may be gone then: arguments are captured
  // by value.
  if (launch.span_count > few_spans && !cuda_is_capturing(stream)) {
    table = table_there(launch, device, stream);
    call.spans = static_cast<const Span*>(table.const_data_ptr());
    call.first_chunk = reinterpret_cast<const int64_t*>(call.spans + launch.span_count);
  }
  const char* error = cuda_step(launch, call);
  TORCH_CHECK(!error, "askew_cuda: the step on ", device, " could not be launched: ", error);
}

}  // namespace askew
