// Arguments by name, and whether they go together.
#include "arguments.h"

#include <ATen/MemoryOverlap.h>

namespace askew {

using at::Tensor;
using c10::IValue;

namespace {

double number_of(const std::string& name, const IValue& value) {
  TORCH_CHECK_TYPE(value.isDouble() || value.isInt(), "askew_cuda: ", name, " is ", value.tagKind(),
                   "; a number is needed");
  return value.isInt() ? static_cast<double>(value.toInt()) : value.toDouble();
}

bool one_of(const std::string& name, const std::string& value, const char* yes, const char* no) {
  TORCH_CHECK_VALUE(value == yes || value == no, "askew_cuda: ", name, " = '", value, "'; '", yes, "' or '", no, "'");
  return value == yes;
}

}  // namespace

std::vector<Tensor>* Arguments::list(const std::string& name) {
  const auto names = state_names(rule);
  for (size_t k = 0; k < names.size(); ++k)
    if (name == names[k]) return &state[k];
  if (name == "steps") return rule == Rule::adamw ? &steps : nullptr;
  return name == "weights"      ? &weights
         : name == "grads"      ? &grads
         : name == "scales"     ? &scales
         : name == "codes"      ? &codes
         : name == "snapped"    ? &snapped
         : name == "remainders" ? &remainders
         : name == "growths"    ? &growths
         : name == "sums"       ? &sums
         : name == "velocities" ? &velocities
                                : nullptr;
}

Scalar* Arguments::scalar(const std::string& name) {
  return name == "lr"           ? &lr
         : name == "epsilon"    ? &epsilon
         : name == "grad_scale" ? &grad_scale
         : name == "found_inf"  ? &found_inf
                                : nullptr;
}

void Arguments::set(const std::string& name, const IValue& value) {
  if (auto* tensors = list(name)) {
    *tensors = value.toTensorVector();
  } else if (Scalar* number = scalar(name)) {
    const bool is_tensor = value.isTensor();
    if (!value.isNone()) *number = {is_tensor ? 0 : number_of(name, value), is_tensor ? value.toTensor() : Tensor()};
    if (value.isNone()) *number = {name == "grad_scale" ? 1.0 : 0.0, Tensor()};
  } else if (name == "levels") {
    levels = value.toDoubleVector();
  } else if (name == "streams") {
    streams = value.toIntVector();
  } else if (name == "first_elements") {
    first_elements = value.toIntVector();
  } else if (name == "counts") {
    counts = value.toIntVector();
  } else if (name == "scale_lr") {
    scale_lr = number_of(name, value);
  } else if (name == "seed") {
    seed.reset();
    seed_tensor = Tensor();
    if (value.isInt()) seed = value.toInt();
    if (value.isTensor()) {
      seed_tensor = value.toTensor();
      TORCH_CHECK_TYPE(seed_tensor.numel() == 1 && seed_tensor.scalar_type() == at::kLong, "askew_cuda: seed is ",
                       seed_tensor.toString(), " of shape ", seed_tensor.sizes(), "; one int64 number is needed");
    }
  } else if (name == "anneal") {
    settings.interval = one_of(name, value.toStringRef(), "interval", "capture");
  } else if (name == "skew_at") {
    settings.skew_gradient = one_of(name, value.toStringRef(), "gradient", "velocity");
  } else if (name == "recovery") {
    recovery = value.isNone() ? std::nullopt : std::optional(number_of(name, value));
  } else if (name == "alpha") {
    alpha = value.isNone() ? std::nullopt : std::optional(number_of(name, value));
  }
#define ASKEW_NUMBER(whose, setting) else if (name == #setting) settings.setting = number_of(name, value)
#define ASKEW_FLAG(whose, setting) else if (name == #setting) settings.setting = value.toBool()
  ASKEW_NUMBERS(ASKEW_NUMBER);
  ASKEW_FLAGS(ASKEW_FLAG);
#undef ASKEW_NUMBER
#undef ASKEW_FLAG
  else TORCH_CHECK_TYPE(false, "askew_cuda: an operator has no argument ", name);
}

void Arguments::check_list(const char* name, const std::vector<Tensor>& list, bool optional) const {
  if (optional && list.empty()) return;
  TORCH_CHECK_VALUE(list.size() == weights.size(), "askew_cuda: ", name, " has ", list.size(), " tensors for ",
                    weights.size(), " weights");
  for (size_t i = 0; i < list.size(); ++i) {
    const Tensor &tensor = list[i], &weight = weights[i];
    TORCH_CHECK_VALUE(
        tensor.sizes() == weight.sizes() && tensor.device() == weight.device() && tensor.layout() == at::kStrided,
        "askew_cuda: ", name, "[", i, "] is ", tensor.toString(), " of shape ", tensor.sizes(), " on ", tensor.device(),
        " but weights[", i, "] is ", weight.toString(), " of shape ", weight.sizes(), " on ", weight.device());
    TORCH_CHECK_VALUE(tensor.numel() == 0 || tensor.const_data_ptr(), "askew_cuda: ", name, "[", i,
                      "] has no memory: its storage was freed");
    TORCH_CHECK_TYPE(tensor.scalar_type() == list[0].scalar_type(), "askew_cuda: ", name, "[", i, "] is ",
                     tensor.scalar_type(), " but ", name, "[0] is ", list[0].scalar_type());
  }
}

void Arguments::check() const {
  const at::ScalarType kind = weights[0].scalar_type();
  const auto wanted = [](const char* name, const std::vector<Tensor>& list, at::ScalarType type, bool or_wide = false) {
    if (list.empty()) return;
    const at::ScalarType is = list[0].scalar_type();
    TORCH_CHECK_TYPE(is == type || (or_wide && is == at::kFloat), "askew_cuda: ", name, "[0] is ", is, "; ", type,
                     " is needed");
  };
  dtype_of(weights[0], "a weight");
  check_list("weights", weights, false);
  for (const Tensor& weight : weights)
    TORCH_CHECK_VALUE(at::has_internal_overlap(weight) != at::MemOverlap::Yes, "askew_cuda: a weight of strides ",
                      weight.strides(), " overlaps itself; clone() it");
  check_list("grads", grads, false);
  wanted("grads", grads, kind, weights[0].element_size() == 2);
  const auto names = state_names(rule);
  for (size_t k = 0; k < names.size(); ++k) {
    const bool optional = rule == Rule::sgd ? settings.momentum == 0 : k == 2 && !settings.amsgrad;
    check_list(names[k], state[k], optional);
    wanted(names[k], state[k], kind, weights[0].element_size() == 2);
    wanted(names[k], state[k], state[0].empty() ? kind : state[0][0].scalar_type());
  }
  TORCH_CHECK_VALUE(rule == Rule::sgd || state[2].empty() == !settings.amsgrad,
                    "askew_cuda: amsgrad = ", settings.amsgrad, " but max_exp_avg_sqs has ", state[2].size(),
                    " tensors");
  check_list("codes", codes, true);
  wanted("codes", codes, at::kByte);
  check_list("snapped", snapped, true);
  check_list("remainders", remainders, true);
  wanted("remainders", remainders, at::kShort);
  TORCH_CHECK_VALUE(levels.empty() || (levels.size() >= 2 && levels.size() <= 256), "askew_cuda: levels has ",
                    levels.size(), " entries; 2 to 256 are supported");
  for (size_t k = 0; k < levels.size(); ++k)
    TORCH_CHECK_VALUE(static_cast<float>(levels[k]) == levels[k] && (k == 0 || levels[k] > levels[k - 1]),
                      "askew_cuda: levels[", k, "] = ", levels[k], "; levels are float32 numbers, strictly increasing");
  const size_t scaled = levels.empty() ? 0 : weights.size();
  TORCH_CHECK_VALUE(scales.size() == scaled, "askew_cuda: scales has ", scales.size(), " tensors; ", scaled,
                    " are needed for ", weights.size(), " weights and ", levels.size(), " levels");
  for (size_t i = 0; i < scales.size(); ++i)
    TORCH_CHECK_TYPE(scales[i].scalar_type() == (kind == at::kDouble ? at::kDouble : at::kFloat) &&
                         scales[i].device() == weights[i].device(),
                     "askew_cuda: scales[", i, "] is ", scales[i].toString(), " for a weight that is ",
                     weights[i].toString());
  TORCH_CHECK_VALUE(!levels.empty() || (codes.empty() && snapped.empty()), "askew_cuda: codes and snapped need levels");
  TORCH_CHECK_VALUE(growths.size() == sums.size() && (growths.empty() || growths.size() == scales.size()),
                    "askew_cuda: growths has ", growths.size(), " tensors and sums ", sums.size(), " for ",
                    scales.size(), " scales; one for each of both, or none");
  for (size_t i = 0; i < growths.size(); ++i) {
    check_like_scale("growths", growths[i], scales[i], i);
    check_sums(sums[i], scales[i], i, rule == Rule::sgd ? 2 : 3);
  }
  TORCH_CHECK_VALUE(recovery.has_value() != alpha.has_value(),
                    "askew_cuda: give recovery or alpha, not both and not neither");
  TORCH_CHECK_VALUE(!settings.skew_gradient || (settings.interval && alpha),
                    "askew_cuda: skew_at = 'gradient' needs alpha and anneal = 'interval'");
  const bool stochastic = seed || seed_tensor.defined();
  TORCH_CHECK_VALUE(
      weights[0].element_size() == 2 ? !stochastic || remainders.empty() : !stochastic && remainders.empty(),
      "askew_cuda: remainders or a seed are for bfloat16 and float16, one of them, and weights[0] is ", kind);
  for (const auto* list : {&streams, &first_elements})
    TORCH_CHECK_VALUE(list->empty() || list->size() == weights.size(), "askew_cuda: streams or first_elements has ",
                      list->size(), " entries for ", weights.size(), " weights");
  if (rule == Rule::sgd) return;
  TORCH_CHECK_VALUE(steps.size() == weights.size(), "askew_cuda: steps has ", steps.size(), " tensors for ",
                    weights.size(), " weights");
  for (const Tensor& step : steps)
    TORCH_CHECK_TYPE(step.numel() == 1 && (step.scalar_type() == at::kFloat || step.scalar_type() == at::kDouble) &&
                         step.device() == steps[0].device() &&
                         (step.is_cpu() || step.scalar_type() == steps[0].scalar_type()) &&
                         (step.is_cpu() || step.device() == weights[0].device()),
                     "askew_cuda: a step is ", step.toString(), " of shape ", step.sizes(), " on ", step.device(),
                     "; 0-d float32 or float64 tensors on the CPU or with the weights are needed");
}

void check_like_scale(const char* name, const Tensor& tensor, const Tensor& scale, size_t i) {
  TORCH_CHECK_VALUE(tensor.sizes() == scale.sizes() && tensor.scalar_type() == scale.scalar_type() &&
                        tensor.device() == scale.device() && tensor.layout() == at::kStrided,
                    "askew_cuda: ", name, "[", i, "] is ", tensor.toString(), " of shape ", tensor.sizes(),
                    " but scales[", i, "] is ", scale.toString(), " of shape ", scale.sizes());
}

void check_sums(const Tensor& sums, const Tensor& scale, size_t i, int64_t kinds) {
  TORCH_CHECK_VALUE(sums.dim() == 2 && sums.size(0) == kinds && sums.size(1) == scale.numel() &&
                        sums.scalar_type() == at::kDouble && sums.device() == scale.device() && sums.is_contiguous(),
                    "askew_cuda: sums[", i, "] is ", sums.toString(), " of shape ", sums.sizes(), "; float64, (", kinds,
                    ", ", scale.numel(), "), contiguous, is needed");
}

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

std::string schema_of(Rule rule) {
  const bool is_sgd = rule == Rule::sgd;
  std::string text = is_sgd ? "sgd_(" : "adamw_(", alias = "a";
  const auto mutated = [&](const std::string& name) {
    text += "Tensor(" + alias + "!)[] " + name + ", ";
    ++alias[0];
  };
  mutated("weights");
  text += "Tensor[] grads, ";
  for (const char* name : state_names(rule)) mutated(name);
  if (!is_sgd) mutated("steps");
  text += "Tensor[] scales, float[] levels, ";
  for (const char* name : {"codes", "snapped", "remainders"}) mutated(name);
  text += "Tensor[] growths, ";
  mutated("sums");
  text += "*, Tensor lr, ";
  [[maybe_unused]] constexpr int both = 0, sgd = 1, adamw = 2;
  const auto mine = [&](int whose) { return whose == both || (whose == sgd) == is_sgd; };
#define ASKEW_NUMBER(whose, name) text += mine(whose) ? "float " #name ", " : ""
#define ASKEW_FLAG(whose, name) text += mine(whose) ? "bool " #name ", " : ""
  ASKEW_NUMBERS(ASKEW_NUMBER);
  ASKEW_FLAGS(ASKEW_FLAG);
#undef ASKEW_NUMBER
#undef ASKEW_FLAG
  return text +
         "Tensor epsilon, str anneal, str skew_at, float? recovery, float? alpha, Tensor? grad_scale=None, Tensor? "
         "found_inf=None, "
         "Tensor? seed=None, int[] streams=[], int[] first_elements=[]) -> ()";
}

}  // namespace askew
