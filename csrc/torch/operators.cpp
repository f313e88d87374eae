// The operators: schemas, settings, and the spans to the backend of their device. One function for all devices.
#include "operators.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <map>
#include <optional>
#include <vector>

#include "arguments.h"

namespace askew {

std::atomic<CpuStep> cpu_step{cpu_step_baseline};

namespace {

using at::Tensor;
using at::TensorList;

// Chunks to torch's threads. One is worth waking for a chunk's worth of weights, however many tensors they lie in.
void run_cpu(const Launch& launch) {
  std::vector<int64_t> first_chunk(launch.span_count + 1, 0);
  int64_t total = 0;
  for (int64_t i = 0; i < launch.span_count; ++i) {
    first_chunk[i + 1] = first_chunk[i] + chunks_of(launch.spans[i].size, cpu_chunk);
    total += launch.spans[i].size;
  }
  const int64_t chunks = first_chunk[launch.span_count], grain = chunks * cpu_chunk / std::max<int64_t>(total, 1);
  const CpuStep step = cpu_step;
  at::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) { step(launch, first_chunk.data(), begin, end); });
}

// One operator call on its way: all that both rules share.
class Call {
 public:
  Call(const Lists& lists, Rule rule, const std::optional<Tensor>& seed, at::IntArrayRef streams,
       at::IntArrayRef first_elements)
      : lists_(lists), device_(lists.weights[0].device()), streams_(streams), first_elements_(first_elements) {
    launch_.rule = rule;
    launch_.levels = {lists.levels.data(), static_cast<int>(lists.levels.size())};
    check(lists);
#if defined(ASKEW_WITH_CUDA)
    TORCH_CHECK_VALUE(device_.is_cpu() || device_.is_cuda(), "askew_cuda: weights[0] is on ", device_,
                      "; the CPU and CUDA are supported");
#else
    TORCH_CHECK_VALUE(device_.is_cpu(), "askew_cuda: weights[0] is on ", device_,
                      " and the extension was built for the CPU only");
#endif
    take_rounding(seed);
  }

  Settings& settings() { return launch_.settings; }
  bool on_device(const Tensor& tensor) const { return !tensor.is_cpu() && tensor.device() == device_; }

  // A number into its setting; where only the device knows it, what tells the kernel where it is.
  void take(const char* name, const Tensor& tensor, double& setting, DeviceNumber& number) const {
    TORCH_CHECK_VALUE(tensor.numel() == 1, "askew_cuda: ", name, " has shape ", tensor.sizes(),
                      "; one number is needed");
    if (device_.is_cpu() || tensor.is_cpu()) {
      setting = tensor.item<double>();
      return;
    }
    TORCH_CHECK_VALUE(tensor.device() == device_, "askew_cuda: ", name, " is on ", tensor.device(),
                      " but weights[0] is on ", device_);
    const bool is_double = tensor.scalar_type() == at::kDouble;
    TORCH_CHECK_TYPE(is_double || tensor.scalar_type() == at::kFloat, "askew_cuda: ", name, " is ",
                     tensor.scalar_type(), " on ", device_, "; float32 and float64 are read there");
    number = {tensor.const_data_ptr(), is_double};
  }

  // What both operators take. False where AMP found an infinity, as far as the host knows: the step leaves everything
  // as it is.
  bool take_common(const Tensor& lr, double weight_decay, bool maximize, const Tensor& epsilon, c10::string_view anneal,
                   c10::string_view skew_at, std::optional<double> recovery, std::optional<double> alpha,
                   double max_step, bool clip, const std::optional<Tensor>& grad_scale,
                   const std::optional<Tensor>& found_inf) {
    Settings& s = launch_.settings;
    take("lr", lr, s.lr, numbers_.lr);
    take("epsilon", epsilon, s.epsilon, numbers_.epsilon);
    s.weight_decay = weight_decay;
    s.maximize = maximize;
    s.interval = one_of("anneal", anneal, "interval", "capture");
    s.skew_gradient = one_of("skew_at", skew_at, "gradient", "velocity");
    TORCH_CHECK_VALUE(recovery.has_value() != alpha.has_value(),
                      "askew_cuda: give recovery or alpha, not both and not neither");
    TORCH_CHECK_VALUE(!s.skew_gradient || (s.interval && alpha.has_value()),
                      "askew_cuda: skew_at = 'gradient' needs alpha and anneal = 'interval'");
    s.rate_is_alpha = alpha.has_value();
    s.rate = s.rate_is_alpha ? *alpha : *recovery;
    s.max_step = max_step;
    s.clip = clip;
    if (grad_scale) take("grad_scale", *grad_scale, s.grad_scale, numbers_.grad_scale);
    double found = 0;
    if (found_inf) take("found_inf", *found_inf, found, numbers_.found_inf);
    return found == 0;
  }

