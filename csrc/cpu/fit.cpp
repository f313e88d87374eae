// The scales of rows on the CPU: the search of maths/fit.h. Each trial is one pass over weights that stay in a core's
// cache.
//
// Compiled once for each instruction set, as loop.cpp is.
#include "cpu.h"
#include "native.h"

#if !defined(ASKEW_CPU_FIT)
#define ASKEW_CPU_FIT cpu_fit_baseline
#endif

namespace askew {
namespace {

// A chunk of a row, widened, side by side, with zeros up to whole lanes.
template <typename T>
struct FitChunk {
  alignas(64) T weights[sum_chunk];
  int64_t size = 0;

  template <typename Storage> ASKEW_FN void load(const Rows& rows, int64_t row, int64_t chunk) {
    const int64_t first = chunk * sum_chunk, left = rows.columns - first;
    const Storage* from = at<Storage>(rows.data, row * rows.row_stride + first * rows.column_stride);
    size = left < sum_chunk ? left : sum_chunk;
    int64_t i = 0;
    if (rows.column_stride == 1) {
      using P = NativePack<Storage>;
      for (; i + lanes<P>() <= size; i += lanes<P>()) store(weights + i, askew::load<P>(from + i));
    }
    for (; i < size; ++i) weights[i] = widen(from[i * rows.column_stride]);
    for (; i % sum_lanes != 0; ++i) weights[i] = 0;
  }
};

template <typename T>
ASKEW_FN void add_range(const FitChunk<T>& chunk, Range& range) {
  using P = NativePack<T>;
  constexpr int width = lanes<P>();
  P up{}, down{};
  const P one = broadcast(T(1), P{});
  double total = 0;
  for (int64_t block = 0; block < chunk.size; block += block_size) {
    const int64_t end = block + block_size < chunk.size ? block + block_size : chunk.size;
    LaneSums sums;
    for (int64_t i = block; i < end; i += sum_lanes) {
#pragma GCC unroll 8
      for (int k = 0; k < sum_lanes; k += width) {
        const P w = load<P>(chunk.weights + i + k);
        up = w > up ? w : up;
        down = -w > down ? -w : down;
        sums.add(k, abs(w), one);
      }
    }
    total += sums.total();
  }
  range.total += total;
  for (int lane = 0; lane < width; ++lane) {
    if (up[lane] > range.up) range.up = up[lane];
    if (down[lane] > range.down) range.down = down[lane];
  }
}

// The sums of a trial, lane by lane.
template <typename P>
struct TrialSums {
  PackSums<P> error, along, square;

  ASKEW_FN void add(int lane, P, P d, P q) {
    error.add(lane, d * d);
    along.add_by_product(lane, d * q);
    square.add_by_product(lane, q * q);
  }
  ASKEW_FN void put(P* packs) {
    packs[0] = error.one_pack();
    packs[1] = along.one_pack();
    packs[2] = square.one_pack();
  }
  ASKEW_FN Sums total() { return {error.total(), along.total(), square.total()}; }
};
// .. and those of least squares.
template <typename P>
struct LeastSquaresSums {
  LaneSums along, square;

