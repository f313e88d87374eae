// (E7) What scales learn of the sums of a step: the operator learn_scales_, which a plan makes together with the step.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "backends.h"

namespace askew {

struct ScaleLaunch {
  ScaleSettings settings;
  DeviceNumbers numbers;
  std::vector<ScaleSpan> spans;
};

ScaleLaunch scale_launch(double scale_lr, const Settings& settings, Rule rule);
ScaleSpan scale_span(const at::Tensor& scale, const at::Tensor& velocity, const at::Tensor& growth,
                     const at::Tensor& sums, int64_t count);
void learn_scales(const ScaleLaunch& launch, at::Device device);

}  // namespace askew
