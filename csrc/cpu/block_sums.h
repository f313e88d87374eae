// (E7) The sums of a block of weights, on which a scale learns.
#pragma once

#include "access.h"

namespace askew {
namespace {

template <typename Storage>
struct BlockSums {
  using P = NativePack<Storage>;
  static constexpr int width = lanes<P>();
  const Access<Storage>& access;

  // Of g w and of w^2, without weights that are not finite, or whose gradient is not.
  void radial(const Span& span, int64_t begin, int64_t end, double* gw, double* ww) const {
    radial_of<false>(span, begin, end, gw, ww);
    if (!(is_finite(*gw) && is_finite(*ww))) radial_of<true>(span, begin, end, gw, ww);
  }
  // Of AdamW's second moments, with amsgrad of the largest ones, times a factor; without those that are not finite.
  void second(const Span& span, int64_t begin, int64_t end, double factor, double* sum) const {
    second_of<false>(span, begin, end, sum);
    if (!is_finite(*sum)) second_of<true>(span, begin, end, sum);
    *sum *= factor;
  }

 private:
  // `checked`: leaves out what is not finite. It is looked for where a sum without checks is not finite.
  template <bool checked>
  __attribute__((noinline)) void radial_of(const Span& span, int64_t begin, int64_t end, double* gw, double* ww) const {
    PackSums<P> along, square;
    const auto add = [&](int lane, P w, P g) {
      if constexpr (checked) {
        const auto finite = (w - w == Lane<P>(0)) & (g - g == Lane<P>(0));
        w = finite ? w : P{};
        g = finite ? g : P{};
      }
      along.add(lane, g * w);
      square.add(lane, w * w);
    };
    int64_t i = begin;
    for (; i + sum_lanes <= end; i += sum_lanes) {
#pragma GCC unroll 8
      for (int lane = 0; lane < sum_lanes; lane += width)
        add(lane, access.load_weight(span, i + lane), access.load_grad(span, i + lane));
    }
    for (int lane = 0; i + lane < end; lane += width) {
      P w, g;
      some(span, i + lane, count_of(i + lane, end), w, g);
      add(lane, w, g);
    }
    *gw = along.total();
    *ww = square.total();
  }
  template <bool checked>
  __attribute__((noinline)) void second_of(const Span& span, int64_t begin, int64_t end, double* sum) const {
    PackSums<P> sums;
    const int which = span.state[2] ? 2 : 1;
    const auto add = [&](int lane, P x) {
      if constexpr (checked) x = x - x == Lane<P>(0) ? x : P{};
      sums.add(lane, x);
    };
    int64_t i = begin;
    for (; i + sum_lanes <= end; i += sum_lanes) {
#pragma GCC unroll 8
      for (int lane = 0; lane < sum_lanes; lane += width) add(lane, access.load_state(span, which, i + lane));
    }
    for (int lane = 0; i + lane < end; lane += width)
      add(lane, some_state(span, which, i + lane, count_of(i + lane, end)));
    *sum = sums.total();
  }
  // How many weights of a pack come before the end.
  static ASKEW_FN int count_of(int64_t i, int64_t end) { return end - i < width ? static_cast<int>(end - i) : width; }
  // Fewer weights than a pack, and their gradients; zeros fill it up.
  void some(const Span& span, int64_t i, int count, P& w, P& g) const {
    const size_t grad_size = access.grad_size();
    alignas(64) char weight[width * sizeof(Storage)] = {}, grad[width * sizeof(Lane<P>)] = {};
    uint16_t remainder[width] = {};
    std::memcpy(weight, at<Storage>(span.weight, i), count * sizeof(Storage));
    std::memcpy(grad, at<char>(span.grad, i * grad_size), count * grad_size);
    if (span.remainder) std::memcpy(remainder, at<uint16_t>(span.remainder, i), count * sizeof(uint16_t));
    Span copy = span;
    copy.weight = weight;
    copy.grad = grad;
    copy.remainder = remainder;
    w = access.load_weight(copy, 0);
    g = access.load_grad(copy, 0);
  }
  P some_state(const Span& span, int which, int64_t i, int count) const {
    const size_t size = access.wide_state ? sizeof(Lane<P>) : sizeof(Storage);
    alignas(64) char state[width * sizeof(Lane<P>)] = {};
    std::memcpy(state, at<char>(span.state[which], i * size), count * size);
    Span copy = span;
    copy.state[which] = state;
    return access.load_state(copy, which, 0);
  }
};
template <typename Storage> BlockSums(const Access<Storage>&) -> BlockSums<Storage>;

}  // namespace
}  // namespace askew
