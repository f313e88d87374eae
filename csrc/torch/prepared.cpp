// From arguments to spans, and the spans to the backend of their device.
#include "prepared.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <map>
#include <optional>

namespace askew {

using at::Tensor;

const Tensor& MemoryOrder::weight(const Tensor& tensor, bool contiguous) {
  if (contiguous ? tensor.is_contiguous() : tensor.is_non_overlapping_and_dense()) return tensor;
  return copied(tensor, at::empty_like(tensor, at::MemoryFormat::Contiguous), true);
}

const Tensor& MemoryOrder::like(const Tensor& weight, const Tensor& tensor, bool written) {
  if (tensor.strides() == weight.strides()) return tensor;
  return copied(tensor, at::empty_like(weight, weight.options().dtype(tensor.scalar_type())), written);
}

void* MemoryOrder::keep(Tensor tensor) { return copies_.emplace_back(std::move(tensor)).mutable_data_ptr(); }

void MemoryOrder::write_back() {
  for (auto& [original, copy] : written_) original->copy_(*copy);
}

const Tensor& MemoryOrder::copied(const Tensor& tensor, Tensor copy, bool written) {
  copy.copy_(tensor);
  const Tensor& kept = copies_.emplace_back(std::move(copy));
  if (written) written_.emplace_back(&tensor, &kept);
  return kept;
}

namespace {

// askew_cuda/reference.py, spread(): the scale of each weight, in the weight's memory order.
Tensor spread(const Tensor& weight, const Tensor& scale) {
  std::vector<int64_t> each, runs;
  if (scale.dim() == weight.dim()) {
    for (int64_t d = 0; d < scale.dim(); ++d) {
      each.insert(each.end(), {scale.size(d), 1});
      runs.insert(runs.end(), {scale.size(d), weight.size(d) / scale.size(d)});
    }
  } else {  // (rows, groups)
    each = {scale.numel(), 1};
    runs = {scale.numel(), weight.numel() / scale.numel()};
  }
  const Tensor spread = scale.reshape(each).expand(runs).reshape(weight.sizes());
  return at::empty_like(weight, scale.options()).copy_(spread);
}

// Scales along a dimension of a weight: weights in memory that share one, and how many there are.
struct Digit {
  int64_t dim, run, count;
};

// The number of a weight's scale, digit by digit, innermost first. Nothing where the rows of another memory order have
// groups.
std::optional<std::vector<Digit>> digits_of(const Tensor& weight, const Tensor& scale) {
  if (scale.dim() != weight.dim()) {
    if (!weight.is_contiguous()) return std::nullopt;
    return std::vector<Digit>{{0, weight.numel() / scale.numel(), scale.numel()}};
  }
  std::vector<Digit> digits;
  for (int64_t d = 0; d < weight.dim(); ++d)
    if (scale.size(d) > 1) digits.push_back({d, weight.stride(d) * (weight.size(d) / scale.size(d)), scale.size(d)});
  std::sort(digits.begin(), digits.end(), [](const Digit& a, const Digit& b) { return a.run < b.run; });
  return digits;
}

void check_scale(const Tensor& weight, const Tensor& scale) {
  bool fits = scale.dim() == weight.dim();
  for (int64_t d = 0; fits && d < scale.dim(); ++d) fits = scale.size(d) > 0 && weight.size(d) % scale.size(d) == 0;
  const bool rows = scale.dim() == 2 && weight.dim() > 2 && scale.size(0) == weight.size(0) && scale.size(1) > 0 &&
                    (weight.numel() / weight.size(0)) % scale.size(1) == 0;
  TORCH_CHECK_VALUE(
      fits || rows, "askew_cuda: a scale has shape ", scale.sizes(), " for a weight of shape ", weight.sizes(),
      "; one number, in each dimension 1, the weight's size or a divisor of it, or (rows, groups) are understood");
}

// Fills what a span says of scales and their growths (undefined: none), for a weight in memory order.
void set_scale(Span& span, const Tensor& weight, const Tensor& scale, const Tensor& growth, MemoryOrder& order) {
  const int64_t size = weight.numel();
  const auto place = [&](const auto& arrange) {
    const auto pointer = [&](Tensor arranged) {
      return arranged.is_contiguous() ? arranged.const_data_ptr() : order.keep(arranged.contiguous());
    };
    span.scale = pointer(arrange(scale));
    if (growth.defined()) span.growth = pointer(arrange(growth));
  };
  span.scale_run = size > 0 ? size : 1;
  span.scale_count = 1;
  std::vector<int64_t> dims;  // of the scale, in the order in which the weight's memory meets them
  for (int64_t d = 0; d < scale.dim(); ++d) dims.push_back(d);
  if (scale.numel() > 1 && size > 0) {
    check_scale(weight, scale);
    auto digits = digits_of(weight, scale);
    if (digits && scale.dim() == weight.dim()) {
      dims.clear();
      for (auto digit = digits->rbegin(); digit != digits->rend(); ++digit) dims.push_back(digit->dim);
      for (int64_t d = 0; d < scale.dim(); ++d)
        if (scale.size(d) == 1) dims.push_back(d);
      for (size_t k = 1; k < digits->size();) {  // digits that follow each other without a gap are one
        Digit &inner = (*digits)[k - 1], &outer = (*digits)[k];
        if (outer.run != inner.run * inner.count) {
          ++k;
          continue;
        }
        inner.count *= outer.count;
        digits->erase(digits->begin() + static_cast<std::ptrdiff_t>(k));
      }
    }
    if (!digits || digits->size() > 2) {
      span.scale_run = 1;
      span.scale_count = size;
      return place([&](const Tensor& tensor) {
        const Tensor each = spread(weight, tensor);
        order.keep(each);
        return each.as_strided({size}, {1});
      });
    }
    span.scale_run = digits->front().run;
    span.scale_count = digits->front().count;
    if (digits->size() == 2) {
      span.outer_run = digits->back().run;
      span.outer_count = digits->back().count;
    }
  }
  place([&](const Tensor& tensor) { return tensor.permute(dims); });
}

// Chunks to torch's threads. One is worth waking for a chunk's worth of weights, however many tensors they lie in.
void run_cpu(const Launch& launch) {
  std::vector<int64_t> first_chunk(launch.span_count + 1, 0);
  int64_t total = 0;
  for (int64_t i = 0; i < launch.span_count; ++i) {
    first_chunk[i + 1] = first_chunk[i] + chunks_of(launch.spans[i].size, cpu_chunk);
    total += launch.spans[i].size;
  }
  const int64_t chunks = first_chunk[launch.span_count], grain = chunks * cpu_chunk / std::max<int64_t>(total, 1);
  const CpuStep step = cpu_kernels.load()->step;
  at::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) { step(launch, first_chunk.data(), begin, end); });
}

}  // namespace