  bool found_inf_on_device() const { return numbers_.found_inf.at != nullptr; }

  // The step. steps: those of each weight, for AdamW, where the host keeps them; else empty. counters: where the device
  // does.
  void run(const std::vector<double>& steps, TensorList counters) {
    Layout layout;
    std::vector<Span> spans = spans_of(lists_, launch_.rounding == Rounding::stochastic, layout);
    for (size_t i = 0; i < streams_.size(); ++i) spans[i].stream = static_cast<uint64_t>(streams_[i]);
    for (size_t i = 0; i < first_elements_.size(); ++i) spans[i].first_element = first_elements_[i];
    for (size_t i = 0; i < counters.size(); ++i) spans[i].step = counters[i].mutable_data_ptr();
    if (!counters.empty()) numbers_.step_is_double = counters[0].scalar_type() == at::kDouble;
    const TensorList state = lists_.state[0].second, snapped = lists_.snapped;
    launch_.dtype = dtype_of(lists_.weights[0], "weights[0]");
    launch_.wide_state = !state.empty() && state[0].scalar_type() != lists_.weights[0].scalar_type();
    launch_.snapped_dtype = snapped.empty() ? Dtype::float32 : dtype_of(snapped[0], "snapped[0]");
    // With a remainder a weight is a float32 number.
    launch_.settings.snap_unit =
        snap_unit(launch_.rounding == Rounding::remainder ? Dtype::float32 : launch_.dtype, launch_.levels);
    if (std::adjacent_find(steps.begin(), steps.end(), std::not_equal_to<>()) == steps.end())
      run_together(spans, steps.empty() ? 0 : steps[0]);
    else
      run_by_steps(spans, steps);
    layout.write_back();
    bump_versions(lists_);
  }

 private:
  // How 16-bit weights are rounded; others are as exact as the arithmetic.
  void take_rounding(const std::optional<Tensor>& seed) {
    if (lists_.weights[0].element_size() != 2) {
      TORCH_CHECK_VALUE(!seed && lists_.remainders.empty(), "askew_cuda: weights[0] is ",
                        lists_.weights[0].scalar_type(), "; remainders and seed are for bfloat16 and float16");
      return;
    }
    TORCH_CHECK_VALUE(!seed || lists_.remainders.empty(), "askew_cuda: give remainders or a seed, not both");
    for (const auto& [name, list] : {std::pair{"streams", streams_}, std::pair{"first_elements", first_elements_}})
      TORCH_CHECK_VALUE(list.empty() || list.size() == lists_.weights.size(), "askew_cuda: ", name, " has ",
                        list.size(), " entries for ", lists_.weights.size(), " weights");
    if (!lists_.remainders.empty()) launch_.rounding = Rounding::remainder;
    if (!seed) return;
    launch_.rounding = Rounding::stochastic;
    TORCH_CHECK_TYPE(seed->numel() == 1 && seed->scalar_type() == at::kLong, "askew_cuda: seed is ", seed->toString(),
                     " of shape ", seed->sizes(), "; one int64 number is needed");
    TORCH_CHECK_VALUE(seed->is_cpu() || seed->device() == device_, "askew_cuda: seed is on ", seed->device(),
                      " but weights[0] is on ", device_);
    if (seed->is_cpu())
      launch_.settings.seed = static_cast<uint64_t>(seed->item<int64_t>());
    else
      numbers_.seed = seed->const_data_ptr<int64_t>();
  }

