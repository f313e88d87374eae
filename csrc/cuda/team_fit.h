// What a block of threads does in the search of maths/fit.h: for a row by itself, or, with other blocks, for a chunk of
// a long one. 16 threads sum up a trial, or a block of sums.
#pragma once

#include "team.h"

namespace askew {

struct FitArguments {
  Rows rows;
  int64_t count;  // of rows
  LevelList levels;
  Fitting fit;
  double* scales;
  FitSpace space;
};

template <typename V>
struct FitBlock {
  BlockBook<V> levels;
  Search search;
  LargestBits up, down;
  double total, totals[team_halves];  // sum |w|, of the row and of blocks of sums
  Sequence trials;
  double units[most_trials], left[most_trials];
  Sums sums[most_trials];
};

// A row of weights, wherever they lie.
template <typename V>
struct RowOf {
  using T = typename V::T;
  const typename V::Storage* weights;
  int64_t columns, stride;

  ASKEW_FN RowOf(const Rows& rows, int64_t row)
      : weights(static_cast<const typename V::Storage*>(rows.data) + row * rows.row_stride),
        columns(rows.columns),
        stride(rows.column_stride) {}
  ASKEW_FN T at(int64_t i) const { return widen(weights[i * stride]); }
  ASKEW_FN int64_t end_of(int64_t first) const { return first + block_size < columns ? first + block_size : columns; }
};

template <typename V>
ASKEW_FN void begin_fit(FitBlock<V>& block, const FitArguments& arguments, const Team& team) {
  team.all([&](int thread) { block.levels.fill(arguments.levels, thread); });
}

// Adds a chunk to the range of its row.
template <typename V>
ASKEW_FN void add_chunk_range(FitBlock<V>& block, const RowOf<V>& row, int64_t chunk, const Team& team) {
  using T = typename V::T;
  const auto first_of = [&](int half) { return chunk * sum_chunk + half * int64_t{block_size}; };
  team.all([&](int thread) {
    const int half = thread / sum_lanes;
    if (first_of(half) >= row.columns) return;
    T up = 0, down = 0;
    const Totals<1> total = over_lanes<1>(thread, [&](int lane, double (&sums)[1]) {
      for (int64_t i = first_of(half) + lane; i < row.end_of(first_of(half)); i += sum_lanes) {
        const T w = row.at(i);
        up = w > up ? w : up;
        down = -w > down ? -w : down;
        sums[0] += abs(w);
      }
    });
    raise_to(&block.up, up);
    raise_to(&block.down, down);
    if (thread % sum_lanes == 0) block.totals[half] = total.of[0];
  });
  team.all([&](int thread) {
    if (thread > 0) return;
    double total = 0;
    for (int half = 0; half < team_halves && first_of(half) < row.columns; ++half) total += block.totals[half];
    block.total += total;
  });
}

template <typename V> ASKEW_FN void clear_range(FitBlock<V>& block, const Team& team) {
  team.all([&](int thread) {
    if (thread == 0) {
      block.up = block.down = 0;
      block.total = 0;
    }
  });
}
template <typename V> ASKEW_FN Range range_of(const FitBlock<V>& block) {
  return {number_of(block.up), number_of(block.down), block.total};
}

// The sums of a trial over a chunk, or those of least squares, for the first of the 16 threads that ask for it.
template <typename V>
ASKEW_FN Sums sums_of_chunk(const FitBlock<V>& block, const RowOf<V>& row, int64_t chunk, double unit, int thread) {
  using T = typename V::T;
  const auto& book = block.levels.book;
  const T inverse = T(1) / static_cast<T>(unit);
  Sums sums{};
  for (int part = 0; part < chunk_blocks; ++part) {
    const int64_t first = chunk * sum_chunk + part * int64_t{block_size};
    if (first >= row.columns) break;
    if (block.trials.least_squares) {
      const auto total = over_lanes<2>(thread, [&](int lane, double (&of)[2]) {
        for (int64_t i = first + lane; i < row.end_of(first); i += sum_lanes) {
          const T w = row.at(i);
          const double wide = w, q = book.level(book.nearest(w * inverse));
          of[0] += wide * q;
          of[1] += q * q;
        }
      });
      sums.add({0, total.of[0], total.of[1]});
      continue;
    }
    const auto total = over_lanes<3, T>(thread, [&](int lane, T(&of)[3]) {
      for (int64_t i = first + lane; i < row.end_of(first); i += sum_lanes) {
        const T u = row.at(i) * inverse, q = book.level(book.nearest(u)), d = u - q;
        of[0] += d * d;
        of[1] += d * q;
        of[2] += q * q;
      }
    });
    sums.add({total.of[0], total.of[1], total.of[2]});
  }
  return sums;
}

// The trials of a phase, once they are summed up: which is the best so far.
template <typename V>
ASKEW_FN void take_trials(FitBlock<V>& block, const Team& team) {
  team.all([&](int thread) {
    for (int trial = thread; trial < block.trials.count; trial += team_threads)
      block.left[trial] = block.search.left(block.units[trial], block.sums[trial]);
  });
  team.all([&](int thread) {
    if (thread > 0 || block.trials.count == 0) return;
    if (block.trials.least_squares) return block.search.take_least_squares(block.sums[0]);
    for (int trial = 0; trial < block.trials.count; ++trial)
      block.search.take(block.units[trial], block.sums[trial], block.left[trial]);
  });
}

// The search for one row.
template <typename V>
ASKEW_FN void fit_row(FitBlock<V>& block, const FitArguments& arguments, int64_t number, const Team& team) {
  const RowOf<V> row(arguments.rows, number);
  const int64_t chunks = chunks_of(row.columns, sum_chunk);
  clear_range(block, team);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) add_chunk_range(block, row, chunk, team);
  team.all([&](int thread) {
    if (thread == 0) block.search = Search::of(arguments.fit, range_of(block));
  });
  for (int phase = 0; phase < Search::phases && block.search.largest > 0; ++phase) {
    team.all([&](int thread) {
      if (thread > 0) return;
      block.trials = block.search.trials(phase);
      block.trials.write(block.units);
    });
    team.all([&](int thread) {
      for (int trial = thread / sum_lanes; trial < block.trials.count; trial += team_halves) {
        Sums sums{};
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          sums.add(sums_of_chunk(block, row, chunk, block.units[trial], thread));
        if (thread % sum_lanes == 0) block.sums[trial] = sums;
      }
    });
    take_trials(block, team);
  }
  team.all([&](int thread) {
    if (thread == 0) arguments.scales[number] = block.search.scale();
  });
}