PreparedCall::Seen::Seen(const Tensor& tensor)
    : data(tensor.const_data_ptr()),
      sizes(tensor.sizes()),
      strides(tensor.strides()),
      dtype(tensor.scalar_type()),
      device(tensor.device()) {}

bool PreparedCall::Seen::is(const Tensor& tensor) const {
  return tensor.const_data_ptr() == data && tensor.sizes() == at::IntArrayRef(sizes) &&
         tensor.strides() == at::IntArrayRef(strides) && tensor.scalar_type() == dtype && tensor.device() == device;
}

// All but the gradients.
template <typename Visit>
void PreparedCall::visit_tensors(const Visit& visit) {
  for (const auto* list : {&arguments_.weights, &arguments_.state[0], &arguments_.state[1], &arguments_.state[2],
                           &arguments_.steps, &arguments_.scales, &arguments_.codes, &arguments_.snapped,
                           &arguments_.remainders, &arguments_.growths, &arguments_.sums, &arguments_.velocities})
    for (const Tensor& tensor : *list) visit(tensor);
}

PreparedCall::PreparedCall(Arguments arguments) : arguments_(std::move(arguments)), device_(at::kCPU) {
  if (arguments_.weights.empty()) return;
  device_ = arguments_.weights[0].device();
#if defined(ASKEW_WITH_CUDA)
  TORCH_CHECK_VALUE(device_.is_cpu() || device_.is_cuda(), "askew_cuda: weights[0] is on ", device_,
                    "; the CPU and CUDA are supported");
#else
  TORCH_CHECK_VALUE(device_.is_cpu(), "askew_cuda: weights[0] is on ", device_,
                    " and the extension was built for the CPU only");
#endif
  arguments_.check();
  grad_type_ = arguments_.grads[0].scalar_type();
  visit_tensors([&](const Tensor& tensor) { seen_.emplace_back(tensor); });
  counts_there_ = !arguments_.steps.empty() && !arguments_.steps[0].is_cpu();
}

