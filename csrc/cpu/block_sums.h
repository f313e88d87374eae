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

  // Calls take(lane, i, count) for each pack of a block of weights; the last one may have fewer.
  template <typename Take> static ASKEW_FN void over(int64_t begin, int64_t end, const Take& take) {
    for (int64_t i = begin; i < end; i += sum_lanes) {
#pragma GCC unroll 8
      for (int lane = 0; lane < sum_lanes; lane += width)
        if (i + lane < end) take(lane, i + lane, end - i - lane < width ? static_cast<int>(end - i - lane) : width);
    }
  }
  // Of g w and of w^2, without weights that are not finite, or whose gradient is not.
  __attribute__((noinline)) void radial(const Span& span, int64_t begin, int64_t end, double* gw, double* ww) const {
    LaneSums along, square;
    over(begin, end, [&](int lane, int64_t i, int count) {
      P w, g;
      if (count == width) {
        w = access.load_weight(span, i);
        g = load<P>(at<Storage>(span.grad, i));
      } else {
        some(span, i, count, w, g);
      }
      const auto finite = (w - w == Lane<P>(0)) & (g - g == Lane<P>(0));
      w = finite ? w : P{};
      g = finite ? g : P{};
      along.add(lane, g, w);
      square.add(lane, w, w);
    });
    *gw = along.total();
    *ww = square.total();
  }
  // Fewer weights than a pack, and their gradients; zeros fill it up.
  void some(const Span& span, int64_t i, int count, P& w, P& g) const {
    alignas(64) char weight[width * sizeof(Storage)] = {}, grad[width * sizeof(Storage)] = {};
    uint16_t remainder[width] = {};
    std::memcpy(weight, at<Storage>(span.weight, i), count * sizeof(Storage));
    std::memcpy(grad, at<Storage>(span.grad, i), count * sizeof(Storage));
    if (span.remainder) std::memcpy(remainder, at<uint16_t>(span.remainder, i), count * sizeof(uint16_t));
    Span copy = span;
    copy.weight = weight;
    copy.remainder = remainder;
    w = access.load_weight(copy, 0);
    g = load<P>(reinterpret_cast<const Storage*>(grad));
  }
  // Of AdamW's second moments, with amsgrad of the largest ones, times a factor.
  __attribute__((noinline)) void second(const Span& span, int64_t begin, int64_t end, double factor,
                                        double* sum) const {
    LaneSums sums;
    const int which = span.state[2] ? 2 : 1;
    over(begin, end, [&](int lane, int64_t i, int count) {
      P x{};
      if (count == width) {
        x = access.load_state(span, which, i);
      } else {
        const size_t size = access.wide_state ? sizeof(Lane<P>) : sizeof(Storage);
        alignas(64) char state[width * sizeof(Lane<P>)] = {};
        std::memcpy(state, at<char>(span.state[which], i * size), count * size);
        Span copy = span;
        copy.state[which] = state;
        x = access.load_state(copy, which, 0);
      }
      sums.add_times(lane, x - x == Lane<P>(0) ? x : P{}, factor);
    });
    *sum = sums.total();
  }
};
template <typename Storage> BlockSums(const Access<Storage>&) -> BlockSums<Storage>;

}  // namespace
}  // namespace askew
