// Weights beside their levels on the CPU: codes, packed codes, snapped weights and what a report counts, in one pass;
// and from packed codes back to weights.
//
// Compiled once for each instruction set, as loop.cpp is.
#include "../maths/look.h"

#include "cpu.h"
#include "native.h"

#if !defined(ASKEW_CPU_LOOK)
#define ASKEW_CPU_LOOK cpu_look_baseline
#define ASKEW_CPU_RESTORE cpu_restore_baseline
#endif

namespace askew {
namespace {

// The scales of packs that follow each other.
template <typename T, typename P>
struct Scales {
  static constexpr int width = lanes<P>();
  const T* scale;
  int64_t run, count, which, run_end;  // weights up to here have scale `which`
  T per_unit;                          // unit of the codebook
  P unit{}, inverse{};
  bool fresh = true;

  // Span: what has a scale, a scale_run and a scale_count.
  template <typename Span>
  ASKEW_FN Scales(const Span& span, int64_t first, T per_unit_)
      : scale(static_cast<const T*>(span.scale)),
        run(span.scale_run),
        count(span.scale_count),
        which(first / run % count),
        run_end((first / run + 1) * run),
        per_unit(per_unit_) {}

  ASKEW_FN void advance() {
    which = which + 1 == count ? 0 : which + 1;
    run_end += run;
    fresh = true;
  }
  // For the pack from weight i on, of which `live` lanes count.
  ASKEW_FN void at(int64_t i, int live) {
    while (i >= run_end) advance();
    if (i + live <= run_end) {
      if (fresh) set(broadcast(scale[which], P{}));
      fresh = false;
      return;
    }
    P each = broadcast(scale[which], P{});
    for (int lane = 0; lane < live; ++lane) {
      while (i + lane >= run_end) advance();
      each[lane] = scale[which];
    }
    set(each);
    fresh = true;
  }
  ASKEW_FN void set(P each) {
    unit = each * per_unit;
    inverse = T(1) / unit;
  }
};

// Codes of a block as digits, `per_byte` to a byte.
template <int per_byte>
ASKEW_FN void pack_codes(const uint8_t* codes, int64_t size, int base, uint8_t* packed) {
  for (int64_t byte = 0; byte * per_byte < size; ++byte) {
    int value = 0;
#pragma GCC unroll 8
    for (int place = per_byte - 1; place >= 0; --place) value = value * base + codes[byte * per_byte + place];
    packed[byte] = static_cast<uint8_t>(value);
  }
}

ASKEW_FN void pack_block(const Looking& looking, uint8_t* codes, int64_t size, int64_t first) {
  for (int64_t i = size; i < size + 8 && i < block_size; ++i) codes[i] = 0;  // the last byte is filled up with zeros
  uint8_t* packed = looking.packed + first / looking.per_byte;
  switch (looking.per_byte) {
    case 8:
      return pack_codes<8>(codes, size, 2, packed);
    case 5:
      return pack_codes<5>(codes, size, 3, packed);
    case 4:
      return pack_codes<4>(codes, size, 4, packed);
    case 2:
      return pack_codes<2>(codes, size, 16, packed);
    default:
      std::memcpy(packed, codes, size);
  }
}

template <typename Storage, typename Codebook, bool measures>
struct Looker {
  using T = Arithmetic<Storage>;
  using P = NativePack<Storage>;
  using Counts = MaskOf<P>;
  static constexpr int width = lanes<P>();

  const Looking& looking;
  const Codebook codebook;
  Scales<T, P> scales;
  Seen& seen;
  T near;
  P largest{};
  alignas(64) uint8_t codes[block_size];

  // Weights per level, of a chunk. Several tables in turn, since a count has to be written back before it can be
  // increased again.
  static constexpr int tallies = 4;
  uint32_t tally[tallies][256];

  // Of a block.
  Counts on_level, away, lost, nan;
  LaneSums weights, errors;

  ASKEW_FN Looker(const Looking& looking_, const Codebook& codebook_, int64_t first, T per_unit, Seen& seen_)
      : looking(looking_),
        codebook(codebook_),
        scales(looking_, first, per_unit),
        seen(seen_),
        near(static_cast<T>(looking_.near)) {}