bool PreparedCall::take_gradients(const std::vector<Tensor>* given) {
  size_t k = 0;
  bool same = true;
  visit_tensors([&](const Tensor& tensor) { same = same && seen_[k++].is(tensor); });
  if (!same || (given && given->size() != arguments_.weights.size())) return false;
  for (size_t i = 0; i < arguments_.weights.size(); ++i) {
    const Tensor &weight = arguments_.weights[i], &grad = given ? (*given)[i] : weight.grad();
    arguments_.grads[i] = grad;
    if (grad.defined() &&
        !(grad.sizes() == weight.sizes() && grad.scalar_type() == grad_type_ && grad.device() == device_ &&
          grad.layout() == at::kStrided && (grad.numel() == 0 || grad.const_data_ptr())))
      return false;
  }
  return true;
}

// A number into its setting; where only the device knows it, what tells the kernel where it is.
void PreparedCall::take(const char* name, const Scalar& scalar, double& setting, DeviceNumber& number) {
  const Tensor& tensor = scalar.tensor;
  number = {};
  setting = scalar.value;
  if (!tensor.defined()) return;
  TORCH_CHECK_VALUE(tensor.numel() == 1, "askew_cuda: ", name, " has shape ", tensor.sizes(), "; one number is needed");
  if (device_.is_cpu() || tensor.is_cpu()) {
    setting = tensor.item<double>();
    return;
  }
  TORCH_CHECK_VALUE(tensor.device() == device_, "askew_cuda: ", name, " is on ", tensor.device(),
                    " but weights[0] is on ", device_);
  const bool is_double = tensor.scalar_type() == at::kDouble;
  TORCH_CHECK_TYPE(is_double || tensor.scalar_type() == at::kFloat, "askew_cuda: ", name, " is ", tensor.scalar_type(),
                   " on ", device_, "; float32 and float64 are read there");
  number = {tensor.const_data_ptr(), is_double};
}

void PreparedCall::take_numbers() {
  Settings& settings = launch_.settings;
  settings = arguments_.settings;
  double found = 0;
  take("lr", arguments_.lr, settings.lr, numbers_.lr);
  take("epsilon", arguments_.epsilon, settings.epsilon, numbers_.epsilon);
  take("grad_scale", arguments_.grad_scale, settings.grad_scale, numbers_.grad_scale);
  take("found_inf", arguments_.found_inf, found, numbers_.found_inf);
  skipped_ = found != 0;
  TORCH_CHECK_VALUE(
      arguments_.rule == Rule::sgd || counts_there_ || !numbers_.found_inf.at, "askew_cuda: found_inf is on ", device_,
      " but steps[0] on the CPU, where nothing knows whether this step counts; keep the steps with the weights");
  settings.learns = !arguments_.growths.empty();
  settings.rate_is_alpha = arguments_.alpha.has_value();
  settings.rate = settings.rate_is_alpha ? *arguments_.alpha : *arguments_.recovery;
  const Tensor& seed = arguments_.seed_tensor;
  const bool here = !seed.defined() || seed.is_cpu();
  TORCH_CHECK_VALUE(here || seed.device() == device_, "askew_cuda: seed is on ", seed.device(),
                    " but weights[0] is on ", device_);
  const int64_t number = seed.defined() && here ? seed.item<int64_t>() : arguments_.seed.value_or(0);
  settings.seed = static_cast<uint64_t>(number);
  numbers_.seed = here ? nullptr : seed.const_data_ptr<int64_t>();
}