// Of a long row that several blocks work on: for a chunk its range (phase -1), or up to `team_halves` trials of a phase
// from `first_trial` on ..
template <typename V>
ASKEW_FN void fit_part(FitBlock<V>& block, const FitArguments& arguments, int phase, int64_t number, int64_t chunk,
                       int first_trial, const Team& team) {
  const RowOf<V> row(arguments.rows, number);
  const int64_t at = number * chunks_of(row.columns, sum_chunk) + chunk;
  if (phase < 0) {
    clear_range(block, team);
    add_chunk_range(block, row, chunk, team);
    team.all([&](int thread) {
      if (thread == 0) arguments.space.ranges[at] = range_of(block);
    });
    return;
  }
  team.all([&](int thread) {
    if (thread > 0) return;
    block.trials = arguments.space.searches[number].trials(phase);
    block.trials.write(block.units);
  });
  team.all([&](int thread) {
    const int trial = first_trial + thread / sum_lanes;
    if (trial >= block.trials.count) return;
    const Sums sums = sums_of_chunk(block, row, chunk, block.units[trial], thread);
    if (thread % sum_lanes == 0) arguments.space.sums[at * arguments.fit.grids.most() + trial] = sums;
  });
}

// .. and, when all chunks have that, what comes of it.
template <typename V>
ASKEW_FN void fit_take(FitBlock<V>& block, const FitArguments& arguments, int phase, int64_t number, const Team& team) {
  const int64_t chunks = chunks_of(arguments.rows.columns, sum_chunk);
  const FitSpace& space = arguments.space;
  if (phase < 0) {
    team.all([&](int thread) {
      if (thread > 0) return;
      Range range{};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const Range& here = space.ranges[number * chunks + chunk];
        range.up = here.up > range.up ? here.up : range.up;
        range.down = here.down > range.down ? here.down : range.down;
        range.total += here.total;
      }
      space.searches[number] = Search::of(arguments.fit, range);
    });
    return;
  }
  team.all([&](int thread) {
    if (thread > 0) return;
    block.search = space.searches[number];
    block.trials = block.search.trials(phase);
    block.trials.write(block.units);
    if (!(block.search.largest > 0)) block.trials.count = 0;
  });
  team.all([&](int thread) {
    const int most = arguments.fit.grids.most();
    for (int trial = thread; trial < block.trials.count; trial += team_threads) {
      Sums sums{};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sums.add(space.sums[(number * chunks + chunk) * most + trial]);
      block.sums[trial] = sums;
    }
  });
  take_trials(block, team);
  team.all([&](int thread) {
    if (thread > 0) return;
    space.searches[number] = block.search;
    if (phase + 1 == Search::phases) arguments.scales[number] = block.search.scale();
  });
}

}  // namespace askew
