// Weights and their state between memory and packs, however they are stored.
#pragma once

#include "native.h"

namespace askew {
namespace {

template <typename Storage>
struct Access {
  using T = Arithmetic<Storage>;
  using P = NativePack<Storage>;
  static constexpr int width = lanes<P>();

  bool wide_grad, wide_state;
  Rounding rounding;
  uint64_t seed;

  ASKEW_FN P load_weight(const Span& span, int64_t i) const {
    if constexpr (sizeof(Storage) == 2) {
      if (rounding == Rounding::remainder)
        return join<P>(load_halves<P>(at<Storage>(span.weight, i)), load_halves<P>(at<int16_t>(span.remainder, i)),
                       Storage{});
    }
    return load<P>(at<Storage>(span.weight, i));
  }
  // Packs side by side, the first one of weight i on.
  template <int count> ASKEW_FN void store_weights(const Span& span, int64_t i, const P (&x)[count]) const {
    if constexpr (sizeof(Storage) == 2) {
      if (rounding != Rounding::nearest) {
#pragma GCC unroll 4
        for (int k = 0; k < count; ++k) store_weight(span, i + k * width, x[k]);
        return;
      }
    }
    store_all(at<Storage>(span.weight, i), x);
  }
  ASKEW_FN void store_weight(const Span& span, int64_t i, P x) const {  // rounded otherwise than to nearest
    using Word = Pack<uint32_t, width>;
    if (rounding == Rounding::remainder) {
      const Split<Word> both = split<Word>(x, Storage{});
      store_halves(at<Storage>(span.weight, i), both.half);
      return store_halves(at<int16_t>(span.remainder, i), both.remainder & 0xffff);
    }
    const uint64_t first = static_cast<uint64_t>(span.first_element + i);
    Word low{};
    for (int lane = 0; lane < width; ++lane) low[lane] = static_cast<uint32_t>(first + lane);
    const Word high =
        Word{} + static_cast<uint32_t>(first >> 32) + (low < static_cast<uint32_t>(first) ? Word{} + 1 : Word{});
    const Word random = random_bits(make_key(seed, span.stream), low, high);
    store_halves(at<Storage>(span.weight, i), stochastic<Storage>(x, random));
  }

  ASKEW_FN P load_grad(const Span& span, int64_t i) const {
    if constexpr (sizeof(Storage) == 2) {
      if (wide_grad) return load<P>(at<T>(span.grad, i));
    }
    return load<P>(at<Storage>(span.grad, i));
  }
  ASKEW_FN size_t grad_size() const { return wide_grad ? sizeof(T) : sizeof(Storage); }

  ASKEW_FN P load_state(const Span& span, int which, int64_t i) const {
    if constexpr (sizeof(Storage) == 2) {
      if (wide_state) return load<P>(at<T>(span.state[which], i));
    }
    return load<P>(at<Storage>(span.state[which], i));
  }
  template <int count> ASKEW_FN void store_states(const Span& span, int which, int64_t i, const P (&x)[count]) const {
    if constexpr (sizeof(Storage) == 2) {
      if (wide_state) return store_all(at<T>(span.state[which], i), x);
    }
    store_all(at<Storage>(span.state[which], i), x);
  }
};

}  // namespace
}  // namespace askew