void PreparedCall::make_spans() {
  const Arguments& a = arguments_;
  order_ = MemoryOrder();
  radial_ = RadialSums(a.rule);
  launch_.rule = a.rule;
  launch_.levels = {a.levels.data(), static_cast<int>(a.levels.size())};
  launch_.dtype = dtype_of(a.weights[0], "weights[0]");
  launch_.wide_grad = grad_type_ != a.weights[0].scalar_type();
  launch_.wide_state = !a.state[0].empty() && a.state[0][0].scalar_type() != a.weights[0].scalar_type();
  launch_.snapped_dtype = a.snapped.empty() ? Dtype::float32 : dtype_of(a.snapped[0], "snapped[0]");
  launch_.rounding = a.seed || a.seed_tensor.defined() ? Rounding::stochastic
                     : !a.remainders.empty()           ? Rounding::remainder
                                                       : Rounding::nearest;
  if (counts_there_) numbers_.step_is_double = a.steps[0].scalar_type() == at::kDouble;
  spans_.assign(a.weights.size(), Span{});
  for (size_t i = 0; i < spans_.size(); ++i) {
    if (!a.grads[i].defined()) continue;
    Span& span = spans_[i];
    // random bits count elements in logical order, and so do the sums that a scale learns by
    const bool logical = launch_.rounding == Rounding::stochastic || launch_.settings.learns;
    const Tensor& weight = order_.weight(a.weights[i], logical);
    const auto written = [&](const std::vector<Tensor>& list) {
      return list.empty() ? Tensor() : order_.like(weight, list[i], true);
    };
    const auto pointer = [](const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; };
    const Tensor state[3] = {written(a.state[0]), written(a.state[1]), written(a.state[2])};
    const Tensor remainder = written(a.remainders);
    span.weight = weight.mutable_data_ptr();
    const Tensor& grad = order_.like(weight, a.grads[i], false);
    span.grad = grad.const_data_ptr();
    for (int k = 0; k < 3; ++k) span.state[k] = pointer(state[k]);
    span.codes = static_cast<uint8_t*>(pointer(written(a.codes)));
    span.snapped = pointer(written(a.snapped));
    span.remainder = pointer(remainder);
    span.size = weight.numel();
    if (!a.levels.empty()) set_scale(span, weight, a.scales[i], a.growths.empty() ? Tensor() : a.growths[i], order_);
    if (!a.streams.empty()) span.stream = static_cast<uint64_t>(a.streams[i]);
    if (!a.first_elements.empty()) span.first_element = a.first_elements[i];
    if (counts_there_) span.step = a.steps[i].mutable_data_ptr();
    if (launch_.settings.learns)
      radial_.add(i, span, {weight, grad, remainder, state[2].defined() ? state[2] : state[1]}, a.scales[i], a.sums[i]);
  }
  has_spans_ = true;
}

void PreparedCall::lay_out() {
  if (arguments_.weights.empty()) return;
  take_numbers();
  bool same = has_spans_ && !order_.has_copies() && !radial_.has_copies();
  for (size_t i = 0; same && i < spans_.size(); ++i) {
    const Tensor &weight = arguments_.weights[i], &grad = arguments_.grads[i];
    if (!grad.defined()) continue;
    same = spans_[i].weight && grad.strides() == weight.strides();
    spans_[i].grad = grad.const_data_ptr();
  }
  if (!same) make_spans();
  // With a remainder a weight is a float32 number.
  launch_.settings.snap_unit =
      snap_unit(launch_.rounding == Rounding::remainder ? Dtype::float32 : launch_.dtype, launch_.levels);
}

