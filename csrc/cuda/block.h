// What one thread of one block of the CUDA kernel does, as a function of (block, thread) for host and device: tests run
// every (block, thread) of a launch on a processor. It only moves data; csrc/maths/step.h says what happens to it.
#pragma once

#include "../variants.h"
#include "cuda.h"
#include "lane_sums.h"
#include "moves.h"

namespace askew {

constexpr int block_threads = 256;
constexpr int64_t longest_chunk = block_chunk + block_size;  // where blocks of sums are not cut
// A table's levels as a kernel argument: the threads of a block fill the table.
template <typename V> struct ListArgument {
  int count;
  float values[V::capacity];
};

// The arguments of one launch; first_chunk counts chunks of block_chunk weights.
template <typename V>
struct KernelArguments {
  using T = typename V::T;
  using Argument = std::conditional_t<V::is_table, ListArgument<V>,
                                      std::conditional_t<V::book == Book::none, NoCodebook, UniformCodebook<T>>>;
  Hyper<T> h;
  Settings settings;  // what h was made from, where a number of the device takes part
  DeviceNumbers numbers;
  Argument levels;
  bool wide_state;
  Rounding rounding;
  Dtype snapped_dtype;
  bool sums_alone;
  int64_t span_count;
  const Span* spans;           // in device memory; null: the lists below
  const int64_t* first_chunk;  // [span_count + 1]
  Span few[few_spans];
  int64_t first_few[few_spans + 1];
};

// The arguments of a launch, but for its spans.
template <typename V>
ASKEW_HOST_FN KernelArguments<V> arguments_of(const Launch& launch, const CudaCall& call) {
  KernelArguments<V> arguments{};
  arguments.h = hyper<typename V::T>(launch.settings);
  arguments.settings = launch.settings;
  arguments.numbers = call.numbers;
  if constexpr (V::is_table) {
    arguments.levels.count = launch.levels.count;
    for (int k = 0; k < launch.levels.count; ++k)
      arguments.levels.values[k] = static_cast<float>(launch.levels.values[k]);
  } else if constexpr (V::book == Book::uniform) {
    arguments.levels = uniform_codebook<typename V::T>(launch.levels);
  }
  arguments.wide_state = launch.wide_state;
  arguments.rounding = launch.rounding;
  arguments.snapped_dtype = launch.snapped_dtype;
  arguments.sums_alone = launch.sums_alone;
  arguments.spans = call.spans;
  arguments.first_chunk = call.first_chunk;
  return arguments;
}

// How many spans a launch takes.
ASKEW_HOST_FN int64_t spans_at_a_time(const Launch& launch, const CudaCall& call) {
  return call.spans ? launch.span_count : few_spans;
}

// Spans [begin, end) into the arguments; all are in device memory already, or these become arguments. The number of
// blocks comes back.
template <typename V>
ASKEW_HOST_FN int64_t set_spans(KernelArguments<V>& arguments, const Launch& launch, int64_t begin, int64_t end) {
  int64_t blocks = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (!arguments.spans) {
      arguments.few[i - begin] = launch.spans[i];
      arguments.first_few[i - begin] = blocks;
    }
    blocks += chunks_of(launch.spans[i].size, block_chunk);
  }
  if (!arguments.spans) arguments.first_few[end - begin] = blocks;
  arguments.span_count = end - begin;
  return blocks;
}

// Which scale holds where in a chunk: scales come in runs of weights that share one. Positions count from the chunk's
// start, so that 32 bits will do.
template <typename T>
struct Runs {
  const T* scales;   // of the chunk's first weight and on
  int32_t left;      // weights of the chunk that share its scale
  int32_t run;       // weights of each further run; what is longer than a chunk counts as a chunk
  int32_t straight;  // runs until the scales begin anew

  static ASKEW_FN Runs of(const Span& span, int64_t begin) {
    const int64_t first = begin / span.scale_run % span.scale_count;
    return {static_cast<const T*>(span.scale) + scale_of(span, begin), clamped(span.scale_run - begin % span.scale_run),
            clamped(span.scale_run), clamped(span.scale_count - first)};
  }
  static ASKEW_FN int32_t clamped(int64_t length) {
    return static_cast<int32_t>(length < longest_chunk ? length : longest_chunk);
  }

  // The scale of a weight; `end` becomes the position where its run ends.
  ASKEW_FN const T& at(int32_t position, const Span& span, int64_t begin, int32_t& end) const {
    const int32_t further = position < left ? 0 : 1 + (position - left) / run;
    end = left + further * run;
    if (further < straight) return scales[further];
    return static_cast<const T*>(span.scale)[scale_of(span, begin + position)];
  }
};

