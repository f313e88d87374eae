// What one thread of one block of the CUDA kernel does, as a function of (block, thread) for host and device: tests run
// every (block, thread) of a launch on a processor. It only moves data; csrc/maths/step.h says what happens to it.
#pragma once

#include "cuda.h"
#include "kinds.h"
#include "lane_sums.h"
#include "moves.h"

namespace askew {

constexpr int block_threads = 256;
constexpr int warp_threads = 32;
constexpr int64_t longest_chunk = largest_chunk + block_size;  // where blocks of sums are not cut
// A table's levels as a kernel argument: the threads of a block fill the table.
template <typename V> struct ListArgument {
  int count;
  float values[V::capacity];
};

// The arguments of one launch. V is a kind (kinds.h), here and below.
template <typename V>
struct KernelArguments {
  using T = typename V::T;
  using Argument = std::conditional_t<V::is_table, ListArgument<V>,
                                      std::conditional_t<V::book == Book::none, NoCodebook, UniformCodebook<T>>>;
  Hyper<T> h;
  Settings settings;  // what h was made from, where a number of the device takes part
  DeviceNumbers numbers;
  bool reads_numbers;  // some take part, or AdamW's steps are counted there
  Argument levels;
  int32_t chunk;
  bool wide_grad, wide_state;
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
  arguments.reads_numbers = call.numbers.lr.at || call.numbers.epsilon.at || call.numbers.grad_scale.at ||
                            (launch.span_count > 0 && launch.spans[0].step);
  arguments.chunk = static_cast<int32_t>(call.chunk);
  if constexpr (V::is_table) {
    arguments.levels.count = launch.levels.count;
    for (int k = 0; k < launch.levels.count; ++k)
      arguments.levels.values[k] = static_cast<float>(launch.levels.values[k]);
  } else if constexpr (V::book == Book::uniform) {
    arguments.levels = uniform_codebook<typename V::T>(launch.levels);
  }
  arguments.wide_grad = launch.wide_grad;
  arguments.wide_state = launch.wide_state;
  arguments.rounding = launch.rounding;
  arguments.snapped_dtype = launch.snapped_dtype;
  arguments.sums_alone = launch.sums_alone;
  arguments.spans = call.spans;
  arguments.first_chunk = call.first_chunk;
  return arguments;
}

// Spans into the arguments, unless they are in device memory already. The number of blocks comes back.
template <typename V>
ASKEW_HOST_FN int64_t set_spans(KernelArguments<V>& arguments, const Launch& launch) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < launch.span_count; ++i) {
    if (!arguments.spans) {
      arguments.few[i] = launch.spans[i];
      arguments.first_few[i] = blocks;
    }
    blocks += chunks_of(launch.spans[i].size, arguments.chunk);
  }
  if (!arguments.spans) arguments.first_few[launch.span_count] = blocks;
  arguments.span_count = launch.span_count;
  return blocks;
}

// Long and seldom needed: its divisions are one function, not a copy in each place.
ASKEW_RARE_FN int64_t scale_of_rare(const Span& span, int64_t i) { return scale_of(span, i); }

// Which scale holds where in a chunk: scales come in runs of weights that share one. Positions count from the chunk's
// start, so that 32 bits will do.
template <typename T>
struct Runs {
  const T* scales;   // of the chunk's first weight and on
  int32_t left;      // weights of the chunk that share its scale
  int32_t run;       // weights of each further run; what is longer than a chunk counts as a chunk
  int32_t straight;  // runs until the scales begin anew

  static ASKEW_FN Runs of(const Span& span, int64_t begin) {
    const T* scale = static_cast<const T*>(span.scale);
    if (begin < span.scale_run)
      return {scale, clamped(span.scale_run - begin), clamped(span.scale_run), clamped(span.scale_count)};
    const int64_t first = begin / span.scale_run % span.scale_count;
    return {scale + scale_of(span, begin), clamped(span.scale_run - begin % span.scale_run), clamped(span.scale_run),
            clamped(span.scale_count - first)};
  }
  static ASKEW_FN int32_t clamped(int64_t length) {
    return static_cast<int32_t>(length < longest_chunk ? length : longest_chunk);
  }

