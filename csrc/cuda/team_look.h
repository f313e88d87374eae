// What a block of threads does that looks at weights beside their levels, as csrc/cpu/look.cpp does, and one that makes
// weights of packed codes. A block takes a chunk of order.h; where it is summed up, 16 threads a block of sums.
#pragma once

#include "../maths/look.h"
#include "../setup.h"
#include "team.h"

namespace askew {

// The scales of weights that a thread meets one after the other.
template <typename T>
struct ScaleRun {
  const T* scale;
  int64_t run, count, which, run_end;  // weights up to here have scale `which`
  T per_unit, unit, inverse;

  template <typename Span>
  ASKEW_FN ScaleRun(const Span& span, int64_t first, T per_unit_)
      : scale(static_cast<const T*>(span.scale)),
        run(span.scale_run),
        count(span.scale_count),
        which(first / run % count),
        run_end((first / run + 1) * run),
        per_unit(per_unit_) {
    set();
  }
  ASKEW_FN void at(int64_t i) {
    if (i < run_end) return;
    for (; i >= run_end; run_end += run) which = which + 1 == count ? 0 : which + 1;
    set();
  }
  ASKEW_FN void set() {
    unit = scale[which] * per_unit;
    inverse = T(1) / unit;
  }
};

struct LookArguments {
  Looking looking;
  LevelList levels;
  Counted counted;
};

constexpr int counters = 5;  // on a level, away from it, without a distance, NaN, flipped

template <typename V>
struct LookBlock {
  BlockBook<V> levels;
  unsigned counts[counters], occupancy[256];
  LargestBits largest;
  uint8_t codes[sum_chunk];
};

// A thread's weights of a block of sums: one lane.
template <typename V, bool measures>
ASKEW_FN void look_at_lane(LookBlock<V>& block, const LookArguments& arguments, int64_t chunk, int64_t first,
                           int64_t end, double (&squares)[2]) {
  using T = typename V::T;
  using Storage = typename V::Storage;
  const Looking& looking = arguments.looking;
  using Book = decltype(block.levels.book);  // a copy of what is small: a code that is stored could change the block's
  const std::conditional_t<V::is_table, const Book&, Book> book = block.levels.book;
  const T near = static_cast<T>(looking.near);
  unsigned counts[counters] = {};
  T largest = 0;
  ScaleRun<T> scale(looking, first, per_unit<V>(arguments.levels));
  for (int64_t i = first; i < end; i += sum_lanes) {
    scale.at(i);
    const T w = widen(static_cast<const Storage*>(looking.weight)[i]);
    const auto found = look(w, scale.unit, scale.inverse, book);
    const auto code = static_cast<uint8_t>(found.index);
    Storage snapped;
    narrow(snapped, found.snapped);
    block.codes[i - chunk] = code;
    if (looking.snapped) static_cast<Storage*>(looking.snapped)[i] = snapped;
    if constexpr (measures) {
      const T stored = widen(snapped), by = distance(w, stored, found.index, scale.unit, book);
      counts[0] += by == T(0);
      counts[1] += by > near;
      counts[2] += by != by;
      counts[3] += w != w;
      if (by > largest) largest = by;
      if (by == by) {
        const double wide = w, error = wide - static_cast<double>(stored);
        squares[0] += wide * wide;
        squares[1] += error * error;
      }
      count_one(block.occupancy, code);
      if (looking.before) counts[4] += looking.before[i] != code;
      if (looking.codes) looking.codes[i] = code;
    }
  }
  if constexpr (measures) {
    for (int k = 0; k < counters; ++k) count(&block.counts[k], counts[k]);
    raise_to(&block.largest, largest);
  }
}

template <typename V, bool measures>
ASKEW_FN void look_at_chunk(LookBlock<V>& block, const LookArguments& arguments, int64_t number, const Team& team) {
  const Looking& looking = arguments.looking;
  const int64_t chunk = number * sum_chunk, left = looking.size - chunk, size = left < sum_chunk ? left : sum_chunk;
  team.all([&](int thread) {
    block.levels.fill(arguments.levels, thread);
    block.occupancy[thread] = 0;
    if (thread < counters) block.counts[thread] = 0;
    if (thread == 0) block.largest = 0;
  });
  team.all([&](int thread) {
    const int64_t first = thread / sum_lanes * block_size, last = first + block_size < size ? first + block_size : size;
    if (first >= size) return;
    const Totals<2> squares = over_lanes<2>(thread, [&](int lane, double (&total)[2]) {
      look_at_lane<V, measures>(block, arguments, chunk, chunk + first + lane, chunk + last, total);
    });
    if (measures && thread % sum_lanes == 0) {
      double* to = arguments.counted.squares + (chunk + first) / block_size;
      to[0] = squares.of[0];
      to[chunks_of(looking.size, block_size)] = squares.of[1];
    }
  });
  team.all([&](int thread) {
    if constexpr (measures) {
      const Counted& counted = arguments.counted;
      if (thread < counters) count(counted.counts + thread, block.counts[thread]);
      if (thread < arguments.levels.count) count(counted.counts + counters + thread, block.occupancy[thread]);
      if (thread == 0) raise_to(reinterpret_cast<LargestBits*>(counted.numbers), number_of(block.largest));
    }
    const int per_byte = looking.per_byte;
    for (int64_t byte = thread; looking.packed && byte * per_byte < size; byte += team_threads) {
      int value = 0;
      for (int place = per_byte - 1; place >= 0; --place) {
        const int64_t i = byte * per_byte + place;
        value = value * looking.base + (i < size ? block.codes[i] : 0);  // the last byte is filled up with zeros
      }
      looking.packed[chunk / per_byte + byte] = static_cast<uint8_t>(value);
    }
  });
}

struct RestoreArguments {
  Restoring restoring;
  LevelList levels;
  double per_unit;
};

template <typename Storage> struct RestoreBlock {
  Arithmetic<Storage> values[256];  // levels, in units of the codebook
  int powers[8];                    // what a digit counts in each place of a byte
};

template <typename Storage>
ASKEW_FN void restore_chunk(RestoreBlock<Storage>& block, const RestoreArguments& arguments, int64_t number,
                            const Team& team) {
  using T = Arithmetic<Storage>;
  const Restoring& restoring = arguments.restoring;
  const T unit = static_cast<T>(arguments.per_unit);
  const int64_t chunk = number * sum_chunk, left = restoring.size - chunk;
  const int32_t size = static_cast<int32_t>(left < sum_chunk ? left : sum_chunk);
  team.all([&](int thread) {
    const int last = arguments.levels.count - 1;
    block.values[thread] = T(arguments.levels.values[thread < last ? thread : last]) / unit;
    if (thread < restoring.per_byte) {
      int power = 1;
      for (int place = 0; place < thread; ++place) power *= restoring.base;
      block.powers[thread] = power;
    }
  });
  team.all([&](int thread) {
    if (thread >= size) return;
    ScaleRun<T> scale(restoring, chunk + thread, unit);
    const uint8_t* packed = restoring.packed + chunk / restoring.per_byte;
    for (int32_t i = thread; i < size; i += team_threads) {
      scale.at(chunk + i);
      const int digit = packed[i / restoring.per_byte] / block.powers[i % restoring.per_byte] % restoring.base;
      narrow(static_cast<Storage*>(restoring.weight)[chunk + i], scale.unit * block.values[digit]);
    }
  });
}

}  // namespace askew
