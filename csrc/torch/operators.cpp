// The operators of torch.ops.askew_cuda: schemas from the table of settings, and one kernel for all devices.
#include <torch/library.h>

#include "prepared.h"

namespace {

template <askew::Rule rule>
void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& names = op.schema().arguments();
  askew::Arguments arguments(rule);
  for (size_t i = 0; i < names.size(); ++i) arguments.set(names[i].name(), (*stack)[stack->size() - names.size() + i]);
  torch::jit::drop(*stack, names.size());
  askew::PreparedCall call(std::move(arguments));
  call.lay_out();
  call.run();
}

void implement(torch::Library& m) {
  m.impl("sgd_", torch::CppFunction::makeFromBoxedFunction<&run<askew::Rule::sgd>>());
  m.impl("adamw_", torch::CppFunction::makeFromBoxedFunction<&run<askew::Rule::adamw>>());
}

}  // namespace

TORCH_LIBRARY(askew_cuda, m) {
  m.def(askew::schema_of(askew::Rule::sgd).c_str());
  m.def(askew::schema_of(askew::Rule::adamw).c_str());
}

TORCH_LIBRARY_IMPL(askew_cuda, CPU, m) { implement(m); }

#if defined(ASKEW_WITH_CUDA)
TORCH_LIBRARY_IMPL(askew_cuda, CUDA, m) { implement(m); }
#endif