  // x as it comes back from its storage.
  static ASKEW_FN P stored(P x) {
    if constexpr (sizeof(Storage) == sizeof(T)) {
      return x;
    } else {
      Storage there[width];
      store(there, x);
      return load<P>(there);
    }
  }

  // One pack, whose first weight goes to lane `lane` of the sums; live: all bits set where there is a weight.
  ASKEW_FN void one(int lane, const Storage* from, Storage* to, uint8_t* code, Counts live, const Codebook& codebook) {
    const P w = load<P>(from);
    const auto found = look(w, scales.unit, scales.inverse, codebook);
    store_codes(code, found.index);
    if (to) store(to, found.snapped);
    if constexpr (measures) {
      const P there = stored(found.snapped), away_by = distance(w, there, found.index, scales.unit, codebook);
      const Counts has_level = (away_by == away_by) & live;
      on_level -= (away_by == T(0)) & live;
      away -= (away_by > near) & live;
      lost -= (away_by != away_by) & live;
      nan -= (w != w) & live;
      largest = ((away_by > largest) & live) != 0 ? away_by : largest;
      const P known = has_level != 0 ? w : P{}, level = has_level != 0 ? there : P{};
      weights.add(lane, known, known);
      add_errors(lane, known, level);
    }
  }
  // The differences are taken in double, as the sums are.
  ASKEW_FN void add_errors(int lane, P w, P level) {
    const auto square = [](Doubles x) { return x * x; };
    const int at = lane / LaneSums::width;
    errors.sums[at] += square(widened<0>(w) - widened<0>(level));
    if constexpr (width > LaneSums::width) errors.sums[at + 1] += square(widened<1>(w) - widened<1>(level));
  }

  ASKEW_FN void block(int64_t first, int64_t size, Squares& squares) {
    const Storage* from = at<Storage>(looking.weight, first);
    Storage* to = looking.snapped ? at<Storage>(looking.snapped, first) : nullptr;
    if constexpr (measures) {
      on_level = away = lost = nan = Counts{};
      weights = errors = LaneSums{};
    }
    // a copy: otherwise a stored byte could change it, for all that the compiler knows
    const std::conditional_t<(sizeof(Codebook) > 1024), const Codebook&, Codebook> book = codebook;
    int64_t i = 0;
    for (; i + sum_lanes <= size; i += sum_lanes) {
#pragma GCC unroll 8
      for (int lane = 0; lane < sum_lanes; lane += width) {
        scales.at(first + i + lane, width);
        one(lane, from + i + lane, to ? to + i + lane : nullptr, codes + i + lane, ~Counts{}, book);
      }
    }
    if (i < size) tail(first, i, static_cast<int>(size - i), from, to);
    finish(first, size, squares);
  }

  // The last lanes of all: on copies, so that nothing beyond them is touched.
  __attribute__((noinline)) void tail(int64_t first, int64_t i, int count, const Storage* from, Storage* to) {
    alignas(64) Storage weight[sum_lanes] = {}, snapped[sum_lanes];
    uint8_t code[sum_lanes];
    std::memcpy(weight, from + i, count * sizeof(Storage));
    for (int lane = 0; lane < sum_lanes && lane < count; lane += width) {
      const int live = count - lane < width ? count - lane : width;
      Counts mask{};
      for (int k = 0; k < live; ++k) mask[k] = -1;
      scales.at(first + i + lane, live);
      one(lane, weight + lane, to ? snapped + lane : nullptr, code + lane, mask, codebook);
    }
    if (to) std::memcpy(to + i, snapped, count * sizeof(Storage));
    std::memcpy(codes + i, code, count);
  }

  ASKEW_FN void finish(int64_t first, int64_t size, Squares& squares) {
    if (looking.packed) pack_block(looking, codes, size, first);
    if (looking.before) {
      int flipped = 0;
      for (int64_t i = 0; i < size; ++i) flipped += codes[i] != looking.before[first + i];
      seen.flipped += flipped;
    }
    if (looking.codes)
      for (int64_t i = 0; i < size; ++i) looking.codes[first + i] = codes[i];
    if constexpr (measures) {
      for (int64_t i = 0; i < size; ++i) ++tally[i % tallies][codes[i]];
      for (int lane = 0; lane < width; ++lane) {
        seen.on_level += on_level[lane];
        seen.away += away[lane];
        seen.lost += lost[lane];
        seen.nan += nan[lane];
      }
      squares.weights += weights.total();
      squares.errors += errors.total();
    }
  }

