// The Python module: what it was built with, which instruction sets there are, and the operators without the
// dispatcher.
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

#include "operators.h"

namespace askew {
namespace {

struct Capability {
  const char* name;
  CpuStep step;
  bool present;
};

std::vector<Capability> capabilities() {  // widest first
  return {
#if defined(__x86_64__)
      {"avx512", cpu_step_avx512,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl")},
      {"avx2", cpu_step_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")},
#endif
      {"baseline", cpu_step_baseline, true},
  };
}

// Chooses the instruction set of the CPU kernel; the results are the same with each.
std::string set_cpu_capability(const std::string& name) {
  std::string known, before;
  const CpuStep current = cpu_step;
  for (const Capability& each : capabilities()) {
    if (each.step == current) before = each.name;
    if (each.present) known += known.empty() ? each.name : std::string(", ") + each.name;
  }
  for (const Capability& each : capabilities()) {
    if (each.present && name == each.name) {
      cpu_step = each.step;
      return before;
    }
  }
  throw pybind11::value_error("set_cpu_capability: name = '" + name + "'; this machine has " + known);
}

// The operators for plain tensors in eager mode: through the dispatcher, Python lists cost 0.1 us a tensor, more than
// the kernel takes for a small one.
using Tensors = const std::vector<at::Tensor>&;
using Scalar = const std::optional<at::Tensor>&;
using Number = std::optional<double>;

void direct_sgd(Tensors weights, Tensors grads, Tensors momentum_buffers, Tensors scales,
                const std::vector<double>& levels, Tensors codes, Tensors snapped, Tensors remainders,
                const at::Tensor& lr, double momentum, double dampening, double weight_decay, bool nesterov,
                bool maximize, const at::Tensor& epsilon, const std::string& anneal, const std::string& skew_at,
                Number recovery, Number alpha, double max_step, bool clip, Scalar grad_scale, Scalar found_inf,
                Scalar seed, const std::vector<int64_t>& streams, const std::vector<int64_t>& first_elements) {
  RECORD_FUNCTION("askew_cuda::sgd_", c10::ArrayRef<const c10::IValue>{});
  sgd_(weights, grads, momentum_buffers, scales, levels, codes, snapped, remainders, lr, momentum, dampening,
       weight_decay, nesterov, maximize, epsilon, anneal, skew_at, recovery, alpha, max_step, clip, grad_scale,
       found_inf, seed, streams, first_elements);
}

void direct_adamw(Tensors weights, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
                  Tensors steps, Tensors scales, const std::vector<double>& levels, Tensors codes, Tensors snapped,
                  Tensors remainders, const at::Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
                  bool amsgrad, bool maximize, const at::Tensor& epsilon, const std::string& anneal,
                  const std::string& skew_at, Number recovery, Number alpha, double max_step, bool clip,
                  Scalar grad_scale, Scalar found_inf, Scalar seed, const std::vector<int64_t>& streams,
                  const std::vector<int64_t>& first_elements) {
  RECORD_FUNCTION("askew_cuda::adamw_", c10::ArrayRef<const c10::IValue>{});
  adamw_(weights, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, scales, levels, codes, snapped, remainders, lr,
         beta1, beta2, eps, weight_decay, amsgrad, maximize, epsilon, anneal, skew_at, recovery, alpha, max_step, clip,
         grad_scale, found_inf, seed, streams, first_elements);
}

}  // namespace
}  // namespace askew

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  m.def("sgd_", torch::wrap_pybind_function_no_gil(askew::direct_sgd), py::arg("weights"), py::arg("grads"),
        py::arg("momentum_buffers"), py::arg("scales"), py::arg("levels"), py::arg("codes"), py::arg("snapped"),
        py::arg("remainders"), py::kw_only(), py::arg("lr"), py::arg("momentum"), py::arg("dampening"),
        py::arg("weight_decay"), py::arg("nesterov"), py::arg("maximize"), py::arg("epsilon"), py::arg("anneal"),
        py::arg("skew_at"), py::arg("recovery"), py::arg("alpha"), py::arg("max_step"), py::arg("clip"),
        py::arg("grad_scale"), py::arg("found_inf"), py::arg("seed"), py::arg("streams"), py::arg("first_elements"),
        "askew_cuda::sgd_ without the dispatcher.");
  m.def("adamw_", torch::wrap_pybind_function_no_gil(askew::direct_adamw), py::arg("weights"), py::arg("grads"),
        py::arg("exp_avgs"), py::arg("exp_avg_sqs"), py::arg("max_exp_avg_sqs"), py::arg("steps"), py::arg("scales"),
        py::arg("levels"), py::arg("codes"), py::arg("snapped"), py::arg("remainders"), py::kw_only(), py::arg("lr"),
        py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("amsgrad"),
        py::arg("maximize"), py::arg("epsilon"), py::arg("anneal"), py::arg("skew_at"), py::arg("recovery"),
        py::arg("alpha"), py::arg("max_step"), py::arg("clip"), py::arg("grad_scale"), py::arg("found_inf"),
        py::arg("seed"), py::arg("streams"), py::arg("first_elements"), "askew_cuda::adamw_ without the dispatcher.");
  m.def("set_cpu_capability", askew::set_cpu_capability,
        "Chooses the CPU kernel's instruction set by name; returns the one before.");
  m.def(
      "cpu_capabilities",
      [] {
        std::vector<std::string> names;
        for (const auto& each : askew::capabilities())
          if (each.present) names.push_back(each.name);
        pybind11::tuple result(names.size());
        for (size_t i = 0; i < names.size(); ++i) result[i] = names[i];
        return result;
      },
      "Instruction sets that this machine has, widest first.");
#if defined(ASKEW_WITH_CUDA)
  m.def("cuda_problem", askew::cuda_problem, py::arg("device"),
        "Why CUDA kernels can't run on the device of this number, and what helps; an empty string where they can.");
#endif
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["torch"] = ASKEW_TORCH_VERSION;
        info["compiler"] = __VERSION__;
#if defined(ASKEW_WITH_CUDA)
        info["cuda"] = askew::cuda_built_for();
#else
        info["cuda"] = pybind11::none();
#endif
#if defined(_OPENMP)
        info["threads"] = true;
#else
        info["threads"] = false;  // at::parallel_for is a plain call then
#endif
        return info;
      },
      "What the extension was built with: torch, compiler, cuda (toolkit and architectures; None: without), threads "
      "(whether the CPU "
      "kernels use torch's).");
  for (const auto& each : askew::capabilities()) {
    if (each.present) {
      askew::set_cpu_capability(each.name);
      break;
    }
  }
}
