// The CPU backend: one pass over a range of chunks, everything in registers from load to store.
//
// Compiled once for each instruction set (avx2.cpp, avx512.cpp; this file alone is the baseline: SSE2, NEON). Lane
// for lane the packs do what step.h says, so results don't depend on the width, nor on where a weight lies in a pack.
#include "block_sums.h"
#include "cpu.h"

#if !defined(ASKEW_CPU_STEP)
#define ASKEW_CPU_STEP cpu_step_baseline
#endif

namespace askew {
namespace {

// Packs that are stepped together. Weight, gradient and state of all of them are loaded before the first store: large
// buffers often start at the same offset within a page, and a load that follows a store to such an address waits for it
// (4 KiB aliasing).
constexpr int packs = 2;
// Packs per turn. What is done to a weight one after the other is a long chain, and a processor has room for few chains
// at once: so a turn has passes, each over all of its packs, with short ones.
constexpr int turn_packs = 32;
constexpr int64_t prefetch_bytes = 512;

// A codebook in which the nearest level has been found before.
template <typename Codebook, typename IndexType>
struct Found {
  static constexpr bool quantized = true, even = Codebook::even;
  const Codebook& codebook;
  IndexType index;

  template <typename P> ASKEW_FN IndexType nearest(P) const { return index; }
  ASKEW_FN auto level(IndexType k) const { return codebook.level(k); }
  template <typename P> ASKEW_FN P gap(IndexType k, P e) const { return codebook.gap(k, e); }
  template <typename P> ASKEW_FN P inverse_gap(IndexType k, P e) const { return codebook.inverse_gap(k, e); }
};
template <typename Codebook, typename IndexType> Found(const Codebook&, IndexType) -> Found<Codebook, IndexType>;

template <typename Storage, typename RuleType, typename Annealing, typename Codebook>
struct Loop {
  using T = Arithmetic<Storage>;
  using P = NativePack<Storage>;
  static constexpr int width = lanes<P>();
  static constexpr int states = RuleType::states;
  // Whether the nearest levels are found in a pass of their own: where finding them, or what follows, is long.
  static constexpr bool searches = Codebook::quantized && !(Codebook::even && std::is_same_v<Annealing, Capture>);
  using IndexType = std::conditional_t<Codebook::even, P, Index<P>>;

  // What all spans of a call share. Copied to where it is used: a store to the weights could otherwise change it, for
  // all that the compiler knows.
  std::conditional_t<(sizeof(Codebook) > 1024), const Codebook&, Codebook> codebook;
  Hyper<P> h;
  Access<Storage> access;
  Dtype snapped_dtype;

  // Weights [begin, end) of a span.
  ASKEW_FN void run(const Span& span, int64_t begin, int64_t end) const {
    int64_t i = begin;
    while (i < end) {
      int64_t run_end = end;  // weights up to here share a scale
      Grid<P> grid{};
      if constexpr (Codebook::quantized) {
        if (span.scale_run == 1 && span.scale_count >= width) {
          i = run_side_by_side(span, i, end);
          if (i == end) return;
        }
        if (span.scale_count > 1) {
          const int64_t boundary = (i / span.scale_run + 1) * span.scale_run;
          run_end = boundary < end ? boundary : end;
        }
        grid = make_grid(broadcast(of_scale<0>(span, i), P{}), broadcast(of_scale<1>(span, i), P{}), codebook, h);
      }
      while (i + width <= run_end) {
        const int64_t left = (run_end - i) / width;
        const int count = left < turn_packs ? static_cast<int>(left) : turn_packs;
        turn(span, i, count, grid);
        i += count * width;
      }
      if (i < run_end) {  // the run ends inside a pack: fill it up with what follows
        const int count = end - i < width ? static_cast<int>(end - i) : width;
        if constexpr (Codebook::quantized) {
          if (run_end < end) {
            P scale{}, growth{};
            for (int lane = 0; lane < width; ++lane) {
              const int64_t j = i + (lane < count ? lane : 0);
              scale[lane] = of_scale<0>(span, j);
              growth[lane] = of_scale<1>(span, j);
            }
            grid = make_grid(scale, growth, codebook, h);
          }
        }
        if (count == width)
          one(span, i, grid);
        else
          part(span, i, count, grid);
        i += count;
      }
    }
  }

  // A weight's scale, or its growth (where there is none: anything).
  template <bool growth> static ASKEW_FN T of_scale(const Span& span, int64_t i) {
    const void* from = growth && span.growth ? span.growth : span.scale;
    const bool one = span.scale_count == 1 && span.outer_count < 2;
    return static_cast<const T*>(from)[one ? 0 : scale_of(span, i)];
  }

