// An operator call that is ready to be made, as often as its tensors stay what they are.
#pragma once

#include <c10/util/SmallVector.h>

#include <deque>
#include <utility>
#include <vector>

#include "arguments.h"
#include "backends.h"
#include "learn_scales.h"
#include "radial.h"

namespace askew {

// Tensors in the memory order of their weight. One that lies otherwise is copied, and copied back if it is written to.
class MemoryOrder {
 public:
  const at::Tensor& weight(const at::Tensor& tensor, bool contiguous);
  const at::Tensor& like(const at::Tensor& weight, const at::Tensor& tensor, bool written);
  void* keep(at::Tensor tensor);
  void write_back();
  bool has_copies() const { return !copies_.empty(); }

 private:
  const at::Tensor& copied(const at::Tensor& tensor, at::Tensor copy, bool written);
  std::deque<at::Tensor> copies_;  // a deque: they stay where they are
  std::vector<std::pair<const at::Tensor*, const at::Tensor*>> written_;
};

class PreparedCall {
 public:
  explicit PreparedCall(Arguments arguments);

  // Whether all tensors are still what they were, and where; takes the weights' gradients as they are now, or those
  // that are given, where weights keep them elsewhere. A weight without one is left out of the step.
  bool take_gradients(const std::vector<at::Tensor>* given);
  void set(const std::string& name, const c10::IValue& value) { arguments_.set(name, value); }

  // Everything that can fail: numbers, spans, copies.
  void lay_out();
  // The step; nothing where AMP found an infinity, as far as the host knows.
  void run();

  Rule rule() const { return arguments_.rule; }

 private:
  // What a span relies on.
  struct Seen {
    const void* data;
    at::DimVector sizes, strides;
    at::ScalarType dtype;
    at::Device device;
    explicit Seen(const at::Tensor& tensor);
    bool is(const at::Tensor& tensor) const;
  };

  template <typename Visit> void visit_tensors(const Visit& visit);
  void take(const char* name, const Scalar& scalar, double& setting, DeviceNumber& number);
  void take_numbers();
  void make_spans();
  void run_together(const std::vector<Span>& spans, double steps, size_t number);
  void step();
  void learn();
  double step_of(size_t i) const;

  Arguments arguments_;
  at::Device device_;
  at::ScalarType grad_type_ = at::kFloat;
  std::vector<Seen> seen_;
  MemoryOrder order_;
  RadialSums radial_{Rule::sgd};
  std::vector<Span> spans_;
  Launch launch_{};
  DeviceNumbers numbers_{};
  std::vector<SpanTable> tables_;  // of the launches of a run, in their order
  bool has_spans_ = false, skipped_ = false, counts_there_ = false;
};

}  // namespace askew