  static bool one_of(const char* name, c10::string_view value, const char* yes, const char* no) {
    TORCH_CHECK_VALUE(value == yes || value == no, "askew_cuda: ", name, " = '", value, "'; '", yes, "' or '", no, "'");
    return value == yes;
  }

  void run_together(const std::vector<Span>& spans, double steps) {
    launch_.spans = spans.data();
    launch_.span_count = static_cast<int64_t>(spans.size());
    launch_.settings.steps = steps;
    if (device_.is_cpu()) run_cpu(launch_);
#if defined(ASKEW_WITH_CUDA)
    if (device_.is_cuda()) run_cuda(launch_, numbers_, device_);
#endif
  }

  void run_by_steps(const std::vector<Span>& spans, const std::vector<double>& steps) {
    std::map<double, std::vector<Span>> alike;
    for (size_t i = 0; i < spans.size(); ++i) alike[steps[i]].push_back(spans[i]);
    for (const auto& [count, some] : alike) run_together(some, count);
  }

  const Lists& lists_;
  const at::Device device_;
  const at::IntArrayRef streams_, first_elements_;
  Launch launch_{};
  DeviceNumbers numbers_{};
};

void check_steps(TensorList steps, TensorList weights, bool on_device) {
  TORCH_CHECK_VALUE(steps.size() == weights.size(), "askew_cuda: steps has ", steps.size(), " tensors for ",
                    weights.size(), " weights");
  for (size_t i = 0; i < steps.size(); ++i) {
    const bool floating = steps[i].scalar_type() == at::kFloat || steps[i].scalar_type() == at::kDouble;
    const bool there = steps[i].is_cpu() ? !on_device : on_device && steps[i].device() == weights[i].device();
    TORCH_CHECK_TYPE(steps[i].numel() == 1 && floating && there, "askew_cuda: steps[", i, "] is ", steps[i].toString(),
                     " on ", steps[i].device(), " of shape ", steps[i].sizes(), "; a 0-d float32 or float64 tensor on ",
                     on_device ? weights[i].device() : at::Device(at::kCPU), " is needed");
    TORCH_CHECK_TYPE(steps[i].scalar_type() == steps[0].scalar_type() || !on_device, "askew_cuda: steps[", i, "] is ",
                     steps[i].scalar_type(), " but steps[0] is ", steps[0].scalar_type());
  }
}

}  // namespace

void sgd_(TensorList weights, TensorList grads, TensorList momentum_buffers, TensorList scales,
          at::ArrayRef<double> levels, TensorList codes, TensorList snapped, TensorList remainders, const Tensor& lr,
          double momentum, double dampening, double weight_decay, bool nesterov, bool maximize, const Tensor& epsilon,
          c10::string_view anneal, c10::string_view skew_at, std::optional<double> recovery,
          std::optional<double> alpha, double max_step, bool clip, const std::optional<Tensor>& grad_scale,
          const std::optional<Tensor>& found_inf, const std::optional<Tensor>& seed, at::IntArrayRef streams,
          at::IntArrayRef first_elements) {
  if (weights.empty()) return;
  const Lists lists{weights,    grads, {{"momentum_buffers", momentum_buffers}}, scales, codes, snapped,
                    remainders, levels};
  Call call(lists, Rule::sgd, seed, streams, first_elements);
  TORCH_CHECK_VALUE(momentum == 0 || !momentum_buffers.empty(), "askew_cuda: momentum = ", momentum,
                    " needs momentum_buffers");
  Settings& settings = call.settings();
  settings.momentum = momentum;
  settings.dampening = dampening;
  settings.nesterov = nesterov;
  if (call.take_common(lr, weight_decay, maximize, epsilon, anneal, skew_at, recovery, alpha, max_step, clip,
                       grad_scale, found_inf))
    call.run({}, {});
}