  // The scale of a weight; `end` becomes the position where its run ends.
  ASKEW_FN const T& at(int32_t position, const Span& span, int64_t begin, int32_t& end) const {
    const int32_t further = position < left ? 0 : 1 + (position - left) / run;
    end = left + further * run;
    if (further < straight) return scales[further];
    return static_cast<const T*>(span.scale)[scale_of_rare(span, begin + position)];
  }
};

// What the threads of a block share: its chunk, and what the device alone knows.
template <typename V>
struct Block {
  using T = typename V::T;
  bool skipped;   // AMP found an infinity: all stays as it is
  bool aligned;   // vectors may move
  Span span;      // from the chunk's first weight on: pointers and number of that one; the rest is the whole span's
  int64_t begin;  // of the chunk, in the span
  int32_t size;   // of the chunk
  Runs<T> runs;
  Now<T> now;
  Key key;  // of the span's random bits
  std::conditional_t<V::is_table, TableCodebook<T, V::capacity>, NoCodebook> table;
};

template <typename V> ASKEW_FN Rounding rounding_of([[maybe_unused]] const KernelArguments<V>& arguments) {
  if constexpr (V::usual)
    return V::rounding;
  else
    return arguments.rounding;
}
template <typename V> ASKEW_FN bool has_wide_grad([[maybe_unused]] const KernelArguments<V>& arguments) {
  if constexpr (V::usual || sizeof(typename V::Storage) != 2)
    return false;
  else
    return arguments.wide_grad;
}
template <typename V> ASKEW_FN bool has_wide_state([[maybe_unused]] const KernelArguments<V>& arguments) {
  if constexpr (V::usual)
    return V::wide_state;
  else
    return arguments.wide_state;
}
template <typename V> ASKEW_FN bool is_learning([[maybe_unused]] const KernelArguments<V>& arguments) {
  return V::may_learn && (V::usual || arguments.h.learns);
}

// Weights that move at a time: 16 bytes of them, or of their state.
template <typename State> constexpr int vector = 16 / static_cast<int>(sizeof(State));
template <typename V> ASKEW_FN int32_t widest_vector(const KernelArguments<V>& arguments) {
  return sizeof(typename V::Storage) == 2 && has_wide_state(arguments) ? vector<float> : vector<typename V::Storage>;
}

ASKEW_FN uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }
template <typename V> ASKEW_FN bool is_aligned(const Span& span, int vector) {
  uintptr_t all = address(span.weight) | address(span.grad) | address(span.snapped) | address(span.remainder);
  for (int which = 0; which < V::RuleType::states; ++which) all |= address(span.state[which]);
  return all % 16 == 0 && address(span.codes) % vector == 0;
}

template <typename Any> ASKEW_FN void advance(Any*& pointer, int64_t bytes) {
  if (pointer) pointer = reinterpret_cast<Any*>(address(pointer) + bytes);
}

// Chunk `number` of a span into the block.
template <typename V>
ASKEW_FN void place(Block<V>& block, const KernelArguments<V>& arguments, const Span& span, int64_t number) {
  const DeviceNumbers& numbers = arguments.numbers;
  const int64_t begin = number * arguments.chunk, left = span.size - begin;
  int64_t size = left < arguments.chunk ? left : arguments.chunk, from = begin;
  if (span.sums) {
    from = whole_blocks(span, begin);
    size = whole_blocks(span, begin + size) - from;
  }
  block.skipped = numbers.found_inf.at && numbers.found_inf.read() != 0;
  block.aligned = is_aligned<V>(span, widest_vector(arguments));
  block.span = span;
  advance(block.span.weight, from * sizeof(typename V::Storage));
  advance(block.span.grad, from * (has_wide_grad(arguments) ? sizeof(typename V::T) : sizeof(typename V::Storage)));
  for (auto& state : block.span.state)
    advance(state, from * (has_wide_state(arguments) ? sizeof(typename V::T) : sizeof(typename V::Storage)));
  advance(block.span.codes, from);
  advance(block.span.snapped, from * size_of(arguments.snapped_dtype));
  advance(block.span.remainder, from * 2);
  block.span.first_element += from;
  block.begin = from;
  block.size = static_cast<int32_t>(size);
  if constexpr (V::book != Book::none) block.runs = Runs<typename V::T>::of(span, from);
  block.now = arguments.h.now;
  const uint64_t seed = numbers.seed ? static_cast<uint64_t>(*numbers.seed) : arguments.settings.seed;
  if constexpr (sizeof(typename V::Storage) == 2) block.key = make_key(seed, span.stream);
}