// What the threads of a block share: its chunk, and what the device alone knows.
template <typename V>
struct Block {
  using T = typename V::T;
  bool skipped;  // AMP found an infinity: all stays as it is
  Span span;
  int64_t begin;  // of the chunk, in the span
  int32_t size;   // of the chunk
  Runs<T> runs;
  Now<T> now;
  Key key;  // of the span's random bits
  std::conditional_t<V::is_table, TableCodebook<T, V::capacity>, NoCodebook> table;
};

// First all threads of a block do this ..
template <typename V>
ASKEW_FN void prepare(Block<V>& block, const KernelArguments<V>& arguments, int64_t number, int thread) {
  if constexpr (V::is_table) {
    for (int k = thread; k < V::capacity; k += block_threads)
      fill_entry(block.table, arguments.levels.values, arguments.levels.count, k);
  }
  if (thread != 0) return;
  const DeviceNumbers& numbers = arguments.numbers;
  const Settings& settings = arguments.settings;
  const Span* spans = arguments.spans ? arguments.spans : arguments.few;
  const int64_t* first_chunk = arguments.spans ? arguments.first_chunk : arguments.first_few;
  const int64_t which = span_of_chunk(first_chunk, arguments.span_count, number);
  const Span& span = spans[which];
  const int64_t begin = (number - first_chunk[which]) * block_chunk, left = span.size - begin;
  int64_t size = left < block_chunk ? left : block_chunk, from = begin;
  if (span.sums) {
    from = whole_blocks(span, begin);
    size = whole_blocks(span, begin + size) - from;
  }
  block.skipped = numbers.found_inf.at && numbers.found_inf.read() != 0;
  block.span = span;
  block.begin = from;
  block.size = static_cast<int32_t>(size);
  if constexpr (V::book != Book::none) block.runs = Runs<typename V::T>::of(span, from);
  block.now = arguments.h.now;
  if (numbers.lr.at) set_lr(block.now, settings, numbers.lr.read());
  if (numbers.epsilon.at) set_epsilon(block.now, numbers.epsilon.read());
  if (numbers.grad_scale.at) set_grad_scale(block.now, settings, numbers.grad_scale.read());
  block.key = make_key(numbers.seed ? static_cast<uint64_t>(*numbers.seed) : settings.seed, span.stream);
  if (span.step)
    set_steps(block.now, settings,
              DeviceNumber{span.step, numbers.step_is_double}.read() +
                  (arguments.sums_alone ? 0 : 1));  // after the step it is counted
}

// A weight from its storage.
template <typename Storage>
ASKEW_FN Arithmetic<Storage> joined(Storage w, [[maybe_unused]] uint16_t remainder,
                                    [[maybe_unused]] Rounding rounding) {
  if constexpr (sizeof(Storage) == 2) {
    if (rounding == Rounding::remainder) return join<float>(uint32_t{w.bits}, uint32_t{remainder}, w);
  }
  return widen(w);
}

// A thread at work on its block's chunk.
template <typename V, typename Codebook>
struct Worker {
  using Storage = typename V::Storage;
  using T = typename V::T;
  static constexpr int states = V::RuleType::states;
  static constexpr bool quantized = V::book != Book::none;
  static constexpr bool is_half = sizeof(Storage) == 2;
  // Weights that move at a time: 16 bytes of them, or of their state.
  template <typename State> static constexpr int vector = 16 / static_cast<int>(sizeof(State));

  const Block<V>& block;
  const KernelArguments<V>& arguments;
  const Codebook& codebook;
  Hyper<T> h;

