// Runs every thread of every block of the CUDA kernels around the step on the processor, and compares what they leave
// with what the CPU kernels do. Built by tests/gpu/test_cuda_on_host.py, with address and undefined-behaviour
// sanitizers.
//
// host_setup CASES [SEED]
#include "../../csrc/cpu/cpu.h"
#include "../../csrc/cuda/team_fit.h"
#include "../../csrc/cuda/team_look.h"
#include "host.h"

namespace {

// Shared memory holds what it will.
template <typename Block> std::unique_ptr<Block> dirty() {
  auto block = std::make_unique<Block>();
  std::memset(static_cast<void*>(block.get()), 0xaa, sizeof *block);
  return block;
}
Team team() { return Team{static_cast<int>(below(team_threads))}; }

std::vector<double> draw_some_levels() {
  std::vector<double> levels;
  while (levels.empty()) levels = draw_levels();
  if (chance(0.1)) {  // all of one sign
    const double first = levels[0];
    for (double& level : levels) level = static_cast<float>(level - first + 1);
  }
  return levels;
}
double draw_weight(const std::vector<double>& levels, double scale) {
  if (chance(0.02)) return pick({static_cast<double>(NAN), static_cast<double>(INFINITY), 0.0, -0.0});
  if (chance(0.3)) return normal();
  return scale * (levels[below(static_cast<int64_t>(levels.size()))] +
                  pick({0.0, 0.5, 0.25, std::exp2(-static_cast<double>(below(22)))}) * pick({-1.0, 1.0}));
}

void check_same(const char* what, Dtype dtype, int64_t size, const Buffer& wanted, const Buffer& found) {
  if (std::memcmp(wanted.memory.get(), found.memory.get(), wanted.offset) != 0) fail("written before the start", 0, 0);
  for (int64_t i = 0; i < size; ++i) {
    const char *a = wanted.data() + i * size_of(dtype), *b = found.data() + i * size_of(dtype);
    const bool same = dtype == Dtype::float64   ? alike<double>(a, b)
                      : dtype == Dtype::float32 ? alike<float>(a, b)
                      : dtype == Dtype::float16 ? alike<Float16>(a, b)
                                                : alike<BFloat16>(a, b);
    if (!same) fail(what, i, size);
  }
}
void check_bytes(const char* what, const Buffer& wanted, const Buffer& found) {
  for (int64_t i = 0; i < wanted.bytes + wanted.offset; ++i)
    if (wanted.memory[i] != found.memory[i]) fail(what, i - wanted.offset, wanted.bytes);
}

// A weight, its scales, its levels.
struct Drawn {
  Dtype dtype;
  std::vector<double> levels;
  int64_t size, run, count;
  Buffer weight, scale;

