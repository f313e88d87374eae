// From tensors to spans: what both backends need of a call before it starts. Part of the binding, which knows torch.
#pragma once

#include <ATen/core/Tensor.h>

#include <deque>
#include <utility>
#include <vector>

#include "../launch.h"

namespace askew {

// The lists of one call; state[k] is empty or has a tensor for each weight.
struct Lists {
  at::TensorList weights, grads;
  std::vector<std::pair<const char*, at::TensorList>> state;
  at::TensorList scales, codes, snapped, remainders;
  at::ArrayRef<double> levels;
};

// All that can be wrong with them is found here, before anything is written: ValueError or TypeError.
void check(const Lists& lists);

Dtype dtype_of(const at::Tensor& tensor, const char* name);

// Tensors in the memory order of their weight. One that lies otherwise is copied, and copied back if it is written to.
class Layout {
 public:
  const at::Tensor& weight(const at::Tensor& tensor, bool in_order);
  const at::Tensor& like(const at::Tensor& weight, const at::Tensor& tensor, bool written);
  void* keep(at::Tensor tensor);
  void write_back();

 private:
  const at::Tensor& copied(const at::Tensor& tensor, at::Tensor copy, bool written);
  std::deque<at::Tensor> copies_;  // a deque: they stay where they are
  std::vector<std::pair<const at::Tensor*, const at::Tensor*>> written_;
};

// One span for each weight; the layout keeps what they point to. in_order: weights in the order of their elements'
// numbers.
std::vector<Span> spans_of(const Lists& lists, bool in_order, Layout& layout);

// Autograd must see what changed: a backward pass over a graph from before the step is an error, as with torch's
// optimizers.
void bump_versions(const Lists& lists);

}  // namespace askew