  // Weights from i on whose scales lie side by side, as far as whole packs go: each neighbour has the next scale.
  ASKEW_FN int64_t run_side_by_side(const Span& span, int64_t i, int64_t end) const {
    const int64_t inner = i % span.scale_count, wrap = i - inner + span.scale_count;
    const int64_t first = scale_of(span, i) - i;
    const T *scales = static_cast<const T*>(span.scale),
            *growths = span.growth ? static_cast<const T*>(span.growth) : scales;
    for (const int64_t last = wrap < end ? wrap : end; i + width <= last; i += width)
      one(span, i, make_grid(load<P>(scales + first + i), load<P>(growths + first + i), codebook, h));
    return i;
  }

  // `count` packs from weight i on.
  ASKEW_FN void turn(const Span& span, int64_t i, int count, const Grid<P>& grid) const {
    IndexType found[turn_packs];
    int k = 0;
    if constexpr (searches) {
      for (; k < count; ++k) found[k] = codebook.nearest(position(access.load_weight(span, i + k * width), grid, h));
    }
    for (k = 0; k + packs <= count; k += packs) steps<packs>(span, i + k * width, grid, found + k);
    for (; k < count; ++k) steps<1>(span, i + k * width, grid, found + k);
    if constexpr (Codebook::quantized) {
      if (!span.codes && !span.snapped) return;
      for (k = 0; k + packs <= count; k += packs) store_outputs<packs>(span, i + k * width, grid);
      for (; k < count; ++k) store_outputs<1>(span, i + k * width, grid);
    }
  }
  // A pack by itself, rare: one function, not a copy in each of the three places.
  __attribute__((noinline)) void one(const Span& span, int64_t i, const Grid<P>& grid) const { turn(span, i, 1, grid); }

  // Packs side by side, from weight i on; found: where they are among the levels, if it was looked for.
  template <int count>
  ASKEW_FN void steps(const Span& span, int64_t i, const Grid<P>& grid, [[maybe_unused]] const IndexType* found) const {
    P w[count], g[count], state[states][count];
    if constexpr (count == packs) prefetch(span, i);
#pragma GCC unroll 4
    for (int k = 0; k < count; ++k) {
      const int64_t j = i + k * width;
      w[k] = access.load_weight(span, j);
      g[k] = access.load_grad(span, j);
#pragma GCC unroll 4
      for (int which = 0; which < states; ++which)
        state[which][k] = span.state[which] ? access.load_state(span, which, j) : P{};
    }
#pragma GCC unroll 4
    for (int k = 0; k < count; ++k) {
      P moving[states];
#pragma GCC unroll 4
      for (int which = 0; which < states; ++which) moving[which] = state[which][k];
      if constexpr (searches)
        w[k] = step<RuleType, Annealing>(w[k], g[k], moving, grid, Found{codebook, found[k]}, h);
      else
        w[k] = step<RuleType, Annealing>(w[k], g[k], moving, grid, codebook, h);
#pragma GCC unroll 4
      for (int which = 0; which < states; ++which) state[which][k] = moving[which];
    }
    access.store_weights(span, i, w);
#pragma GCC unroll 4
    for (int which = 0; which < states; ++which)
      if (span.state[which]) access.store_states(span, which, i, state[which]);
  }

  // (E6) of the weights as they were stored, from weight i on: 16-bit storage has rounded them.
  template <int count> ASKEW_FN void store_outputs(const Span& span, int64_t i, const Grid<P>& grid) const {
    P w[count];
    decltype(codebook.nearest(w[0])) index[count];
#pragma GCC unroll 4
    for (int k = 0; k < count; ++k) {
      w[k] = load<P>(at<Storage>(span.weight, i + k * width));
      index[k] = codebook.nearest(w[k] * grid.inverse);
    }
    if (span.codes) store_codes(span.codes + i, index);
    if (!span.snapped) return;
#pragma GCC unroll 4
    for (int k = 0; k < count; ++k) {
      const P level = grid.unit * codebook.level(index[k]);
      w[k] = w[k] == w[k] ? level : w[k];  // NaN has none
    }
    if (snapped_dtype == Dtype::float64) return store_as<double>(span.snapped, i, w);
    if (snapped_dtype == Dtype::float32) return store_as<float>(span.snapped, i, w);
    if (snapped_dtype == Dtype::bfloat16) return store_as<BFloat16>(span.snapped, i, w);
    store_as<Float16>(span.snapped, i, w);
  }
  template <typename To, int count> static ASKEW_FN void store_as(void* to, int64_t i, const P (&x)[count]) {
    Pack<Arithmetic<To>, width> converted[count];
#pragma GCC unroll 4
    for (int k = 0; k < count; ++k) converted[k] = __builtin_convertvector(x[k], Pack<Arithmetic<To>, width>);
    store_all(at<To>(to, i), converted);
  }