// First all threads of a block do this: they look for the span of its chunk, and the one that finds it fills in what
// the block shares ..
template <typename V>
ASKEW_FN void prepare(Block<V>& block, const KernelArguments<V>& arguments, int64_t number, int thread) {
  if constexpr (V::is_table) {
    for (int k = thread; k < V::capacity; k += block_threads)
      fill_entry(block.table, arguments.levels.values, arguments.levels.count, k);
  }
  const Span* spans = arguments.spans ? arguments.spans : arguments.few;
  const int64_t* first_chunk = arguments.spans ? arguments.first_chunk : arguments.first_few;
  for (int64_t which = thread; which < arguments.span_count; which += block_threads) {
    const int64_t first = first_chunk[which], next = first_chunk[which + 1];
    if (first <= number && number < next) place(block, arguments, spans[which], number - first);
  }
}

// .. then, where the device alone knows numbers of the step, this: a warp for each of what takes long ..
template <typename T>
ASKEW_RARE_FN void read_rates(Now<T>& now, const Settings& settings, const DeviceNumbers& numbers) {
  if (numbers.lr.at) set_lr(now, settings, numbers.lr.read());
  if (numbers.epsilon.at) set_epsilon(now, numbers.epsilon.read());
  if (numbers.grad_scale.at) set_grad_scale(now, settings, numbers.grad_scale.read());
}
ASKEW_RARE_FN double power(double base, double exponent) { return ::pow(base, exponent); }

