// The operators: schemas, checks, tensors to spans, chunks to torch's threads. With csrc/module.cpp the only file that knows torch.
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <deque>
#include <optional>
#include <vector>

#include "ops.h"

namespace askew {

std::atomic<CpuStep> cpu_step{cpu_step_baseline};

namespace {

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

// Tensors in the memory order of their weight. One that lies otherwise is copied, and copied back if it is written to.
class Layout {
 public:
  const Tensor& weight(const Tensor& tensor) {
    if (tensor.is_non_overlapping_and_dense()) return tensor;
    return copied(tensor, at::empty_like(tensor, at::MemoryFormat::Contiguous), true);
  }
  const Tensor& like(const Tensor& weight, const Tensor& tensor, bool written) {
    if (tensor.strides() == weight.strides()) return tensor;
    return copied(tensor, at::empty_like(weight, weight.options().dtype(tensor.scalar_type())), written);
  }
  void* keep(Tensor tensor) { return copies_.emplace_back(std::move(tensor)).mutable_data_ptr(); }
  void write_back() {
    for (auto& [original, copy] : written_) original->copy_(*copy);
  }

 private:
  const Tensor& copied(const Tensor& tensor, Tensor copy, bool written) {
    copy.copy_(tensor);
    const Tensor& kept = copies_.emplace_back(std::move(copy));
    if (written) written_.emplace_back(&tensor, &kept);
    return kept;
  }
  std::deque<Tensor> copies_;  // a deque: they stay where they are
  std::vector<std::pair<const Tensor*, const Tensor*>> written_;
};

// Fills scale, scale_run and scale_count for a weight in memory order.
void set_scale(Span& span, const Tensor& weight, const Tensor& scale, size_t which, Layout& layout) {
  const auto wanted = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_TYPE(scale.scalar_type() == wanted, "askew_cuda: scales[", which, "] has dtype ", scale.scalar_type(), "; ", wanted,
                   " goes with weights of ", weight.scalar_type());
  TORCH_CHECK_VALUE(scale.device() == weight.device(), "askew_cuda: scales[", which, "] is on ", scale.device(), " but weights[", which,
                    "] is on ", weight.device());
  const int64_t size = weight.numel(), count = scale.numel();
  const bool channels =
      count > 1 && weight.dim() > 0 && scale.dim() == weight.dim() && scale.size(0) == weight.size(0) && count == weight.size(0);
  const bool groups =
      count > 1 && weight.dim() > 1 && scale.dim() == 2 && scale.size(0) == weight.size(0) && (size / scale.size(0)) % scale.size(1) == 0;
  TORCH_CHECK_VALUE(count == 1 || channels || groups || size == 0, "askew_cuda: scales[", which, "] has shape ", scale.sizes(),
                    " for a weight of shape ", weight.sizes(), "; (), (channels, 1, ..) or (rows, groups) are understood");
  span.scale_count = count;
  if (count <= 1) {  // 0: an empty weight has no chunk, and needs none
    span.scale_run = size > 0 ? size : 1;
  } else if (weight.is_contiguous()) {
    span.scale_run = size / count;
  } else if (channels || scale.size(1) == 1) {
    span.scale_run = weight.stride(0);
  } else {  // groups are counted in logical order: in another memory order each weight brings its own
    const Tensor each = scale.reshape({count, 1}).expand({count, size / count}).reshape(weight.sizes());
    span.scale = layout.keep(at::empty_like(weight, weight.options().dtype(wanted)).copy_(each));
    span.scale_run = 1;
    span.scale_count = size;
    return;
  }
  span.scale = scale.is_contiguous() ? scale.const_data_ptr() : layout.keep(scale.contiguous());
}

// The lists of one call; state[k] is empty or has a tensor for each weight.
struct Lists {
  TensorList weights, grads;
  std::vector<std::pair<const char*, TensorList>> state;
  TensorList scales, codes, snapped;
  at::ArrayRef<double> levels;
};

void check_list(const char* name, TensorList list, TensorList weights, bool optional) {
  TORCH_CHECK_VALUE((optional && list.empty()) || list.size() == weights.size(), "askew_cuda: ", name, " has ", list.size(),
                    " tensors for ", weights.size(), " weights");
  for (size_t i = 0; i < list.size(); ++i) {
    TORCH_CHECK_VALUE(list[i].sizes() == weights[i].sizes(), "askew_cuda: ", name, "[", i, "] has shape ", list[i].sizes(), " but weights[",
                      i, "] has ", weights[i].sizes());
    TORCH_CHECK_VALUE(list[i].device() == weights[i].device(), "askew_cuda: ", name, "[", i, "] is on ", list[i].device(), " but weights[",
                      i, "] is on ", weights[i].device());
    TORCH_CHECK_VALUE(list[i].layout() == at::kStrided, "askew_cuda: ", name, "[", i, "] is not a dense tensor");
  }
}

// All that can be wrong is found here, before anything is written.
void check(const Lists& lists) {
  const auto& weights = lists.weights;
  for (size_t i = 0; i < weights.size(); ++i) {
    dtype_of(weights[i], "a weight");
    TORCH_CHECK_VALUE(at::has_internal_overlap(weights[i]) != at::MemOverlap::Yes, "askew_cuda: weights[", i, "] of strides ",
                      weights[i].strides(), " overlaps itself; clone() it");
    TORCH_CHECK_TYPE(weights[i].scalar_type() == weights[0].scalar_type(), "askew_cuda: weights[", i, "] is ", weights[i].scalar_type(),
                     " but weights[0] is ", weights[0].scalar_type(), "; one call takes one dtype");
  }
  check_list("grads", lists.grads, weights, false);
  check_list("codes", lists.codes, weights, true);
  check_list("snapped", lists.snapped, weights, true);
  for (auto& [name, list] : lists.state) check_list(name, list, weights, true);
  const auto scalar_type = weights[0].scalar_type();
  for (size_t i = 0; i < weights.size(); ++i) {
    TORCH_CHECK_TYPE(lists.grads[i].scalar_type() == scalar_type, "askew_cuda: grads[", i, "] is ", lists.grads[i].scalar_type(),
                     " but weights[", i, "] is ", scalar_type);
    if (!lists.codes.empty())
      TORCH_CHECK_TYPE(lists.codes[i].scalar_type() == at::kByte, "askew_cuda: codes[", i, "] is ", lists.codes[i].scalar_type(),
                       "; codes are uint8");
    if (!lists.snapped.empty())
      TORCH_CHECK_TYPE(lists.snapped[i].scalar_type() == lists.snapped[0].scalar_type(), "askew_cuda: snapped[", i, "] is ",
                       lists.snapped[i].scalar_type(), " but snapped[0] is ", lists.snapped[0].scalar_type());
    for (auto& [name, list] : lists.state) {
      if (list.empty()) continue;
      const auto state_type = list[i].scalar_type();
      const bool wide = state_type == at::kFloat && weights[0].element_size() == 2;
      TORCH_CHECK_TYPE(state_type == scalar_type || wide, "askew_cuda: ", name, "[", i, "] is ", state_type, " for weights of ",
                       scalar_type, "; their dtype, or float32 for 16-bit weights, is supported");
      TORCH_CHECK_TYPE(state_type == lists.state[0].second[0].scalar_type(), "askew_cuda: ", name, "[", i, "] is ", state_type, " but ",
                       lists.state[0].first, "[0] is ", lists.state[0].second[0].scalar_type());
    }
  }
  const auto& levels = lists.levels;
  TORCH_CHECK_VALUE(levels.empty() || (levels.size() >= 2 && levels.size() <= 256), "askew_cuda: levels has ", levels.size(),
                    " entries; 2 to 256 are supported");
  for (size_t k = 0; k < levels.size(); ++k) {
    TORCH_CHECK_VALUE(static_cast<float>(levels[k]) == levels[k], "askew_cuda: levels[", k, "] = ", levels[k],
                      " is not a float32 number; round it first");
    if (k > 0)
      TORCH_CHECK_VALUE(levels[k] > levels[k - 1], "askew_cuda: levels[", k, "] = ", levels[k], " is not above levels[", k - 1,
                        "] = ", levels[k - 1], "; levels are strictly increasing");
  }
  const size_t wanted = levels.empty() ? 0 : weights.size();
  TORCH_CHECK_VALUE(lists.scales.size() == wanted, "askew_cuda: scales has ", lists.scales.size(), " tensors; ", wanted, " are needed for ",
                    weights.size(), " weights and ", levels.size(), " levels");
  TORCH_CHECK_VALUE(!levels.empty() || (lists.codes.empty() && lists.snapped.empty()), "askew_cuda: codes and snapped need levels");
}

// Chunks to threads. `bias`, for AdamW, is each weight's.
void run_cpu(const Lists& lists, Rule rule, const Settings& settings, const std::vector<Bias<double>>& bias) {
  const size_t count = lists.weights.size();
  Layout layout;
  std::vector<Span> spans(count);
  std::vector<int64_t> first_chunk(count + 1, 0);
  int64_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    Span& span = spans[i];
    const Tensor& weight = layout.weight(lists.weights[i]);
    span = Span{};
    span.weight = weight.mutable_data_ptr();
    span.grad = layout.like(weight, lists.grads[i], false).const_data_ptr();
    for (size_t k = 0; k < lists.state.size(); ++k) {
      if (!lists.state[k].second.empty()) span.state[k] = layout.like(weight, lists.state[k].second[i], true).mutable_data_ptr();
    }
    if (!lists.codes.empty()) span.codes = static_cast<uint8_t*>(layout.like(weight, lists.codes[i], true).mutable_data_ptr());
    if (!lists.snapped.empty()) span.snapped = layout.like(weight, lists.snapped[i], true).mutable_data_ptr();
    span.size = weight.numel();
    if (!lists.levels.empty()) set_scale(span, weight, lists.scales[i], i, layout);
    if (!bias.empty()) span.bias = bias[i];
    first_chunk[i + 1] = first_chunk[i] + chunks_of(span.size);
    total += span.size;
  }
  const bool wide = !lists.state[0].second.empty() && lists.state[0].second[0].scalar_type() != lists.weights[0].scalar_type();
  const Launch launch{dtype_of(lists.weights[0], "weights[0]"),
                      wide,
                      rule,
                      settings,
                      {lists.levels.data(), static_cast<int>(lists.levels.size())},
                      lists.snapped.empty() ? Dtype::float32 : dtype_of(lists.snapped[0], "snapped[0]"),
                      spans.data(),
                      first_chunk.data(),
                      static_cast<int64_t>(count)};
  const CpuStep step = cpu_step;
  // A thread is worth waking for a chunk's worth of weights, however many tensors they lie in.
  const int64_t grain = first_chunk[count] * chunk_size / std::max<int64_t>(total, 1);
  at::parallel_for(0, first_chunk[count], grain, [&](int64_t begin, int64_t end) { step(launch, begin, end); });
  layout.write_back();
  // Autograd must see that these changed: a backward pass over a graph from before the step is an error, as with torch's optimizers.
  for (TensorList list : {lists.weights, lists.codes, lists.snapped}) {
    for (const Tensor& tensor : list)
      if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
}

bool one_of(const char* name, c10::string_view value, const char* yes, const char* no) {
  TORCH_CHECK_VALUE(value == yes || value == no, "askew_cuda: ", name, " = '", value, "'; '", yes, "' or '", no, "'");
  return value == yes;
}

double number(const Tensor& tensor) { return tensor.item<double>(); }

// What both operators share; false where AMP found an infinity: the step leaves everything as it is.
bool common_settings(Settings& s, const Tensor& lr, double weight_decay, bool maximize, const Tensor& epsilon, c10::string_view anneal,
                     c10::string_view skew_at, std::optional<double> recovery, std::optional<double> alpha, double max_step, bool clip,
                     const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  s.lr = number(lr);
  s.weight_decay = weight_decay;
  s.maximize = maximize;
  s.epsilon = number(epsilon);
  s.interval = one_of("anneal", anneal, "interval", "capture");
  s.skew_gradient = one_of("skew_at", skew_at, "gradient", "velocity");
  TORCH_CHECK_VALUE(recovery.has_value() != alpha.has_value(), "askew_cuda: give recovery or alpha, not both and not neither");
  TORCH_CHECK_VALUE(!s.skew_gradient || (s.interval && alpha.has_value()),
                    "askew_cuda: skew_at = 'gradient' needs alpha and anneal = 'interval'");
  s.rate_is_alpha = alpha.has_value();
  s.rate = s.rate_is_alpha ? *alpha : *recovery;
  s.max_step = max_step;
  s.clip = clip;
  if (grad_scale) s.grad_scale = number(*grad_scale);
  return !(found_inf && number(*found_inf) != 0);
}

}  // namespace

void sgd_(TensorList weights, TensorList grads, TensorList momentum_buffers, TensorList scales, at::ArrayRef<double> levels,
          TensorList codes, TensorList snapped, const Tensor& lr, double momentum, double dampening, double weight_decay, bool nesterov,
          bool maximize, const Tensor& epsilon, c10::string_view anneal, c10::string_view skew_at, std::optional<double> recovery,
          std::optional<double> alpha, double max_step, bool clip, const std::optional<Tensor>& grad_scale,
          const std::optional<Tensor>& found_inf) {
  if (weights.empty()) return;
  const Lists lists{weights, grads, {{"momentum_buffers", momentum_buffers}}, scales, codes, snapped, levels};
  check(lists);
  TORCH_CHECK_VALUE(momentum == 0 || !momentum_buffers.empty(), "askew_cuda: momentum = ", momentum, " needs momentum_buffers");
  Settings settings;
  if (!common_settings(settings, lr, weight_decay, maximize, epsilon, anneal, skew_at, recovery, alpha, max_step, clip, grad_scale,
                       found_inf))
    return;
  settings.momentum = momentum;
  settings.dampening = dampening;
  settings.nesterov = nesterov;
  run_cpu(lists, Rule::sgd, settings, {});
}

void adamw_(TensorList weights, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList max_exp_avg_sqs, TensorList steps,
            TensorList scales, at::ArrayRef<double> levels, TensorList codes, TensorList snapped, const Tensor& lr, double beta1,
            double beta2, double eps, double weight_decay, bool amsgrad, bool maximize, const Tensor& epsilon, c10::string_view anneal,
            c10::string_view skew_at, std::optional<double> recovery, std::optional<double> alpha, double max_step, bool clip,
            const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  if (weights.empty()) return;
  const Lists lists{weights, grads, {{"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}, {"max_exp_avg_sqs", max_exp_avg_sqs}},
                    scales,  codes, snapped,
                    levels};
  TORCH_CHECK_VALUE(!exp_avgs.empty() && !exp_avg_sqs.empty(), "askew_cuda: adamw_ needs exp_avgs and exp_avg_sqs");
  check(lists);
  TORCH_CHECK_VALUE(amsgrad == !max_exp_avg_sqs.empty(), "askew_cuda: amsgrad = ", amsgrad, " but max_exp_avg_sqs has ",
                    max_exp_avg_sqs.size(), " tensors");
  TORCH_CHECK_VALUE(steps.size() == weights.size(), "askew_cuda: steps has ", steps.size(), " tensors for ", weights.size(), " weights");
  for (size_t i = 0; i < steps.size(); ++i) {
    TORCH_CHECK_TYPE(
        steps[i].numel() == 1 && (steps[i].scalar_type() == at::kFloat || steps[i].scalar_type() == at::kDouble) && steps[i].is_cpu(),
        "askew_cuda: steps[", i, "] is ", steps[i].toString(), " of shape ", steps[i].sizes(),
        "; a 0-d float32 or float64 CPU tensor is needed");
  }
  Settings settings;
  if (!common_settings(settings, lr, weight_decay, maximize, epsilon, anneal, skew_at, recovery, alpha, max_step, clip, grad_scale,
                       found_inf))
    return;
  settings.beta1 = beta1;
  settings.beta2 = beta2;
  settings.adam_eps = eps;
  settings.amsgrad = amsgrad;
  std::vector<Bias<double>> bias;
  bias.reserve(steps.size());
  for (const Tensor& tensor : steps) {
    const double step = number(tensor) + 1;
    bias.push_back({1 / (1 - std::pow(beta1, step)), 1 / std::sqrt(1 - std::pow(beta2, step))});
  }
  run_cpu(lists, Rule::adamw, settings, bias);
  for (const Tensor& tensor : steps)
    tensor.scalar_type() == at::kFloat ? *tensor.mutable_data_ptr<float>() += 1 : *tensor.mutable_data_ptr<double>() += 1;
}

}  // namespace askew

#define ASKEW_CONSTRAINT                                                                                                                 \
  "Tensor epsilon, str anneal, str skew_at, float? recovery, float? alpha, float max_step, bool clip, Tensor? grad_scale=None, Tensor? " \
  "found_inf=None"

TORCH_LIBRARY(askew_cuda, m) {
  m.def(
      "sgd_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor[] scales, float[] levels, Tensor(c!)[] codes, "
      "Tensor(d!)[] snapped, *, "
      "Tensor lr, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, " ASKEW_CONSTRAINT ") -> ()");
  m.def(
      "adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, "
      "Tensor(e!)[] steps, "
      "Tensor[] scales, float[] levels, Tensor(f!)[] codes, Tensor(g!)[] snapped, *, "
      "Tensor lr, float beta1, float beta2, float eps, float weight_decay, bool amsgrad, bool maximize, " ASKEW_CONSTRAINT ") -> ()");
}

TORCH_LIBRARY_IMPL(askew_cuda, CPU, m) {
  m.impl("sgd_", askew::sgd_);
  m.impl("adamw_", askew::adamw_);
}
