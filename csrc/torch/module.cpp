// The Python module: the plan, what the extension was built with, and which instruction sets there are.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "backends.h"
#include "plan.h"

namespace askew {

std::atomic<const CpuKernels*> cpu_kernels{nullptr};  // set when the module is loaded

namespace {

struct Capability {
  const char* name;
  CpuKernels kernels;
  bool present;
};

#define ASKEW_KERNELS(name) {cpu_step_##name, cpu_fit_##name, cpu_look_##name, cpu_restore_##name}
const std::vector<Capability>& capabilities() {  // widest first
  static const std::vector<Capability> all = {
#if defined(__x86_64__)
      {"avx512", ASKEW_KERNELS(avx512),
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl")},
      {"avx2", ASKEW_KERNELS(avx2),
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma")},
#endif
      {"baseline", ASKEW_KERNELS(baseline), true},
  };
  return all;
}
#undef ASKEW_KERNELS

// Chooses the instruction set of the CPU kernel; the results are the same with each.
std::string set_cpu_capability(const std::string& name) {
  std::string known, before;
  const CpuKernels* current = cpu_kernels;
  for (const Capability& each : capabilities()) {
    if (&each.kernels == current) before = each.name;
    if (each.present) known += known.empty() ? each.name : std::string(", ") + each.name;
  }
  for (const Capability& each : capabilities()) {
    if (each.present && name == each.name) {
      cpu_kernels = &each.kernels;
      return before;
    }
  }
  throw pybind11::value_error("set_cpu_capability: name = '" + name + "'; this machine has " + known);
}

}  // namespace
}  // namespace askew

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  askew::bind_plan(m);
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
