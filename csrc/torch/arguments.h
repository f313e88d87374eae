// What an operator is given, by name: the tensors and scalars of one call, from the dispatcher or from Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <optional>
#include <string>
#include <vector>

#include "../launch.h"

namespace askew {

// A number that changes from step to step: the host has it, or it is in a tensor of one element.
struct Scalar {
  double value;
  at::Tensor tensor;  // undefined where the host has it
};

struct Arguments {
  explicit Arguments(Rule rule) : rule(rule) {}

  // The argument of this name in the operator's schema. An unknown name is an error.
  void set(const std::string& name, const c10::IValue& value);

  // Whether the lists go together, so that a step can't leave their memory. askew_cuda/checks.py checks all that can be
  // wrong, with better words, before the optimizers come here; this is for those who call the operators by themselves.
  void check() const;

  Rule rule;
  std::vector<at::Tensor> weights, grads, state[3], steps, scales, codes, snapped, remainders, growths, sums;
  std::vector<double> levels;
  Settings settings;
  std::optional<double> recovery, alpha;
  Scalar lr{0, {}}, epsilon{1, {}}, grad_scale{1, {}}, found_inf{0, {}};
  std::optional<int64_t> seed;
  at::Tensor seed_tensor;  // instead of it; read at each step
  std::vector<int64_t> streams, first_elements;
  // Of a plan alone: learn_scales_ comes with the step.
  std::vector<at::Tensor> velocities;
  std::vector<int64_t> counts;
  double scale_lr = 0;

 private:
  std::vector<at::Tensor>* list(const std::string& name);
  Scalar* scalar(const std::string& name);
  void check_list(const char* name, const std::vector<at::Tensor>& list, bool optional) const;
};

// The names of an operator's states, in the order of Arguments::state and Span::state.
inline std::vector<const char*> state_names(Rule rule) {
  if (rule == Rule::sgd) return {"momentum_buffers"};
  return {"exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"};
}

std::string schema_of(Rule rule);  // from the table of settings.h

// (E7) Whether a tensor goes with a scale, and so do the sums of its weights.
void check_like_scale(const char* name, const at::Tensor& tensor, const at::Tensor& scale, size_t i);
void check_sums(const at::Tensor& sums, const at::Tensor& scale, size_t i, int64_t kinds);

Dtype dtype_of(const at::Tensor& tensor, const char* name);

}  // namespace askew