void adamw_(TensorList weights, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
            TensorList max_exp_avg_sqs, TensorList steps, TensorList scales, at::ArrayRef<double> levels,
            TensorList codes, TensorList snapped, TensorList remainders, const Tensor& lr, double beta1, double beta2,
            double eps, double weight_decay, bool amsgrad, bool maximize, const Tensor& epsilon,
            c10::string_view anneal, c10::string_view skew_at, std::optional<double> recovery,
            std::optional<double> alpha, double max_step, bool clip, const std::optional<Tensor>& grad_scale,
            const std::optional<Tensor>& found_inf, const std::optional<Tensor>& seed, at::IntArrayRef streams,
            at::IntArrayRef first_elements) {
  if (weights.empty()) return;
  const Lists lists{
      weights,    grads, {{"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}, {"max_exp_avg_sqs", max_exp_avg_sqs}},
      scales,     codes, snapped,
      remainders, levels};
  TORCH_CHECK_VALUE(!exp_avgs.empty() && !exp_avg_sqs.empty(), "askew_cuda: adamw_ needs exp_avgs and exp_avg_sqs");
  Call call(lists, Rule::adamw, seed, streams, first_elements);
  TORCH_CHECK_VALUE(amsgrad == !max_exp_avg_sqs.empty(), "askew_cuda: amsgrad = ", amsgrad, " but max_exp_avg_sqs has ",
                    max_exp_avg_sqs.size(), " tensors");
  const bool on_device = !steps.empty() && call.on_device(steps[0]);
  check_steps(steps, weights, on_device);
  Settings& settings = call.settings();
  settings.beta1 = beta1;
  settings.beta2 = beta2;
  settings.adam_eps = eps;
  settings.amsgrad = amsgrad;
  if (!call.take_common(lr, weight_decay, maximize, epsilon, anneal, skew_at, recovery, alpha, max_step, clip,
                        grad_scale, found_inf))
    return;
  TORCH_CHECK_VALUE(
      on_device || !call.found_inf_on_device(), "askew_cuda: found_inf is on ", weights[0].device(),
      " but steps[0] on the CPU, where nothing knows whether this step counts; keep the steps with the weights");
  if (on_device) return call.run({}, steps);
  std::vector<double> counted;
  counted.reserve(steps.size());
  for (const Tensor& tensor : steps) counted.push_back(tensor.item<double>() + 1);
  call.run(counted, {});
  for (const Tensor& tensor : steps)
    tensor.scalar_type() == at::kFloat ? *tensor.mutable_data_ptr<float>() += 1
                                       : *tensor.mutable_data_ptr<double>() += 1;
}

}  // namespace askew

#define ASKEW_CONSTRAINT                                                                                        \
  "Tensor epsilon, str anneal, str skew_at, float? recovery, float? alpha, float max_step, bool clip, Tensor? " \
  "grad_scale=None, Tensor? "                                                                                   \
  "found_inf=None, Tensor? seed=None, int[] streams=[], int[] first_elements=[]"

TORCH_LIBRARY(askew_cuda, m) {
  m.def(
      "sgd_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor[] scales, float[] levels, "
      "Tensor(c!)[] codes, "
      "Tensor(d!)[] snapped, Tensor(e!)[] remainders, *, "
      "Tensor lr, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, " ASKEW_CONSTRAINT
      ") -> ()");
  m.def(
      "adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] "
      "max_exp_avg_sqs, "
      "Tensor(e!)[] steps, "
      "Tensor[] scales, float[] levels, Tensor(f!)[] codes, Tensor(g!)[] snapped, Tensor(h!)[] remainders, *, "
      "Tensor lr, float beta1, float beta2, float eps, float weight_decay, bool amsgrad, bool "
      "maximize, " ASKEW_CONSTRAINT ") -> ()");
}

TORCH_LIBRARY_IMPL(askew_cuda, CPU, m) {
  m.impl("sgd_", askew::sgd_);
  m.impl("adamw_", askew::adamw_);
}

#if defined(ASKEW_WITH_CUDA)
TORCH_LIBRARY_IMPL(askew_cuda, CUDA, m) {
  m.impl("sgd_", askew::sgd_);
  m.impl("adamw_", askew::adamw_);
}
#endif