  static ASKEW_FN uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }
  ASKEW_FN bool aligned(int vector) const {
    const Span& span = block.span;
    uintptr_t all = address(span.weight) | address(span.grad) | address(span.snapped) | address(span.remainder);
    for (int which = 0; which < states; ++which) all |= address(span.state[which]);
    return all % 16 == 0 && address(span.codes) % vector == 0;
  }

  // A weight back to its storage; i is its number in the span.
  ASKEW_FN void put(Storage& w, [[maybe_unused]] uint16_t& remainder, T x, [[maybe_unused]] int64_t i) const {
    if constexpr (is_half) {
      if (arguments.rounding == Rounding::remainder) {
        const Split<uint32_t> both = split<uint32_t>(x, w);
        w.bits = static_cast<uint16_t>(both.half);
        remainder = static_cast<uint16_t>(both.remainder);
        return;
      }
      if (arguments.rounding == Rounding::stochastic) {
        const uint64_t element = static_cast<uint64_t>(block.span.first_element + i);
        const uint32_t random =
            random_bits(block.key, static_cast<uint32_t>(element), static_cast<uint32_t>(element >> 32));
        w.bits = static_cast<uint16_t>(stochastic<Storage>(x, random));
        return;
      }
    }
    narrow(w, x);
  }

  // As many neighbours as make a vector, from a position on. All is loaded before anything is stored. The compiler
  // knows the type of the state.
  template <typename State>
  ASKEW_FN void turn(int32_t position, const Grid<T>& grid) const {
    constexpr int count = vector<State>;
    reload_shared();
    const Span& span = block.span;
    const int64_t i = block.begin + position;
    Storage w[count], g[count];
    State state[states][count];
    uint16_t remainder[count];
    read(span.weight, i, w);
    read(span.grad, i, g);
    if (is_half && span.remainder) read(span.remainder, i, remainder);
#pragma unroll
    for (int which = 0; which < states; ++which)
      if (span.state[which]) read(span.state[which], i, state[which]);
#pragma unroll
    for (int k = 0; k < count; ++k) {
      T mine[states];
#pragma unroll
      for (int which = 0; which < states; ++which) mine[which] = span.state[which] ? T(widen(state[which][k])) : T(0);
      const T now = joined(w[k], remainder[k], arguments.rounding);
      put(w[k], remainder[k],
          step<typename V::RuleType, typename V::Annealing>(now, widen(g[k]), mine, grid, codebook, h), i + k);
#pragma unroll
      for (int which = 0; which < states; ++which) narrow(state[which][k], mine[which]);
    }
    reload_shared();
    write(span.weight, i, w);
    if (is_half && span.remainder) write(span.remainder, i, remainder);
#pragma unroll
    for (int which = 0; which < states; ++which)
      if (span.state[which]) write(span.state[which], i, state[which]);
    if constexpr (quantized) {
      if (span.codes || span.snapped) write_outputs(i, w, grid);
    }
  }

  // The weight at a position, in whatever way it is stored.
  ASKEW_FN void one(int32_t position, const Grid<T>& grid) const {
    reload_shared();
    const Span& span = block.span;
    const int64_t i = block.begin + position;
    Storage w[1] = {static_cast<const Storage*>(span.weight)[i]};
    auto* remainder = static_cast<uint16_t*>(span.remainder) + (span.remainder ? i : 0);
    uint16_t kept = span.remainder ? *remainder : 0;
    T mine[states];
#pragma unroll
    for (int which = 0; which < states; ++which) {
      const void* from = span.state[which];
      mine[which] = !from                  ? T(0)
                    : arguments.wide_state ? T(static_cast<const T*>(from)[i])
                                           : T(widen(static_cast<const Storage*>(from)[i]));
    }
    const T now = joined(w[0], kept, arguments.rounding), gradient = widen(static_cast<const Storage*>(span.grad)[i]);
    put(w[0], kept, step<typename V::RuleType, typename V::Annealing>(now, gradient, mine, grid, codebook, h), i);
    static_cast<Storage*>(span.weight)[i] = w[0];
    if (span.remainder) *remainder = kept;
#pragma unroll
    for (int which = 0; which < states; ++which) {
      void* to = span.state[which];
      if (to && arguments.wide_state) static_cast<T*>(to)[i] = mine[which];
      if (to && !arguments.wide_state) narrow(static_cast<Storage*>(to)[i], mine[which]);
    }
    if constexpr (quantized) {
      if (span.codes || span.snapped) write_outputs(i, w, grid);
    }
  }

  // (E6) of the weights as they are stored.
  template <int count>
  ASKEW_FN void write_outputs(int64_t i, const Storage (&w)[count], const Grid<T>& grid) const {
    uint8_t codes[count];
    T snapped[count];
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const T wide = widen(w[k]);
      const auto index = codebook.nearest(wide * grid.inverse);
      codes[k] = static_cast<uint8_t>(index);
      const T level = grid.unit * codebook.level(index);
      snapped[k] = wide == wide ? level : wide;  // NaN has none
    }
    if (block.span.codes) write(block.span.codes, i, codes);
    void* to = block.span.snapped;
    if (!to) return;
    switch (arguments.snapped_dtype) {
      case Dtype::float32:
        return write_as<float>(to, i, snapped);
      case Dtype::float64:
        return write_as<double>(to, i, snapped);
      case Dtype::bfloat16:
        return write_as<BFloat16>(to, i, snapped);
      case Dtype::float16:
        return write_as<Float16>(to, i, snapped);
    }
  }

  // Neighbouring threads take neighbouring vectors; one by one the weights of those that are misaligned, cut off by the
  // chunk's end or don't share a scale.
  ASKEW_FN void run(int thread) const {
    const bool wide = is_half && arguments.wide_state;
    const int32_t count = wide ? vector<float> : vector<Storage>, size = block.size;
    const bool whole = aligned(count);
    Grid<T> grid{};
    int32_t grid_end = quantized ? 0 : size;  // the grid holds up to here
    const auto enter = [&](int32_t position) {
      if constexpr (quantized) {
        if (position < grid_end) return;
        const T *scales = static_cast<const T*>(block.span.scale),
                *growths = h.learns ? static_cast<const T*>(block.span.growth) : scales;
        const T& scale = block.runs.at(position, block.span, block.begin, grid_end);
        grid = make_grid(scale, growths[&scale - scales], codebook, h);
      }
    };
    for (int32_t position = thread * count; position < size; position += block_threads * count) {
      const int32_t end = position + count;
      enter(position);
      if (whole && end <= size && end <= grid_end) {
        turn_as(wide, position, grid);
        continue;
      }
#pragma unroll 1
      for (int32_t each = position; each < end && each < size; ++each) {
        enter(each);
        one(each, grid);
      }
    }
  }

  ASKEW_FN void turn_as(bool wide, int32_t position, const Grid<T>& grid) const {
    if constexpr (is_half) {
      if (wide) return turn<float>(position, grid);
    }
    turn<Storage>(position, grid);
  }
};