  ASKEW_FN void chunk(int64_t number, Squares& squares) {
    const int64_t begin = number * sum_chunk, left = looking.size - begin;
    squares = {0, 0};
    if constexpr (measures) std::memset(tally, 0, sizeof tally);
    for (int64_t i = 0; i < sum_chunk && i < left; i += block_size)
      block(begin + i, left - i < block_size ? left - i : int64_t{block_size}, squares);
    if constexpr (measures) {
      for (const auto& each : tally)
        for (int level = 0; level < 256; ++level) seen.occupancy[level] += each[level];
    }
  }
};

template <typename Storage, bool measures>
ASKEW_FN void run(const Looking& looking, int64_t begin, int64_t end, Seen& seen, Squares* squares) {
  using T = Arithmetic<Storage>;
  visit_codebook<Storage>(looking.levels, [&](const auto& codebook) {
    const double* levels = looking.levels.values;
    const T per_unit = is_uniform(looking.levels) ? static_cast<T>(levels[1] - levels[0]) : T(1);
    Looker<Storage, std::decay_t<decltype(codebook)>, measures> looker(looking, codebook, begin * sum_chunk, per_unit,
                                                                       seen);
    for (int64_t chunk = begin; chunk < end; ++chunk) looker.chunk(chunk, squares[chunk]);
    for (int lane = 0; lane < lanes<NativePack<Storage>>(); ++lane)
      if (looker.largest[lane] > seen.largest) seen.largest = looker.largest[lane];
  });
}

template <typename Storage>
ASKEW_FN void either(const Looking& looking, int64_t begin, int64_t end, Seen& seen, Squares* squares) {
  if (looking.measures)
    run<Storage, true>(looking, begin, end, seen, squares);
  else
    run<Storage, false>(looking, begin, end, seen, squares);
}

// Weights made of packed codes, a block at a time.
template <typename Storage>
struct Restorer {
  using T = Arithmetic<Storage>;
  using P = NativePack<Storage>;
  static constexpr int width = lanes<P>();

  const Restoring& restoring;
  Scales<T, P> scales;

