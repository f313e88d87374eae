// What scales learn of the sums of a step.
#include "learn.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <optional>

#include "arguments.h"

namespace askew {

using at::Tensor;

ScaleLaunch scale_launch(double scale_lr, const Settings& s, Rule rule) {
  const double momentum = rule == Rule::sgd ? s.momentum : s.beta1,
               dampening = rule == Rule::sgd ? s.dampening : s.beta1;
  return {{scale_lr, momentum, 1 - dampening, s.maximize, s.lr, s.epsilon, s.grad_scale}, {}, {}};
}

ScaleSpan scale_span(const Tensor& scale, const Tensor& velocity, const Tensor& growth, const Tensor& sums,
                     int64_t count) {
  return {scale.mutable_data_ptr(),
          velocity.mutable_data_ptr(),
          growth.mutable_data_ptr(),
          sums.const_data_ptr<double>(),
          scale.numel(),
          static_cast<double>(count),
          sums.size(0) == 3,
          scale.scalar_type() == at::kDouble};
}

void learn_scales(const ScaleLaunch& launch, at::Device device) {
  if (launch.spans.empty()) return;
  if (device.is_cpu()) {
    const Learning learning = learning_of(launch.settings);
    for (const ScaleSpan& span : launch.spans)
      at::parallel_for(0, span.size, 4096, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
          if (span.is_double)
            span.learn<double>(k, learning);
          else
            span.learn<float>(k, learning);
        }
      });
  }
#if defined(ASKEW_WITH_CUDA)
  if (device.is_cuda()) learn_scales_cuda(launch.settings, launch.numbers, launch.spans, device);
#endif
}

namespace {

// A number that the device alone may know.
double number_of(const char* name, const Tensor& tensor, at::Device device, DeviceNumber& there) {
  TORCH_CHECK_VALUE(tensor.numel() == 1, "askew_cuda: ", name, " has shape ", tensor.sizes(), "; one number is needed");
  if (tensor.is_cpu()) return tensor.item<double>();
  const bool is_double = tensor.scalar_type() == at::kDouble;
  TORCH_CHECK_TYPE(tensor.device() == device && (is_double || tensor.scalar_type() == at::kFloat), "askew_cuda: ", name,
                   " is ", tensor.toString(), " on ", tensor.device(), "; float32 or float64 on ", device,
                   ", or a number on the CPU, is needed");
  there = {tensor.const_data_ptr(), is_double};
  return 0;
}

void learn_scales_(at::TensorList scales, at::TensorList velocities, at::TensorList growths, at::TensorList sums,
                   at::IntArrayRef counts, const Tensor& lr, const Tensor& epsilon, double scale_lr, double momentum,
                   double dampening, bool maximize, const std::optional<Tensor>& grad_scale,
                   const std::optional<Tensor>& found_inf) {
  TORCH_CHECK_VALUE(velocities.size() == scales.size() && growths.size() == scales.size() &&
                        sums.size() == scales.size() && counts.size() == scales.size(),
                    "askew_cuda: ", velocities.size(), " velocities, ", growths.size(), " growths, ", sums.size(),
                    " sums and ", counts.size(), " counts for ", scales.size(), " scales; one for each is needed");
  if (scales.empty()) return;
  const at::Device device = scales[0].device();
  ScaleLaunch launch{{scale_lr, momentum, 1 - dampening, maximize, 0, 1, 1}, {}, {}};
  launch.settings.lr = number_of("lr", lr, device, launch.numbers.lr);
  launch.settings.epsilon = number_of("epsilon", epsilon, device, launch.numbers.epsilon);
  if (grad_scale) launch.settings.grad_scale = number_of("grad_scale", *grad_scale, device, launch.numbers.grad_scale);
  if (found_inf && number_of("found_inf", *found_inf, device, launch.numbers.found_inf) != 0) return;
  for (size_t i = 0; i < scales.size(); ++i) {
    const Tensor& scale = scales[i];
    TORCH_CHECK_TYPE(
        (scale.scalar_type() == at::kFloat || scale.scalar_type() == at::kDouble) && scale.device() == device,
        "askew_cuda: scales[", i, "] is ", scale.toString(), "; float32 or float64, all on one device, is needed");
    check_like_scale("velocities", velocities[i], scale, i);
    check_like_scale("growths", growths[i], scale, i);
    check_sums(sums[i], scale, i, sums[i].dim() == 2 && sums[i].size(0) == 3 ? 3 : 2);
    for (const Tensor& tensor : {scale, velocities[i], growths[i]})
      TORCH_CHECK_VALUE(tensor.is_contiguous(), "askew_cuda: scales[", i, "], its velocity or its growth has strides ",
                        tensor.strides(), "; contiguous() makes one in order");
    launch.spans.push_back(scale_span(scale, velocities[i], growths[i], sums[i], counts[i]));
  }
  learn_scales(launch, device);
  for (const auto list : {scales, velocities, growths})
    for (const Tensor& tensor : list)
      if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace
}  // namespace askew

TORCH_LIBRARY_FRAGMENT(askew_cuda, m) {
  m.def(
      "learn_scales_(Tensor(a!)[] scales, Tensor(b!)[] velocities, Tensor(c!)[] growths, Tensor[] sums, int[] counts, "
      "*, Tensor lr, Tensor epsilon, float scale_lr, float momentum, float dampening, bool maximize=False, Tensor? "
      "grad_scale=None, Tensor? found_inf=None) -> ()");
}

TORCH_LIBRARY_IMPL(askew_cuda, CPU, m) { m.impl("learn_scales_", askew::learn_scales_); }

#if defined(ASKEW_WITH_CUDA)
TORCH_LIBRARY_IMPL(askew_cuda, CUDA, m) { m.impl("learn_scales_", askew::learn_scales_); }
#endif