  ASKEW_FN void add(int lane, P w, P, P q) {
    along.add(lane, w, q);
    square.add(lane, q, q);
  }
  ASKEW_FN Sums total() { return {0, along.total(), square.total()}; }
};

// Those of several trials over a block.
template <template <typename> typename Kind, int trials, typename T, typename Codebook>
ASKEW_FN void sum_block(const T* weights, int64_t size, const NativePack<T>* inverse, const Codebook& codebook,
                        Sums* sums) {
  using P = NativePack<T>;
  constexpr int width = lanes<P>();
  constexpr bool together = std::is_same_v<Kind<P>, TrialSums<P>> && 3 * trials <= width;
  Kind<P> here[trials];
  int64_t i = 0;
  for (; i + sum_lanes <= size; i += sum_lanes) {
#pragma GCC unroll 8
    for (int k = 0; k < sum_lanes; k += width) {
      const P w = load<P>(weights + i + k);
#pragma GCC unroll 4
      for (int trial = 0; trial < trials; ++trial) {
        const P u = w * inverse[trial], q = codebook.level(codebook.nearest(u));
        here[trial].add(k, w, u - q, q);
      }
    }
  }
  if (i < size) {  // lanes beyond the end have no level
    T there[sum_lanes];
    for (int lane = 0; lane < sum_lanes; ++lane) there[lane] = lane < size - i ? 1 : 0;
#pragma GCC unroll 8
    for (int k = 0; k < sum_lanes; k += width) {
      const P w = load<P>(weights + i + k), live = load<P>(there + k);
#pragma GCC unroll 4
      for (int trial = 0; trial < trials; ++trial) {
        const P u = w * inverse[trial], q = codebook.level(codebook.nearest(u));
        here[trial].add(k, w, live > T(0) ? u - q : P{}, live > T(0) ? q : P{});
      }
    }
  }
  if constexpr (together) {
    P packs[3 * trials];
#pragma GCC unroll 4
    for (int trial = 0; trial < trials; ++trial) here[trial].put(packs + 3 * trial);
    const P totals = add_down_all<3 * trials, width>(packs);
#pragma GCC unroll 4
    for (int trial = 0; trial < trials; ++trial)
      sums[trial].add({totals[3 * trial], totals[3 * trial + 1], totals[3 * trial + 2]});
  } else {
    for (int trial = 0; trial < trials; ++trial) sums[trial].add(here[trial].total());
  }
}

// Adds those of the first few of them over a chunk: it costs little more to try all.
template <template <typename> typename Kind, int trials, typename T, typename Codebook>
__attribute__((noinline)) void sum_chunk_of(const FitChunk<T>& chunk, const double* units, int wanted,
                                            const Codebook& codebook, Sums* sums) {
  const Codebook book = codebook;
  NativePack<T> inverse[trials];
  for (int trial = 0; trial < trials; ++trial)
    inverse[trial] = broadcast(T(1) / static_cast<T>(units[trial]), NativePack<T>{});
  Sums here[trials] = {};
  for (int64_t block = 0; block < chunk.size; block += block_size) {
    const int64_t left = chunk.size - block;
    sum_block<Kind, trials>(chunk.weights + block, left < block_size ? left : int64_t{block_size}, inverse, book, here);
  }
  for (int trial = 0; trial < wanted; ++trial) sums[trial].add(here[trial]);
}

// Adds the sums of a chunk for all trials, a few of them at a time.
template <typename T, typename Codebook>
ASKEW_FN void sum_trials(const FitChunk<T>& chunk, Sequence trials, const Codebook& codebook, Sums* sums) {
  constexpr int width = lanes<NativePack<T>>(), together = width < 4 ? 1 : width / 4;  // whose sums fit into a pack
  if (trials.least_squares) return sum_chunk_of<LeastSquaresSums, 1>(chunk, &trials.first, 1, codebook, sums);
  double units[together], unit = trials.first;
  for (int trial = 0; trial < trials.count; trial += together) {
    for (double& each : units) {
      each = unit;
      unit *= trials.ratio;
    }
    const int left = trials.count - trial;
    sum_chunk_of<TrialSums, together>(chunk, units, left < together ? left : together, codebook, sums + trial);
  }
}

// The search for one row, by one thread.
template <typename Storage, typename Codebook>
ASKEW_FN double fit_row(const Rows& rows, int64_t row, const Codebook& codebook, const Fitting& fit,
                        FitChunk<Arithmetic<Storage>>& chunk) {
  const int64_t chunks = chunks_of(rows.columns, sum_chunk);
  Range range{};
  for (int64_t k = 0; k < chunks; ++k) {
    chunk.template load<Storage>(rows, row, k);
    add_range(chunk, range);
  }
  Search search = Search::of(fit, range);
  for (int phase = 0; phase < Search::phases && search.largest > 0; ++phase) {
    const Sequence trials = search.trials(phase);
    Sums sums[most_trials];
    for (int trial = 0; trial < trials.count; ++trial) sums[trial] = {};
    for (int64_t k = 0; k < chunks; ++k) {
      if (chunks > 1) chunk.template load<Storage>(rows, row, k);
      sum_trials(chunk, trials, codebook, sums);
    }
    search.take_all(trials, sums);
  }
  return search.scale();
}

template <typename Storage, typename Visitor>
ASKEW_FN void with_chunk(const Rows& rows, const Visitor& visit) {
  FitChunk<Arithmetic<Storage>> chunk;
  visit_codebook<Arithmetic<Storage>>(rows.levels, [&](const auto& codebook) { visit(Storage{}, codebook, chunk); });
}

template <typename Visitor>
ASKEW_FN void visit_rows(const Rows& rows, const Visitor& visit) {
  switch (rows.dtype) {
    case Dtype::float32:
      return with_chunk<float>(rows, visit);
    case Dtype::float64:
      return with_chunk<double>(rows, visit);
    case Dtype::bfloat16:
      return with_chunk<BFloat16>(rows, visit);
    case Dtype::float16:
      return with_chunk<Float16>(rows, visit);
  }
}

void fit_rows(const Rows& rows, int64_t begin, int64_t end, double* scales) {
  const Fitting fit = fitting(rows.levels, rows.columns);
  visit_rows(rows, [&](auto storage, const auto& codebook, auto& chunk) {
    for (int64_t row = begin; row < end; ++row)
      scales[row] = fit_row<decltype(storage)>(rows, row, codebook, fit, chunk);
  });
}

void fit_part(const Rows& rows, const RowPart& part) {
  visit_rows(rows, [&](auto storage, const auto& codebook, auto& chunk) {
    for (int64_t k = part.begin; k < part.end; ++k) {
      chunk.template load<decltype(storage)>(rows, part.row, k);
      if (part.trials)
        sum_trials(chunk, *part.trials, codebook, part.sums + (k - part.begin) * part.trials->count);
      else
        add_range(chunk, part.ranges[k - part.begin]);
    }
  });
}

}  // namespace

extern const CpuFit ASKEW_CPU_FIT = {fit_rows, fit_part};

}  // namespace askew
