// Checks, and tensors to spans.
#include "arguments.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty_like.h>

namespace askew {

using at::Tensor;
using at::TensorList;

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::float32;
    case at::kDouble:
      return Dtype::float64;
    case at::kBFloat16:
      return Dtype::bfloat16;
    case at::kHalf:
      return Dtype::float16;
    default:
      TORCH_CHECK_TYPE(false, "askew_cuda: ", name, " has dtype ", tensor.scalar_type(),
                       "; float32, float64, bfloat16 and float16 are supported");
  }
}

const Tensor& Layout::weight(const Tensor& tensor, bool in_order) {
  if (in_order ? tensor.is_contiguous() : tensor.is_non_overlapping_and_dense()) return tensor;
  return copied(tensor, at::empty_like(tensor, at::MemoryFormat::Contiguous), true);
}

const Tensor& Layout::like(const Tensor& weight, const Tensor& tensor, bool written) {
  if (tensor.strides() == weight.strides()) return tensor;
  return copied(tensor, at::empty_like(weight, weight.options().dtype(tensor.scalar_type())), written);
}

void* Layout::keep(Tensor tensor) { return copies_.emplace_back(std::move(tensor)).mutable_data_ptr(); }

void Layout::write_back() {
  for (auto& [original, copy] : written_) original->copy_(*copy);
}

const Tensor& Layout::copied(const Tensor& tensor, Tensor copy, bool written) {
  copy.copy_(tensor);
  const Tensor& kept = copies_.emplace_back(std::move(copy));
  if (written) written_.emplace_back(&tensor, &kept);
  return kept;
}

namespace {

// One number for a channel: (channels, 1, ..); for a group: (rows, groups).
bool per_channel(const Tensor& weight, const Tensor& scale) {
  return scale.numel() > 1 && weight.dim() > 0 && scale.dim() == weight.dim() && scale.size(0) == weight.size(0) &&
         scale.numel() == weight.size(0);
}
bool per_group(const Tensor& weight, const Tensor& scale) {
  return scale.numel() > 1 && weight.dim() > 1 && scale.dim() == 2 && scale.size(0) == weight.size(0) &&
         (weight.numel() / scale.size(0)) % scale.size(1) == 0;
}

void check_scale(const Tensor& weight, const Tensor& scale, size_t which) {
  const auto wanted = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_TYPE(scale.scalar_type() == wanted, "askew_cuda: scales[", which, "] has dtype ", scale.scalar_type(),
                   "; ", wanted, " goes with weights of ", weight.scalar_type());
  TORCH_CHECK_VALUE(scale.device() == weight.device(), "askew_cuda: scales[", which, "] is on ", scale.device(),
                    " but weights[", which, "] is on ", weight.device());
  TORCH_CHECK_VALUE(scale.numel() == 1 || per_channel(weight, scale) || per_group(weight, scale) || weight.numel() == 0,
                    "askew_cuda: scales[", which, "] has shape ", scale.sizes(), " for a weight of shape ",
                    weight.sizes(), "; (), (channels, 1, ..) or (rows, groups) are understood");
}

// Fills scale, scale_run and scale_count for a weight in memory order.
void set_scale(Span& span, const Tensor& weight, const Tensor& scale, Layout& layout) {
  const int64_t size = weight.numel(), count = scale.numel();
  span.scale_count = count;
  if (count <= 1) {  // 0: an empty weight has no chunk, and needs none
    span.scale_run = size > 0 ? size : 1;
  } else if (weight.is_contiguous()) {
    span.scale_run = size / count;
  } else if (per_channel(weight, scale) || scale.size(1) == 1) {
    span.scale_run = weight.stride(0);
  } else {  // groups are counted in logical order: in another memory order each weight brings its own
    const Tensor each = scale.reshape({count, 1}).expand({count, size / count}).reshape(weight.sizes());
    span.scale = layout.keep(at::empty_like(weight, scale.options()).copy_(each));
    span.scale_run = 1;
    span.scale_count = size;
    return;
  }
  span.scale = scale.is_contiguous() ? scale.const_data_ptr() : layout.keep(scale.contiguous());
}

void check_list(const char* name, TensorList list, TensorList weights, bool optional) {
  TORCH_CHECK_VALUE((optional && list.empty()) || list.size() == weights.size(), "askew_cuda: ", name, " has ",
                    list.size(), " tensors for ", weights.size(), " weights");
  for (size_t i = 0; i < list.size(); ++i) {
    TORCH_CHECK_VALUE(list[i].sizes() == weights[i].sizes(), "askew_cuda: ", name, "[", i, "] has shape ",
                      list[i].sizes(), " but weights[", i, "] has ", weights[i].sizes());
    TORCH_CHECK_VALUE(list[i].device() == weights[i].device(), "askew_cuda: ", name, "[", i, "] is on ",
                      list[i].device(), " but weights[", i, "] is on ", weights[i].device());
    TORCH_CHECK_VALUE(list[i].layout() == at::kStrided, "askew_cuda: ", name, "[", i, "] is not a dense tensor");
  }
}

}  // namespace