// .. then, where scales learn (E7), and all have done that, this: sums of weights before their step ..
template <typename V>
ASKEW_FN void sum_radial(const Block<V>& block, const KernelArguments<V>& arguments, int thread) {
  using Storage = typename V::Storage;
  const Span& span = block.span;
  if (block.skipped || !span.sums) return;
  const SumBlocks blocks = sum_blocks(span);
  const int64_t all = blocks.first_from(span.size), last = blocks.first_from(block.begin + block.size);
  for (int64_t b = blocks.first_from(block.begin) + thread / sum_lanes; b < last; b += block_threads / sum_lanes) {
    const int64_t begin = blocks.begin(b), end = blocks.end(b);
    const auto sum = [&](bool square) {
      return over_lanes(thread, [&](int lane) {
        double total = 0;
        for (int64_t i = begin + lane; i < end; i += sum_lanes) {
          const uint16_t remainder = span.remainder ? static_cast<const uint16_t*>(span.remainder)[i] : 0;
          const double w = joined(static_cast<const Storage*>(span.weight)[i], remainder, arguments.rounding);
          const double g = widen(static_cast<const Storage*>(span.grad)[i]);
          if (is_finite(w) && is_finite(g)) total += (square ? w : g) * w;
        }
        return total;
      });
    };
    const double along = sum(false), square = sum(true);
    if (thread % sum_lanes == 0) {
      span.sums[b] = along;
      span.sums[all + b] = square;
    }
  }
}

// .. and of AdamW's second moments after it.
template <typename V>
ASKEW_FN void sum_second(const Block<V>& block, const KernelArguments<V>& arguments, int thread) {
  const Span& span = block.span;
  if (V::RuleType::states == 1 || block.skipped || !span.sums) return;
  const SumBlocks blocks = sum_blocks(span);
  const int64_t all = blocks.first_from(span.size), last = blocks.first_from(block.begin + block.size);
  const double root = block.now.bias2;
  const void* squares = span.state[2] ? span.state[2] : span.state[1];
  for (int64_t b = blocks.first_from(block.begin) + thread / sum_lanes; b < last; b += block_threads / sum_lanes) {
    const int64_t begin = blocks.begin(b), end = blocks.end(b);
    const double second = over_lanes(thread, [&](int lane) {
      double total = 0;
      for (int64_t i = begin + lane; i < end; i += sum_lanes) {
        const double x = arguments.wide_state ? static_cast<double>(static_cast<const typename V::T*>(squares)[i])
                                              : widen(static_cast<const typename V::Storage*>(squares)[i]);
        if (is_finite(x)) total += x * (root * root);
      }
      return total;
    });
    if (thread % sum_lanes == 0) span.sums[2 * all + b] = second;
  }
}

// .. and between the two, or without them, this. Threads touch disjoint memory.
template <typename V>
ASKEW_FN void run(const Block<V>& block, const KernelArguments<V>& arguments, int thread) {
  if (block.skipped || arguments.sums_alone) return;
  const auto& codebook = [&]() -> const auto& {
    if constexpr (V::is_table)
      return block.table;
    else
      return arguments.levels;
  }();
  Hyper<typename V::T> h = arguments.h;
  h.now = block.now;
  Worker<V, std::decay_t<decltype(codebook)>>{block, arguments, codebook, h}.run(thread);
}

}  // namespace askew
