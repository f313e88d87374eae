// Sums over the weights of each scale.
#include "radial.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace askew {

using at::Tensor;

namespace {

// askew_cuda/reference.py, blocks(): the weights of each scale, one scale after the other; a view.
Tensor by_scale(const Tensor& tensor, at::IntArrayRef scale) {
  std::vector<int64_t> runs, order;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    runs.insert(runs.end(), {scale[d], tensor.size(d) / scale[d]});
    order.push_back(2 * d);
  }
  for (int64_t d = 0; d < tensor.dim(); ++d) order.push_back(2 * d + 1);
  return tensor.reshape(runs).permute(order);
}

}  // namespace

void RadialSums::add(size_t i, Span& span, const Source& source, const Tensor& scale, const Tensor& sums) {
  const bool in_runs = span.size == 0 || (span.outer_count < 2 && span.scale_run * span.scale_count == span.size);
  Span* summed = &span;
  if (!in_runs) {
    Copy copy{i, source, {}, {}, {}, {}, scale.sizes().vec(), {}};
    const auto gathered = [&](const Tensor& from) {
      return by_scale(from, copy.scale).clone(at::MemoryFormat::Contiguous);
    };
    copy.weight = gathered(source.weight);
    copy.grad = gathered(source.grad);
    copy.span.weight = copy.weight.mutable_data_ptr();
    copy.span.grad = copy.grad.const_data_ptr();
    if (source.remainder.defined()) {
      copy.remainder = gathered(source.remainder);
      copy.span.remainder = copy.remainder.mutable_data_ptr();
    }
    if (source.second.defined() && rule_ == Rule::adamw) {
      copy.second = gathered(source.second);
      copy.span.state[1] = copy.second.mutable_data_ptr();
    }
    copy.span.size = span.size;
    copy.span.scale_count = scale.numel();
    copy.span.scale_run = span.size / scale.numel();
    copy.span.scale = copy.span.growth = span.scale;  // any: no weight is stepped
    copy.span.step = span.step;
    copy.source = {{}, {}, {}, source.second};  // a gradient that is kept would not be freed
    copies_.push_back(std::move(copy));
    summed = &copies_.back().span;
  }
  const int64_t blocks = sum_blocks(*summed).each * summed->scale_count;
  parts_.resize(i + 1);
  parts_[i] = {at::empty({sum_kinds(rule_), blocks}, sums.options()), sums, span.size};
  summed->sums = parts_[i].blocks.mutable_data_ptr<double>();
}

std::vector<std::pair<size_t, Span>> RadialSums::apart() {
  std::vector<std::pair<size_t, Span>> spans;
  for (Copy& copy : copies_) {
    if (copy.second.defined()) copy.second.copy_(by_scale(copy.source.second, copy.scale));
    spans.emplace_back(copy.i, copy.span);
  }
  return spans;
}

void RadialSums::add_up(const std::vector<size_t>& weights, [[maybe_unused]] const DeviceNumbers& numbers) const {
  std::vector<SumSpan> there;
  for (const size_t i : weights) {
    const auto& [blocks, sums, size] = parts_[i];
    if (size == 0) {
      sums.zero_();
      continue;
    }
    const int64_t count = sums.numel(), each = blocks.numel() / count;
    const double* from = blocks.const_data_ptr<double>();
    double* to = sums.mutable_data_ptr<double>();
    if (!sums.is_cpu()) {
      there.push_back({from, to, count, each});
      continue;
    }
    at::parallel_for(0, count, std::max<int64_t>(1, 8192 / each), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) to[k] = add_blocks(from + k * each, each);
    });
  }
#if defined(ASKEW_WITH_CUDA)
  if (!there.empty()) add_up_cuda(there, numbers, parts_[weights[0]].sums.device());
#endif
}

}  // namespace askew