// The number of this step of a weight, where the host counts; 0 elsewhere.
double PreparedCall::step_of(size_t i) const {
  if (arguments_.rule == Rule::sgd || counts_there_) return 0;
  const Tensor& step = arguments_.steps[i];
  return 1 + (step.scalar_type() == at::kFloat ? *step.const_data_ptr<float>() : *step.const_data_ptr<double>());
}

void PreparedCall::run() {
  if (!arguments_.weights.empty() && !skipped_) step();
  for (Tensor& grad : arguments_.grads) grad = Tensor();  // zero_grad() frees them; the next step brings its own
}

void PreparedCall::step() {
  const auto& [weights, grads, steps] = std::tie(arguments_.weights, arguments_.grads, arguments_.steps);
  bool alike = true;
  for (size_t i = 0; i < weights.size() && alike; ++i) alike = grads[i].defined() && step_of(i) == step_of(0);
  if (alike) {
    run_together(spans_, step_of(0), 0);
  } else {
    std::map<double, std::vector<Span>> by_step;
    for (size_t i = 0; i < weights.size(); ++i)
      if (grads[i].defined()) by_step[step_of(i)].push_back(spans_[i]);
    size_t number = 0;
    for (const auto& [step, spans] : by_step) run_together(spans, step, number++);
  }
  learn();
  for (size_t i = 0; i < steps.size() && !counts_there_; ++i) {
    if (!grads[i].defined()) continue;
    if (steps[i].scalar_type() == at::kFloat)
      *steps[i].mutable_data_ptr<float>() += 1;
    else
      *steps[i].mutable_data_ptr<double>() += 1;
  }
  order_.write_back();
  // Autograd must see what changed: a backward pass over a graph from before the step is an error, as with torch's
  // optimizers.
  for (const auto* list : {&arguments_.weights, &arguments_.codes, &arguments_.snapped, &arguments_.remainders,
                           &arguments_.sums, &arguments_.velocities})
    for (size_t i = 0; i < list->size(); ++i)
      if (grads[i].defined() && !(*list)[i].is_inference()) (*list)[i].unsafeGetTensorImpl()->bump_version();
}

// (E7) What is left of it after the step: sums that were not made on the way, and what the scales learn of them.
void PreparedCall::learn() {
  const Arguments& a = arguments_;
  if (a.growths.empty()) return;
  launch_.sums_alone = true;
  for (const auto& [i, span] : radial_.apart())
    if (a.grads[i].defined()) run_together({span}, step_of(i), 1);
  launch_.sums_alone = false;
  ScaleLaunch scales = scale_launch(a.scale_lr, launch_.settings, a.rule);
  scales.numbers = numbers_;
  std::vector<size_t> stepped;
  for (size_t i = 0; i < a.weights.size(); ++i) {
    if (!a.grads[i].defined()) continue;
    stepped.push_back(i);
    if (!a.velocities.empty())
      scales.spans.push_back(scale_span(a.scales[i], a.velocities[i], a.growths[i], a.sums[i], a.counts[i]));
  }
  radial_.add_up(stepped, numbers_);
  learn_scales(scales, device_);
}

// `number`: which launch of the run it is.
void PreparedCall::run_together(const std::vector<Span>& spans, double steps, [[maybe_unused]] size_t number) {
  launch_.spans = spans.data();
  launch_.span_count = static_cast<int64_t>(spans.size());
  launch_.settings.steps = steps;
  if (device_.is_cpu()) run_cpu(launch_);
#if defined(ASKEW_WITH_CUDA)
  if (!device_.is_cuda()) return;
  if (tables_.size() <= number) tables_.resize(number + 1);
  run_cuda(launch_, numbers_, device_, tables_[number]);
#endif
}

}  // namespace askew