  static Drawn draw() {
    const Dtype dtype = pick({Dtype::float32, Dtype::float64, Dtype::bfloat16, Dtype::float16}),
                wide = dtype == Dtype::float64 ? dtype : Dtype::float32;
    const std::vector<double> levels = draw_some_levels();
    const int64_t size = pick<int64_t>(
        {0, 1, 2, 7, 15, 16, 17, 255, 257, 1279, 1280, 1281, 9225, 20479, 20480, 20481, 3 * sum_chunk + 1285});
    const int64_t run =
        chance(0.3) || size < 2 ? (size > 0 ? size : 1) : pick<int64_t>({1, 2, 9, 16, 27, 128, 1281, size / 2, size});
    const int64_t count = chance(0.5) ? (size > 0 ? chunks_of(size, run) : 1) : 1 + below(20);
    Drawn drawn{dtype,
                levels,
                size,
                run,
                count,
                Buffer(size * size_of(dtype), below(4) * size_of(dtype)),
                Buffer(count * size_of(wide), 0)};
    for (int64_t k = 0; k < count; ++k)
      put(drawn.scale.data(), wide, k, pick({0.25, static_cast<double>(0.0371f), 2.0, chance(0.1) ? 0.0 : 0.5}));
    for (int64_t i = 0; i < size; ++i) put(drawn.weight.data(), dtype, i, draw_weight(levels, 0.25));
    return drawn;
  }
  Levels list() const { return {levels.data(), static_cast<int>(levels.size())}; }
};

std::pair<int, int> draw_digits(size_t levels) {
  while (true) {
    const auto [base, per_byte] = pick<std::pair<int, int>>({{256, 1}, {16, 2}, {4, 4}, {3, 5}, {2, 8}});
    if (levels <= static_cast<size_t>(base)) return {base, per_byte};
  }
}

void run_look() {
  const Drawn drawn = Drawn::draw();
  const int64_t size = drawn.size, chunks = chunks_of(size, sum_chunk), blocks = chunks_of(size, block_size);
  const auto [base, per_byte] = draw_digits(drawn.levels.size());
  const bool packs = chance(0.5), snaps = chance(0.5), measures = chance(0.5), keeps = measures && chance(0.5),
             compares = keeps && chance(0.5);
  Looking looking{};
  looking.dtype = drawn.dtype;
  looking.levels = drawn.list();
  looking.weight = drawn.weight.data();
  looking.scale = drawn.scale.data();
  looking.scale_run = drawn.run;
  looking.scale_count = drawn.count;
  looking.size = size;
  looking.base = base;
  looking.per_byte = per_byte;
  looking.measures = measures;
  looking.near = pick({0.0, 0.25});
  Buffer earlier(size, below(4));
  for (int64_t i = 0; i < size; ++i) earlier.data()[i] = static_cast<char>(below(drawn.list().count));
  struct Outputs {
    Buffer packed, snapped, codes;
  };
  Outputs wanted{Buffer(chunks_of(size, per_byte), below(3)), Buffer(size * size_of(drawn.dtype), 0), earlier};
  Outputs found = wanted;
  const auto told = [&](Outputs& outputs) {
    Looking mine = looking;
    if (packs) mine.packed = reinterpret_cast<uint8_t*>(outputs.packed.data());
    if (snaps) mine.snapped = outputs.snapped.data();
    if (keeps) mine.codes = reinterpret_cast<uint8_t*>(outputs.codes.data());
    if (compares) mine.before = mine.codes;
    return mine;
  };
  Seen seen{};
  std::vector<Squares> squares(chunks);
  cpu_look_baseline(told(wanted), 0, chunks, seen, squares.data());
  Squares total{0, 0};
  for (const Squares& each : squares) {
    total.weights += each.weights;
    total.errors += each.errors;
  }

  std::vector<unsigned long long> counts(counters + 256, 0);
  std::vector<double> numbers(3, 0), sums(2 * blocks, 77);
  const LookArguments arguments{told(found), list_of(drawn.list()), {counts.data(), numbers.data(), sums.data()}};
  visit_around(drawn.dtype, drawn.list(), [&](auto around) {
    using V = decltype(around);
    for (int64_t number = 0; number < chunks; ++number) {
      const auto block = dirty<LookBlock<V>>();
      if (measures)
        look_at_chunk<V, true>(*block, arguments, number, team());
      else
        look_at_chunk<V, false>(*block, arguments, number, team());
    }
  });
  check_bytes("other packed codes than the CPU's", wanted.packed, found.packed);
  check_bytes("other codes than the CPU's", wanted.codes, found.codes);
  check_same("another snapped weight than the CPU's", drawn.dtype, snaps ? size : 0, wanted.snapped, found.snapped);
  if (!measures) return;
  const int64_t whole[] = {seen.on_level, seen.away, seen.lost, seen.nan, seen.flipped};
  for (int k = 0; k < counters; ++k)
    if (static_cast<unsigned long long>(whole[k]) != counts[k]) fail("another count than the CPU's", k, counts[k]);
  for (int k = 0; k < 256; ++k)
    if (static_cast<unsigned long long>(seen.occupancy[k]) != counts[counters + k])
      fail("another count of a level than the CPU's", k, counts[counters + k]);
  if (seen.largest != numbers[0]) fail("another largest distance than the CPU's", size, 0);
  if (total.weights != add_blocks(sums.data(), blocks) || total.errors != add_blocks(sums.data() + blocks, blocks))
    if (total.weights == total.weights) fail("another sum than the CPU's", size, blocks);
}

void run_restore() {
  const Drawn drawn = Drawn::draw();
  const auto [base, per_byte] = draw_digits(drawn.levels.size());
  Buffer packed(chunks_of(drawn.size, per_byte), below(3));
  for (int64_t k = 0; k < packed.bytes; ++k) packed.data()[k] = static_cast<char>(source());
  Buffer wanted(drawn.size * size_of(drawn.dtype), below(2) * size_of(drawn.dtype)), found = wanted;
  const int64_t chunks = chunks_of(drawn.size, sum_chunk);
  const auto told = [&](Buffer& weight) {
    return Restoring{drawn.dtype,  drawn.list(), reinterpret_cast<const uint8_t*>(packed.data()),
                     base,         per_byte,     drawn.scale.data(),
                     drawn.run,    drawn.count,  drawn.size,
                     weight.data()};
  };
  cpu_restore_baseline(told(wanted), 0, chunks);
  const double unit = is_uniform(drawn.list()) ? drawn.levels[1] - drawn.levels[0] : 1;
  const RestoreArguments arguments{told(found), list_of(drawn.list()), unit};
  visit_storage(drawn.dtype, [&](auto storage) {
    for (int64_t number = 0; number < chunks; ++number)
      restore_chunk(*dirty<RestoreBlock<decltype(storage)>>(), arguments, number, team());
  });
  check_same("another restored weight than the CPU's", drawn.dtype, drawn.size, wanted, found);
}

void run_fit() {
  const Dtype dtype = pick({Dtype::float32, Dtype::float64, Dtype::bfloat16, Dtype::float16});
  const std::vector<double> levels = draw_some_levels();
  const Levels list{levels.data(), static_cast<int>(levels.size())};
  const bool is_long = chance(0.1);
  const int64_t columns = is_long ? pick<int64_t>({sum_chunk + 1, 2 * sum_chunk + 1300})
                                  : pick<int64_t>({1, 3, 16, 17, 63, 64, 130, 1281, 2561}),
                count = is_long ? 1 + below(2) : 1 + below(3);
  const bool across = chance(0.3);  // rows side by side
  Buffer weights(count * columns * size_of(dtype), below(3) * size_of(dtype));
  const double spread = pick({1.0, 1e-30, 1e20});
  for (int64_t i = 0; i < count * columns; ++i)
    put(weights.data(), dtype, i, chance(0.02) ? 0 : draw_weight(levels, 0.25) * (size_of(dtype) == 2 ? 1 : spread));
  if (chance(0.2)) std::memset(weights.data(), 0, columns * size_of(dtype));
  const Rows rows{dtype, weights.data(), columns, across ? 1 : columns, across ? count : 1, list};
  std::vector<double> wanted(count, 77), found = wanted;
  cpu_fit_baseline.rows(rows, 0, count, wanted.data());

  const Fitting fit = fitting(list, columns);
  const int64_t chunks = chunks_of(columns, sum_chunk);
  std::vector<Search> searches(count);
  std::vector<Range> ranges(count * chunks);
  std::vector<Sums> sums(count * chunks * fit.grids.most());
  const FitArguments arguments{rows, count,        list_of(list),
                               fit,  found.data(), {searches.data(), ranges.data(), sums.data()}};
  if (fit.grids.most() > most_trials) fail("more trials than there is room for", fit.grids.most(), columns);
  visit_around(dtype, list, [&](auto around) {
    using V = decltype(around);
    const auto block = dirty<FitBlock<V>>();
    begin_fit(*block, arguments, team());
    if (!is_long && !chance(0.2)) {
      for (int64_t row = 0; row < count; ++row) fit_row(*block, arguments, row, team());
      return;
    }
    for (int phase = -1; phase < Search::phases; ++phase) {  // as csrc/cuda/setup.cu launches it
      const int trials = phase == 1 ? fit.grids.coarse() : phase == 2 ? fit.grids.fine : 1;
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          for (int first = 0; first < trials; first += team_halves)
            fit_part(*block, arguments, phase, row, chunk, first, team());
      }
      for (int64_t row = 0; row < count; ++row) fit_take(*block, arguments, phase, row, team());
    }
  });
  for (int64_t row = 0; row < count; ++row)
    if (wanted[row] != found[row]) fail("another scale than the CPU's: row, columns", row, columns);
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 1000;
  source.seed(argc > 2 ? std::atoi(argv[2]) : 0);
  for (int i = 0; i < cases; ++i) pick({run_look, run_restore, run_fit})();
  std::printf("%d cases: every thread of every block as the CPU\n", cases);
}