template <typename V>
ASKEW_FN void read_numbers(Block<V>& block, const KernelArguments<V>& arguments, int thread) {
  using T = typename V::T;
  const Settings& s = arguments.settings;
  if (thread == 0) read_rates(block.now, s, arguments.numbers);
  if constexpr (std::is_same_v<typename V::RuleType, AdamW>) {
    const bool is_first = thread == warp_threads;
    if (!block.span.step || (!is_first && thread != 2 * warp_threads)) return;
    const double steps = DeviceNumber{block.span.step, arguments.numbers.step_is_double}.read() +
                         (arguments.sums_alone ? 0 : 1);  // after the step it is counted
    const double rest = 1 - power(is_first ? s.beta1 : s.beta2, steps);
    if (is_first)
      block.now.bias1 = static_cast<T>(1 / rest);
    else
      block.now.bias2 = static_cast<T>(1 / ::sqrt(rest));
  }
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

// The gradient of a weight, of either type.
template <typename V>
ASKEW_FN typename V::T gradient_of(const KernelArguments<V>& arguments, const void* grad, int64_t i) {
  return has_wide_grad(arguments) ? static_cast<const typename V::T*>(grad)[i]
                                  : widen(static_cast<const typename V::Storage*>(grad)[i]);
}

// Those of a vector, as they lie in memory: to make one of them float32 is to wait for all, and more is to be loaded.
template <typename V, int count>
struct Gradients {
  using Storage = typename V::Storage;
  using T = typename V::T;
  alignas(16) uint32_t words[count * sizeof(T) / 4] = {};
  bool is_wide;

  ASKEW_FN void load(const KernelArguments<V>& arguments, const void* grad, int32_t i) {
    is_wide = has_wide_grad(arguments);
    if (is_wide)
      read(grad, i, reinterpret_cast<T(&)[count]>(words));
    else
      read(grad, i, reinterpret_cast<Storage(&)[count]>(words));
  }
  ASKEW_FN T of(int k) const {
    T wide;
    Storage narrow;
    std::memcpy(&wide, reinterpret_cast<const char*>(words) + k * sizeof wide, sizeof wide);
    std::memcpy(&narrow, reinterpret_cast<const char*>(words) + k * sizeof narrow, sizeof narrow);
    return is_wide ? wide : T(widen(narrow));
  }
};

// The scalars of the block's step. What the kernel was compiled for is set, and what that rules out falls away.
template <typename V>
ASKEW_FN Hyper<typename V::T> scalars_of(const Block<V>& block, const KernelArguments<V>& arguments) {
  Hyper<typename V::T> h = arguments.h;
  h.now = block.now;
  h.learns = is_learning(arguments);
  if constexpr (V::usual) {
    h.has_momentum = true;
    h.dampens = h.nesterov = h.amsgrad = false;
    h.now.unscales = true;  // 1, mostly: exact
  }
  return h;
}

// What weights up to a position share. Where `scale` is not null the grid is still to be made from it: by then, weights
// are on their way from memory.
template <typename T>
struct Shared {
  Grid<T> grid;
  const T* scale;
  int32_t end;
};

// A thread at work on its block's chunk.
template <typename V, typename Codebook>
struct Worker {
  using Storage = typename V::Storage;
  using T = typename V::T;
  static constexpr int states = V::RuleType::states;
  static constexpr bool quantized = V::book != Book::none;
  static constexpr bool usual = V::usual;
  static constexpr bool is_half = sizeof(Storage) == 2;
  const Block<V>& block;
  const KernelArguments<V>& arguments;
  const Codebook& codebook;
  Hyper<T> h;

  // Whether there is this part of the state, and remainders.
  static ASKEW_FN bool has_state(const Span& span, int which) {
    if constexpr (usual)
      return which < V::states;
    else
      return span.state[which];
  }
  ASKEW_FN bool has_remainder() const { return is_half && rounding_of(arguments) == Rounding::remainder; }

  // A weight back to its storage; i is its number in the chunk.
  ASKEW_FN void put(Storage& w, [[maybe_unused]] uint16_t& remainder, T x, [[maybe_unused]] int32_t i) const {
    if constexpr (is_half) {
      if (has_remainder()) {
        const Split<uint32_t> both = split<uint32_t>(x, w);
        w.bits = static_cast<uint16_t>(both.half);
        remainder = static_cast<uint16_t>(both.remainder);
        return;
      }
      if (rounding_of(arguments) == Rounding::stochastic) {
        const uint64_t element = static_cast<uint64_t>(block.span.first_element + i);
        const uint32_t random =
            random_bits(block.key, static_cast<uint32_t>(element), static_cast<uint32_t>(element >> 32));
        w.bits = static_cast<uint16_t>(stochastic<Storage>(x, random));
        return;
      }
    }
    narrow(w, x);
  }

  // From the scale of a weight that is being loaded to the grid.
  ASKEW_FN void make(Shared<T>& shared) const {
    if constexpr (quantized) {
      if (!shared.scale) return;
      const T *scales = static_cast<const T*>(block.span.scale),
              *growths = h.learns ? static_cast<const T*>(block.span.growth) : scales;
      shared.grid = make_grid(*shared.scale, growths[shared.scale - scales], codebook, h);
      shared.scale = nullptr;
    }
  }

  // As many neighbours as make a vector, from a position on. All is loaded before anything is stored. The compiler
  // knows the type of the state.
  template <typename State>
  ASKEW_FN void turn(int32_t i, Shared<T>& shared) const {
    constexpr int count = vector<State>;
    reload_shared();
    const Span& span = block.span;
    Storage w[count];
    Gradients<V, count> g;
    State state[states][count] = {};  // zeros where there is none, or registers would keep what the turn before left
    uint16_t remainder[count];
    read(span.weight, i, w);
    g.load(arguments, span.grad, i);
    if (has_remainder()) read(span.remainder, i, remainder);
#pragma unroll
    for (int which = 0; which < states; ++which)
      if (has_state(span, which)) read(span.state[which], i, state[which]);
    make(shared);
    Hyper<T> moving = h;
    if constexpr (usual) moving.now.moves = true;  // else run() takes weights one by one
#pragma unroll
    for (int k = 0; k < count; ++k) {
      T mine[states];
#pragma unroll
      for (int which = 0; which < states; ++which) mine[which] = T(widen(state[which][k]));
      const T now = joined(w[k], remainder[k], rounding_of(arguments));
      put(w[k], remainder[k],
          step<typename V::RuleType, typename V::Annealing>(now, g.of(k), mine, shared.grid, codebook, moving), i + k);
#pragma unroll
      for (int which = 0; which < states; ++which) narrow(state[which][k], mine[which]);
    }
    reload_shared();
    write(span.weight, i, w);
    if (has_remainder()) write(span.remainder, i, remainder);
#pragma unroll
    for (int which = 0; which < states; ++which)
      if (has_state(span, which)) write(span.state[which], i, state[which]);
    if constexpr (quantized) {
      if (span.codes || span.snapped) write_outputs(i, w, shared.grid);
    }
  }

  // The weight at a position, in whatever way it is stored.
  ASKEW_FN void one(int32_t i, Shared<T>& shared) const {
    reload_shared();
    const Span& span = block.span;
    Storage w[1] = {static_cast<const Storage*>(span.weight)[i]};
    auto* remainder = static_cast<uint16_t*>(span.remainder) + (has_remainder() ? i : 0);
    uint16_t kept = has_remainder() ? *remainder : 0;
    T mine[states];
#pragma unroll
    for (int which = 0; which < states; ++which) {
      const void* from = span.state[which];
      mine[which] = !has_state(span, which)     ? T(0)
                    : has_wide_state(arguments) ? T(static_cast<const T*>(from)[i])
                                                : T(widen(static_cast<const Storage*>(from)[i]));
    }
    const T gradient = gradient_of(arguments, span.grad, i);
    make(shared);
    const T now = joined(w[0], kept, rounding_of(arguments));
    put(w[0], kept, step<typename V::RuleType, typename V::Annealing>(now, gradient, mine, shared.grid, codebook, h),
        i);
    static_cast<Storage*>(span.weight)[i] = w[0];
    if (has_remainder()) *remainder = kept;
#pragma unroll
    for (int which = 0; which < states; ++which) {
      void* to = span.state[which];
      if (!has_state(span, which)) continue;
      if (has_wide_state(arguments))
        static_cast<T*>(to)[i] = mine[which];
      else
        narrow(static_cast<Storage*>(to)[i], mine[which]);
    }
    if constexpr (quantized) {
      if (span.codes || span.snapped) write_outputs(i, w, shared.grid);
    }
  }

  // (E6) of the weights as they are stored.
  template <int count>
  ASKEW_FN void write_outputs(int32_t i, const Storage (&w)[count], const Grid<T>& grid) const {
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

  // Neighbouring threads take neighbouring vectors, which begin where 16 bytes of the tensor do; one by one the weights
  // of those that are cut off by the chunk or don't share a scale. Of a misaligned tensor they take neighbouring
  // weights.
  ASKEW_FN void run(int thread) const {
    const bool wide = is_half && has_wide_state(arguments), whole = block.aligned && (!usual || h.now.moves);
    const int32_t count = whole ? widest_vector(arguments) : 1, size = block.size;
    const int32_t before =
        V::may_learn ? static_cast<int32_t>(block.begin % count) : 0;  // chunks are whole vectors else
    Shared<T> shared{{}, nullptr, quantized ? 0 : size};
    const auto enter = [&](int32_t position) {
      if constexpr (quantized) {
        if (position >= shared.end) shared.scale = &block.runs.at(position, block.span, block.begin, shared.end);
      }
    };
    for (int32_t position = thread * count - before; position < size; position += block_threads * count) {
      const int32_t end = position + count;
      int32_t each = position < 0 ? 0 : position;
      enter(each);
      if (whole && each == position && end <= size && end <= shared.end) {
        turn_as(wide, position, shared);
        continue;
      }
#pragma unroll 1
      for (; each < end && each < size; ++each) {
        enter(each);
        one(each, shared);
      }
    }
  }

  ASKEW_FN void turn_as(bool wide, int32_t position, Shared<T>& shared) const {
    if constexpr (is_half) {
      if (wide) return turn<float>(position, shared);
    }
    turn<Storage>(position, shared);
  }
};

// .. then, where scales learn (E7), and all have done that, this: sums of weights before their step ..
template <typename V>
ASKEW_FN void sum_radial(const Block<V>& block, const KernelArguments<V>& arguments, int thread) {
  using Storage = typename V::Storage;
  using T = typename V::T;
  const Span& span = block.span;
  if (block.skipped || !span.sums) return;
  const SumBlocks blocks = sum_blocks(span);
  const int64_t all = blocks.first_from(span.size), last = blocks.first_from(block.begin + block.size);
  for (int64_t b = blocks.first_from(block.begin) + thread / sum_lanes; b < last; b += block_threads / sum_lanes) {
    const int64_t begin = blocks.begin(b), end = blocks.end(b);
    const auto sums = over_lanes<2, T>(thread, [&](int lane, T(&total)[2]) {
      for (int64_t i = begin - block.begin + lane; i < end - block.begin; i += sum_lanes) {
        uint16_t remainder = 0;
        if (rounding_of(arguments) == Rounding::remainder) remainder = static_cast<const uint16_t*>(span.remainder)[i];
        const T w = joined(static_cast<const Storage*>(span.weight)[i], remainder, rounding_of(arguments));
        const T g = gradient_of(arguments, span.grad, i);
        if (!(is_finite(w) && is_finite(g))) continue;
        total[0] += g * w;
        total[1] += w * w;
      }
    });
    if (thread % sum_lanes == 0) {
      span.sums[b] = sums.of[0];
      span.sums[all + b] = sums.of[1];
    }
  }
}

// .. and of AdamW's second moments after it.
template <typename V>
ASKEW_FN void sum_second(const Block<V>& block, const KernelArguments<V>& arguments, int thread) {
  using T = typename V::T;
  const Span& span = block.span;
  if (V::RuleType::states == 1 || block.skipped || !span.sums) return;
  const SumBlocks blocks = sum_blocks(span);
  const int64_t all = blocks.first_from(span.size), last = blocks.first_from(block.begin + block.size);
  const double root = block.now.bias2;
  const void* squares = !V::usual && span.state[2] ? span.state[2] : span.state[1];
  for (int64_t b = blocks.first_from(block.begin) + thread / sum_lanes; b < last; b += block_threads / sum_lanes) {
    const int64_t begin = blocks.begin(b), end = blocks.end(b);
    const auto second = over_lanes<1, T>(thread, [&](int lane, T(&total)[1]) {
      for (int64_t i = begin - block.begin + lane; i < end - block.begin; i += sum_lanes) {
        const T x = has_wide_state(arguments) ? static_cast<const T*>(squares)[i]
                                              : widen(static_cast<const typename V::Storage*>(squares)[i]);
        if (is_finite(x)) total[0] += x;
      }
    });
    if (thread % sum_lanes == 0) span.sums[2 * all + b] = second.of[0] * (root * root);
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
  Worker<V, std::decay_t<decltype(codebook)>>{block, arguments, codebook, scalars_of(block, arguments)}.run(thread);
}

}  // namespace askew