  // level_of(i): the levels of a pack from weight i of the block on, in units of the codebook. Packs may begin beyond
  // the block's last weight but one.
  template <typename LevelOf> ASKEW_FN void block(int64_t first, int64_t size, const LevelOf& level_of) {
    Storage* to = at<Storage>(restoring.weight, first);
    int64_t i = 0;
    for (; i + width <= size; i += width) {
      scales.at(first + i, width);
      store(to + i, scales.unit * level_of(i));
    }
    if (i < size) {  // the last lanes of all: by way of a copy, so that nothing beyond them is touched
      Storage there[width];
      scales.at(first + i, static_cast<int>(size - i));
      store(there, scales.unit * level_of(i));
      std::memcpy(to + i, there, (size - i) * sizeof(Storage));
    }
  }
};

// Calls each(first, size) for the blocks of chunks [begin, end).
template <typename Each>
ASKEW_FN void over_blocks(const Restoring& restoring, int64_t begin, int64_t end, const Each& each) {
  const int64_t last = end * sum_chunk < restoring.size ? end * sum_chunk : restoring.size;
  for (int64_t i = begin * sum_chunk; i < last; i += block_size)
    each(i, last - i < block_size ? last - i : int64_t{block_size});
}

// Many codes to a byte: what the digits of each of 256 bytes stand for is looked up at once.
template <typename Storage, int per_byte>
ASKEW_FN void restore_bytes(const Restoring& restoring, int64_t begin, int64_t end, Arithmetic<Storage> per_unit) {
  using T = Arithmetic<Storage>;
  using P = NativePack<Storage>;
  alignas(64) T values[256 * per_byte];
  alignas(64) T levels[block_size + lanes<P>()] = {};
  for (int byte = 0; byte < 256; ++byte) {
    for (int place = 0, rest = byte; place < per_byte; ++place, rest /= restoring.base) {
      const int digit = rest % restoring.base, last = restoring.levels.count - 1;
      values[byte * per_byte + place] = static_cast<T>(restoring.levels.values[digit < last ? digit : last]) / per_unit;
    }
  }
  Restorer<Storage> restorer{restoring, {restoring, begin * sum_chunk, per_unit}};
  over_blocks(restoring, begin, end, [&](int64_t first, int64_t size) {
    const uint8_t* packed = restoring.packed + first / per_byte;
    for (int64_t k = 0; k * per_byte < size; ++k)
      std::memcpy(levels + k * per_byte, values + packed[k] * per_byte, per_byte * sizeof(T));
    restorer.block(first, size, [&](int64_t i) { return load<P>(levels + i); });
  });
}

// One or two codes to a byte: each is made an index, and asks the codebook.
template <typename Storage, int per_byte>
ASKEW_FN void restore_codes(const Restoring& restoring, int64_t begin, int64_t end, Arithmetic<Storage> per_unit) {
  using P = NativePack<Storage>;
  alignas(64) uint8_t codes[block_size + lanes<P>()] = {};
  Restorer<Storage> restorer{restoring, {restoring, begin * sum_chunk, per_unit}};
  const int top = restoring.levels.count - 1;
  visit_codebook<Storage>(restoring.levels, [&](const auto& codebook) {
    using Index = decltype(codebook.nearest(P{}));
    over_blocks(restoring, begin, end, [&](int64_t first, int64_t size) {
      const uint8_t* packed = restoring.packed + first / per_byte;
      for (int64_t k = 0; k * per_byte < size; ++k) {
        if constexpr (per_byte == 2) {
          codes[2 * k] = packed[k] & 15;
          codes[2 * k + 1] = packed[k] >> 4;
        } else {
          codes[k] = packed[k];
        }
      }
      for (int64_t i = 0; i < size; ++i) codes[i] = codes[i] < top ? codes[i] : top;
      restorer.block(first, size, [&](int64_t i) { return codebook.level(load_codes<Index>(codes + i)); });
    });
  });
}

template <typename Storage>
ASKEW_FN void restore_digits(const Restoring& restoring, int64_t begin, int64_t end) {
  using T = Arithmetic<Storage>;
  const double* levels = restoring.levels.values;
  const T per_unit = is_uniform(restoring.levels) ? static_cast<T>(levels[1] - levels[0]) : T(1);
  switch (restoring.per_byte) {
    case 8:
      return restore_bytes<Storage, 8>(restoring, begin, end, per_unit);
    case 5:
      return restore_bytes<Storage, 5>(restoring, begin, end, per_unit);
    case 4:
      return restore_bytes<Storage, 4>(restoring, begin, end, per_unit);
    case 2:
      return restore_codes<Storage, 2>(restoring, begin, end, per_unit);
    default:
      return restore_codes<Storage, 1>(restoring, begin, end, per_unit);
  }
}

}  // namespace

void ASKEW_CPU_RESTORE(const Restoring& restoring, int64_t begin, int64_t end) {
  switch (restoring.dtype) {
    case Dtype::float32:
      return restore_digits<float>(restoring, begin, end);
    case Dtype::float64:
      return restore_digits<double>(restoring, begin, end);
    case Dtype::bfloat16:
      return restore_digits<BFloat16>(restoring, begin, end);
    case Dtype::float16:
      return restore_digits<Float16>(restoring, begin, end);
  }
}

void ASKEW_CPU_LOOK(const Looking& looking, int64_t begin, int64_t end, Seen& seen, Squares* squares) {
  switch (looking.dtype) {
    case Dtype::float32:
      return either<float>(looking, begin, end, seen, squares);
    case Dtype::float64:
      return either<double>(looking, begin, end, seen, squares);
    case Dtype::bfloat16:
      return either<BFloat16>(looking, begin, end, seen, squares);
    case Dtype::float16:
      return either<Float16>(looking, begin, end, seen, squares);
  }
}

}  // namespace askew
