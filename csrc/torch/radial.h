// (E7) Sums over the weights of each scale: of blocks, where the step makes them on its way, and of scales.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

#include "backends.h"

namespace askew {

class RadialSums {
 public:
  explicit RadialSums(Rule rule) : rule_(rule) {}

  // What is summed up of a weight; the last two may be undefined. All in logical order.
  struct Source {
    at::Tensor weight, grad, remainder, second;
  };
  // Tells a span where to put its sums of blocks. Where a scale's weights don't lie in one run, they are copied so that
  // they do, and summed up apart.
  void add(size_t i, Span& span, const Source& source, const at::Tensor& scale, const at::Tensor& sums);
  bool has_copies() const { return !copies_.empty(); }
  // The spans of the copies, with second moments as they are now.
  std::vector<std::pair<size_t, Span>> apart();
  // From the blocks of these weights to their scales.
  void add_up(const std::vector<size_t>& weights, const DeviceNumbers& numbers) const;

 private:
  struct Copy {
    size_t i;
    Source source;
    at::Tensor weight, grad, remainder, second;
    std::vector<int64_t> scale;  // its shape
    Span span;
  };
  struct Part {
    at::Tensor blocks, sums;  // float64, (kinds, blocks) and (kinds, scales)
    int64_t size;             // weights
  };

  Rule rule_;
  std::vector<Copy> copies_;
  std::vector<Part> parts_;
};

}  // namespace askew
