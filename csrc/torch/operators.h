// The operators as C++ functions, and the kernels that they call.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <optional>

#include "../cpu/cpu.h"
#include "../cuda/cuda.h"

namespace askew {

extern std::atomic<CpuStep> cpu_step;

// On the device's current stream. Raises where the launch fails.
void run_cuda(const Launch& launch, const DeviceNumbers& numbers, at::Device device);

// Arguments as in the schemas of csrc/torch/operators.cpp; askew_cuda/reference.py describes them.
void sgd_(at::TensorList weights, at::TensorList grads, at::TensorList momentum_buffers, at::TensorList scales,
          at::ArrayRef<double> levels, at::TensorList codes, at::TensorList snapped, at::TensorList remainders,
          const at::Tensor& lr, double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
          const at::Tensor& epsilon, c10::string_view anneal, c10::string_view skew_at, std::optional<double> recovery,
          std::optional<double> alpha, double max_step, bool clip, const std::optional<at::Tensor>& grad_scale,
          const std::optional<at::Tensor>& found_inf, const std::optional<at::Tensor>& seed, at::IntArrayRef streams,
          at::IntArrayRef first_elements);

void adamw_(at::TensorList weights, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
            at::TensorList max_exp_avg_sqs, at::TensorList steps, at::TensorList scales, at::ArrayRef<double> levels,
            at::TensorList codes, at::TensorList snapped, at::TensorList remainders, const at::Tensor& lr, double beta1,
            double beta2, double eps, double weight_decay, bool amsgrad, bool maximize, const at::Tensor& epsilon,
            c10::string_view anneal, c10::string_view skew_at, std::optional<double> recovery,
            std::optional<double> alpha, double max_step, bool clip, const std::optional<at::Tensor>& grad_scale,
            const std::optional<at::Tensor>& found_inf, const std::optional<at::Tensor>& seed, at::IntArrayRef streams,
            at::IntArrayRef first_elements);

}  // namespace askew