  // The last `count` < width weights of the range: a turn on copies, so that nothing beyond them is touched.
  void part(const Span& span, int64_t i, int count, const Grid<P>& grid) const {
    alignas(64) char weight[width * sizeof(Storage)] = {}, grad[width * sizeof(T)] = {},
                                    state[states][width * sizeof(T)] = {};
    alignas(64) char snapped[width * sizeof(double)];
    uint16_t remainder[width] = {};
    uint8_t codes[width];
    const size_t grad_size = access.grad_size(), state_size = access.wide_state ? sizeof(T) : sizeof(Storage);
    const size_t snapped_size = snapped_dtype == Dtype::float64 ? 8 : snapped_dtype == Dtype::float32 ? 4 : 2;
    std::memcpy(weight, at<Storage>(span.weight, i), count * sizeof(Storage));
    std::memcpy(grad, at<char>(span.grad, i * grad_size), count * grad_size);
    Span copy = span;
    copy.weight = weight;
    copy.grad = grad;
    copy.first_element += i;
    if (span.remainder) std::memcpy(remainder, at<uint16_t>(span.remainder, i), count * sizeof(uint16_t));
    copy.remainder = remainder;
    if (span.codes) copy.codes = codes;
    if (span.snapped) copy.snapped = snapped;
    for (int which = 0; which < states; ++which) {
      if (!span.state[which]) continue;
      std::memcpy(state[which], at<char>(span.state[which], i * state_size), count * state_size);
      copy.state[which] = state[which];
    }
    one(copy, 0, grid);
    std::memcpy(at<Storage>(span.weight, i), weight, count * sizeof(Storage));
    if (span.remainder) std::memcpy(at<uint16_t>(span.remainder, i), remainder, count * sizeof(uint16_t));
    for (int which = 0; which < states; ++which) {
      if (span.state[which]) std::memcpy(at<char>(span.state[which], i * state_size), state[which], count * state_size);
    }
    if (span.codes) std::memcpy(span.codes + i, codes, count);
    if (span.snapped) std::memcpy(at<char>(span.snapped, i * snapped_size), snapped, count * snapped_size);
  }

  // Where blocks are summed up before their step, all of the next block is asked for: its sums leave no time for it.
  static ASKEW_FN void prefetch(const Span& span, int64_t i) {
    const int64_t distance = span.sums ? block_size * static_cast<int64_t>(sizeof(Storage)) : prefetch_bytes;
    for (int64_t line = 0; line < packs * ASKEW_PACK_BYTES; line += 64) {
      const int64_t ahead = i * static_cast<int64_t>(sizeof(Storage)) + line + distance;
      __builtin_prefetch(at<char>(span.weight, ahead), 1);
      __builtin_prefetch(at<char>(span.grad, ahead), 0);
#pragma GCC unroll 4
      for (int which = 0; which < states; ++which)
        if (span.state[which]) __builtin_prefetch(at<char>(span.state[which], ahead), 1);
    }
  }
};

template <typename V>
void run_chunks(const Launch& launch, const int64_t* first_chunk, int64_t begin, int64_t end) {
  const auto codebook = native_codebook<typename V::Storage, V::book>(launch.levels);
  using Run = Loop<typename V::Storage, typename V::RuleType, typename V::Annealing, std::decay_t<decltype(codebook)>>;
  const Access<typename V::Storage> access{launch.wide_grad, launch.wide_state, launch.rounding, launch.settings.seed};
  const Run loop{codebook, hyper<typename Run::P>(launch.settings), access, launch.snapped_dtype};
  const BlockSums sums{access};
  const double root = static_cast<double>(loop.h.now.bias2[0]);
  int64_t which = span_of_chunk(first_chunk, launch.span_count, begin);
  for (int64_t chunk = begin; chunk < end; ++which) {
    const int64_t first = first_chunk[which], next = first_chunk[which + 1];
    const int64_t last = next < end ? next : end;
    if (chunk >= last) continue;  // an empty span
    const Span span = launch.spans[which];
    int64_t from = (chunk - first) * cpu_chunk, upto = (last - first) * cpu_chunk;
    if (upto > span.size) upto = span.size;
    // (E7) A block of sums is summed up before its step, and AdamW's second moments after it; else all is one block.
    const SumBlocks blocks = sum_blocks(span);
    const bool summed = V::book != Book::none && span.sums;
    const int64_t all = summed ? blocks.first_from(span.size) : 0;
    if (summed) {
      from = whole_blocks(span, from);
      upto = whole_blocks(span, upto);
    }
    for (int64_t b = summed ? blocks.first_from(from) : 0; from < upto; ++b) {
      const int64_t end = summed ? blocks.end(b) : upto;
      if (summed) sums.radial(span, from, end, span.sums + b, span.sums + all + b);
      if (!launch.sums_alone) loop.run(span, from, end);
      if (V::RuleType::states > 1 && summed) sums.second(span, from, end, root * root, span.sums + 2 * all + b);
      from = end;
    }
    chunk = last;
  }
}

}  // namespace

void ASKEW_CPU_STEP(const Launch& launch, const int64_t* first_chunk, int64_t begin, int64_t end) {
  visit_variant(launch, [&](auto variant) { run_chunks<decltype(variant)>(launch, first_chunk, begin, end); });
}

}  // namespace askew
