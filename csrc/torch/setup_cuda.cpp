// The operators around the step on a GPU: what they keep in its memory, and the launches.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include <tuple>

#include "backends.h"

namespace askew {

void look_cuda(const Looking& looking, at::Device device) {
  const c10::DeviceGuard guard(device);
  launched(cuda_look(looking, {}, call_on(device, {})), device);
}

std::tuple<at::Tensor, at::Tensor> measure_cuda(const Looking& looking, at::Device device) {
  const c10::DeviceGuard guard(device);
  const at::TensorOptions there = at::TensorOptions().device(device);
  at::Tensor counts = at::zeros({5 + looking.levels.count}, there.dtype(at::kLong));
  at::Tensor numbers = at::zeros({3}, there.dtype(at::kDouble));
  at::Tensor squares = at::empty({2 * chunks_of(looking.size, block_size)}, there.dtype(at::kDouble));
  const Counted counted{reinterpret_cast<unsigned long long*>(counts.mutable_data_ptr<int64_t>()),
                        numbers.mutable_data_ptr<double>(), squares.mutable_data_ptr<double>()};
  launched(cuda_look(looking, counted, call_on(device, {})), device);
  return {counts, numbers};
}

void restore_cuda(const Restoring& restoring, at::Device device) {
  const c10::DeviceGuard guard(device);
  launched(cuda_restore(restoring, call_on(device, {})), device);
}

void fit_cuda(const Rows& rows, int64_t count, double* scales, at::Device device) {
  const c10::DeviceGuard guard(device);
  FitSpace space{};
  at::Tensor searches, ranges, sums;
  if (fits_together(count, rows.columns)) {
    const auto bytes = [&](int64_t size) {
      return at::empty({size}, at::TensorOptions().device(device).dtype(at::kByte));
    };
    const int64_t chunks = count * chunks_of(rows.columns, sum_chunk);
    searches = bytes(count * sizeof(Search));
    ranges = bytes(chunks * sizeof(Range));
    sums = bytes(chunks * grids_for(rows.levels, rows.columns).most() * sizeof(Sums));
    space = {static_cast<Search*>(searches.mutable_data_ptr()), static_cast<Range*>(ranges.mutable_data_ptr()),
             static_cast<Sums*>(sums.mutable_data_ptr())};
  }
  launched(cuda_fit(rows, count, space, scales, call_on(device, {})), device);
}

}  // namespace askew