void check(const Lists& lists) {
  const auto& weights = lists.weights;
  for (size_t i = 0; i < weights.size(); ++i) {
    dtype_of(weights[i], "a weight");
    TORCH_CHECK_VALUE(at::has_internal_overlap(weights[i]) != at::MemOverlap::Yes, "askew_cuda: weights[", i,
                      "] of strides ", weights[i].strides(), " overlaps itself; clone() it");
    TORCH_CHECK_TYPE(weights[i].scalar_type() == weights[0].scalar_type(), "askew_cuda: weights[", i, "] is ",
                     weights[i].scalar_type(), " but weights[0] is ", weights[0].scalar_type(),
                     "; one call takes one dtype");
  }
  check_list("grads", lists.grads, weights, false);
  check_list("codes", lists.codes, weights, true);
  check_list("snapped", lists.snapped, weights, true);
  check_list("remainders", lists.remainders, weights, true);
  for (auto& [name, list] : lists.state) check_list(name, list, weights, true);
  const auto scalar_type = weights[0].scalar_type();
  for (size_t i = 0; i < weights.size(); ++i) {
    TORCH_CHECK_TYPE(lists.grads[i].scalar_type() == scalar_type, "askew_cuda: grads[", i, "] is ",
                     lists.grads[i].scalar_type(), " but weights[", i, "] is ", scalar_type);
    if (!lists.codes.empty())
      TORCH_CHECK_TYPE(lists.codes[i].scalar_type() == at::kByte, "askew_cuda: codes[", i, "] is ",
                       lists.codes[i].scalar_type(), "; codes are uint8");
    if (!lists.remainders.empty())
      TORCH_CHECK_TYPE(lists.remainders[i].scalar_type() == at::kShort, "askew_cuda: remainders[", i, "] is ",
                       lists.remainders[i].scalar_type(), "; remainders are int16");
    if (!lists.snapped.empty())
      TORCH_CHECK_TYPE(lists.snapped[i].scalar_type() == lists.snapped[0].scalar_type(), "askew_cuda: snapped[", i,
                       "] is ", lists.snapped[i].scalar_type(), " but snapped[0] is ", lists.snapped[0].scalar_type());
    for (auto& [name, list] : lists.state) {
      if (list.empty()) continue;
      const auto state_type = list[i].scalar_type();
      const bool wide = state_type == at::kFloat && weights[0].element_size() == 2;
      TORCH_CHECK_TYPE(state_type == scalar_type || wide, "askew_cuda: ", name, "[", i, "] is ", state_type,
                       " for weights of ", scalar_type, "; their dtype, or float32 for 16-bit weights, is supported");
      TORCH_CHECK_TYPE(state_type == lists.state[0].second[0].scalar_type(), "askew_cuda: ", name, "[", i, "] is ",
                       state_type, " but ", lists.state[0].first, "[0] is ", lists.state[0].second[0].scalar_type());
    }
  }
  const auto& levels = lists.levels;
  TORCH_CHECK_VALUE(levels.empty() || (levels.size() >= 2 && levels.size() <= 256), "askew_cuda: levels has ",
                    levels.size(), " entries; 2 to 256 are supported");
  for (size_t k = 0; k < levels.size(); ++k) {
    TORCH_CHECK_VALUE(static_cast<float>(levels[k]) == levels[k], "askew_cuda: levels[", k, "] = ", levels[k],
                      " is not a float32 number; round it first");
    if (k > 0)
      TORCH_CHECK_VALUE(levels[k] > levels[k - 1], "askew_cuda: levels[", k, "] = ", levels[k], " is not above levels[",
                        k - 1, "] = ", levels[k - 1], "; levels are strictly increasing");
  }
  const size_t wanted = levels.empty() ? 0 : weights.size();
  TORCH_CHECK_VALUE(lists.scales.size() == wanted, "askew_cuda: scales has ", lists.scales.size(), " tensors; ", wanted,
                    " are needed for ", weights.size(), " weights and ", levels.size(), " levels");
  for (size_t i = 0; i < lists.scales.size(); ++i) check_scale(weights[i], lists.scales[i], i);
  TORCH_CHECK_VALUE(!levels.empty() || (lists.codes.empty() && lists.snapped.empty()),
                    "askew_cuda: codes and snapped need levels");
}

std::vector<Span> spans_of(const Lists& lists, bool in_order, Layout& layout) {
  std::vector<Span> spans(lists.weights.size());
  for (size_t i = 0; i < spans.size(); ++i) {
    Span& span = spans[i];
    const Tensor& weight = layout.weight(lists.weights[i], in_order);
    span = Span{};
    span.weight = weight.mutable_data_ptr();
    span.grad = layout.like(weight, lists.grads[i], false).const_data_ptr();
    for (size_t k = 0; k < lists.state.size(); ++k) {
      if (!lists.state[k].second.empty())
        span.state[k] = layout.like(weight, lists.state[k].second[i], true).mutable_data_ptr();
    }
    if (!lists.codes.empty())
      span.codes = static_cast<uint8_t*>(layout.like(weight, lists.codes[i], true).mutable_data_ptr());
    if (!lists.snapped.empty()) span.snapped = layout.like(weight, lists.snapped[i], true).mutable_data_ptr();
    if (!lists.remainders.empty()) span.remainder = layout.like(weight, lists.remainders[i], true).mutable_data_ptr();
    span.size = weight.numel();
    if (!lists.levels.empty()) set_scale(span, weight, lists.scales[i], layout);
  }
  return spans;
}

void bump_versions(const Lists& lists) {
  for (TensorList list : {lists.weights, lists.codes, lists.snapped, lists.remainders}) {
    for (const Tensor& tensor : list)
      if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace askew
