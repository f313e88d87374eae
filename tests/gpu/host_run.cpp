// Runs every thread of every block of CUDA launches on the processor, and compares what they leave with what the CPU
// kernel does. Built by tests/gpu/test_cuda_on_host.py, with address and undefined-behaviour sanitizers.
//
// host_run CASES [SEED]
#include "../../csrc/cpu/cpu.h"
#include "../../csrc/cuda/block.h"
#include "../../csrc/cuda/table.h"
#include "host.h"

using namespace askew;

namespace {

// One tensor and all that belongs to it. codes: bytes; null where absent.
struct Tensor {
  int64_t size, run, count, outer_run, outer_count;
  std::vector<std::pair<Dtype, Buffer>> numbers;  // weight, grad, state .., snapped
  std::vector<Buffer> codes, remainders;
  std::vector<double> steps;
  std::vector<Buffer> scale, growth;
  std::vector<double> sums;  // (E7): of blocks, where scales have one run each
};

struct Setup {
  Launch launch{};
  std::vector<double> levels;
  int states;
  bool has_snapped, has_codes, steps_there;
};

Setup draw_setup() {
  Setup setup;
  Launch& launch = setup.launch;
  Settings& s = launch.settings;
  launch.dtype = pick({Dtype::float32, Dtype::float64, Dtype::bfloat16, Dtype::float16});
  launch.rule = pick({Rule::sgd, Rule::adamw});
  launch.wide_grad = size_of(launch.dtype) == 2 && chance(0.3);
  launch.wide_state = size_of(launch.dtype) == 2 && chance(0.5);
  if (size_of(launch.dtype) == 2)
    launch.rounding = pick({Rounding::nearest, Rounding::remainder, Rounding::stochastic});
  s.seed = source();
  setup.levels = draw_levels();
  launch.levels = {setup.levels.data(), static_cast<int>(setup.levels.size())};
  s.lr = pick({0.0, 0.25, static_cast<double>(0.037f)});
  s.weight_decay = pick({0.0, 0.1});
  s.grad_scale = pick({1.0, 1024.0});
  s.maximize = chance(0.3);
  s.epsilon = pick({0.0, static_cast<double>(0.3f), static_cast<double>(0.96f), 1.0});
  s.interval = chance(0.5);
  s.skew_gradient = s.interval && chance(0.4);
  s.rate_is_alpha = s.skew_gradient || chance(0.4);
  s.rate = pick({0.5, 3.0});
  s.max_step = pick({0.5, static_cast<double>(INFINITY)});
  s.clip = chance(0.8);
  if (launch.rule == Rule::sgd) {
    s.momentum = pick({0.0, 0.9});
    s.nesterov = s.momentum > 0 && chance(0.5);
    s.dampening = s.momentum > 0 && !s.nesterov && chance(0.3) ? 0.3 : 0;
    setup.states = s.momentum > 0 ? 1 : 0;
  } else {
    s.beta1 = 0.9;
    s.beta2 = 0.99;
    s.eps = 1e-8;
    s.amsgrad = chance(0.3);
    s.steps = 3;
    setup.states = s.amsgrad ? 3 : 2;
  }
  s.snap_unit = snap_unit(launch.dtype, launch.levels);
  s.learns = !setup.levels.empty() && chance(0.5);
  setup.has_codes = !setup.levels.empty() && chance(0.5);
  setup.has_snapped = !setup.levels.empty() && chance(0.5);
  setup.steps_there = launch.rule == Rule::adamw && chance(0.3);
  launch.snapped_dtype = pick({Dtype::float32, Dtype::float64, Dtype::bfloat16, Dtype::float16});
  return setup;
}

Tensor draw_tensor(const Setup& setup) {
  const Launch& launch = setup.launch;
  const bool is_double = launch.dtype == Dtype::float64;
  Tensor tensor{pick<int64_t>({0,  1,  2,  3,  5,   7,    8,    9,    15,   16,   17,    31,
                               33, 63, 64, 65, 127, 1000, 8191, 8192, 8193, 9225, 16391, 16653}),
                0,
                1,
                1,
                1,
                {},
                {},
                {},
                {},
                {},
                {},
                {}};
  tensor.run = tensor.size > 0 ? tensor.size : 1;
  const int64_t odd = tensor.size % 9 == 0 ? 9 : 1281;
  if (tensor.size > smallest_chunk && tensor.size % odd == 0 && chance(0.6)) {  // chunks that end within a vector
    tensor.run = odd;
    tensor.count = tensor.size / odd;
  } else if (chance(0.6) && tensor.size > 1) {  // per channel or group, in memory order or across it
    tensor.run = pick<int64_t>({1, 2, 8, 9, 27, 32, 1281, tensor.size / 2, tensor.size});
    tensor.count = chance(0.5) ? (tensor.size + tensor.run - 1) / tensor.run : 1 + below(20);
  }
  if (tensor.count > 1 && chance(0.4)) {  // experts, or groups along the first dimension
    tensor.outer_run = tensor.run * tensor.count * (1 + below(3));
    tensor.outer_count = 1 + below(5);
  }
  const int64_t count = tensor.count * tensor.outer_count;
  tensor.scale.emplace_back(count * (is_double ? 8 : 4), 0);
  std::vector<double> scales;
  for (int64_t i = 0; i < count; ++i) {
    scales.push_back(pick({0.25, static_cast<double>(0.0371f), 2.0, chance(0.1) ? 0.0 : 0.5}));
    put(tensor.scale[0].data(), is_double ? Dtype::float64 : Dtype::float32, i, scales.back());
  }
  if (launch.settings.learns) {
    tensor.growth.emplace_back(count * (is_double ? 8 : 4), 0);
    for (int64_t i = 0; i < count; ++i)
      put(tensor.growth[0].data(), is_double ? Dtype::float64 : Dtype::float32, i, pick({1.0, 0.96, 1.05}));
    if (tensor.outer_count < 2 && tensor.run * tensor.count == tensor.size)
      tensor.sums.assign(sum_kinds(launch.rule) * SumBlocks::of(tensor.run).each * tensor.count, 77);
  }
  const bool misaligned = chance(0.4);
  const auto add = [&](Dtype dtype, auto value) {
    tensor.numbers.emplace_back(
        dtype, Buffer(tensor.size * size_of(dtype), misaligned ? below(16 / size_of(dtype)) * size_of(dtype) : 0));
    for (int64_t i = 0; i < tensor.size; ++i) put(tensor.numbers.back().second.data(), dtype, i, value(i));
  };
  add(launch.dtype, [&](int64_t i) {
    const double scale =
        scales[i / tensor.outer_run % tensor.outer_count * tensor.count + i / tensor.run % tensor.count];
    if (setup.levels.empty() || chance(0.3)) return normal();
    const double level = setup.levels[below(static_cast<int64_t>(setup.levels.size()))];
    return scale * (level + pick({0.0, 0.5, 0.25, std::exp2(-static_cast<double>(below(22)))}) * pick({-1.0, 1.0}));
  });
  add(launch.wide_grad ? Dtype::float32 : launch.dtype, [&](int64_t) {
    return chance(0.02) ? pick({static_cast<double>(NAN), static_cast<double>(INFINITY)})
                        : normal() * pick({0.0, 1e-3, 1.0, 30.0});
  });
  for (int k = 0; k < setup.states; ++k) {
    add(launch.wide_state ? Dtype::float32 : launch.dtype,
        [&](int64_t) { return k > 0 ? normal() * normal() : std::fabs(normal()); });
  }
  if (setup.has_snapped) add(launch.snapped_dtype, [](int64_t) { return 77.0; });
  if (setup.launch.rounding == Rounding::remainder) {
    tensor.remainders.emplace_back(tensor.size * 2, misaligned ? below(8) * 2 : 0);
    for (int64_t i = 0; i < tensor.size * 2; ++i) tensor.remainders[0].data()[i] = static_cast<char>(source());
  }
  if (setup.has_codes) tensor.codes.emplace_back(tensor.size, misaligned ? below(16) : 0);
  if (setup.steps_there) tensor.steps.push_back(2);
  return tensor;
}

Span span_of(Tensor& tensor, const Setup& setup) {
  Span span{};
  span.weight = tensor.numbers[0].second.data();
  span.grad = tensor.numbers[1].second.data();
  for (int k = 0; k < setup.states; ++k) span.state[k] = tensor.numbers[2 + k].second.data();
  if (setup.has_snapped) span.snapped = tensor.numbers.back().second.data();
  if (setup.has_codes) span.codes = reinterpret_cast<uint8_t*>(tensor.codes[0].data());
  if (!tensor.remainders.empty()) span.remainder = tensor.remainders[0].data();
  span.stream = static_cast<uint64_t>(tensor.size);
  span.first_element = tensor.size % 2 ? (int64_t{1} << 32) - 20 : 0;
  if (!setup.levels.empty()) span.scale = tensor.scale[0].data();
  if (!tensor.growth.empty()) span.growth = tensor.growth[0].data();
  if (!tensor.sums.empty()) span.sums = tensor.sums.data();
  span.scale_run = tensor.run;
  span.scale_count = tensor.count;
  span.outer_run = tensor.outer_run;
  span.outer_count = tensor.outer_count;
  span.size = tensor.size;
  if (setup.steps_there) span.step = tensor.steps.data();
  return span;
}

// Variants that the program is built for: all, or few, for builds with a planted fault.
template <typename V> constexpr bool built() {
#if defined(FEW_VARIANTS)
  return V::book == Book::uniform && std::is_same_v<typename V::RuleType, Sgd> &&
         std::is_same_v<typename V::Annealing, Capture> &&
         (std::is_same_v<typename V::Storage, float> || std::is_same_v<typename V::Storage, BFloat16>);
#else
  return true;
#endif
}

// The launch as csrc/cuda/launches.h makes it. Threads run in a drawn order, since none waits for another except
// where all do.
template <typename V>
void run_blocks(const Launch& launch, const CudaCall& call) {
  if constexpr (built<V>()) {
    KernelArguments<V> arguments = arguments_of<V>(launch, call);
    const int64_t blocks = set_spans(arguments, launch);
    for (int64_t number = 0; number < blocks; ++number) {
      const auto block = std::make_unique<Block<V>>();
      std::memset(static_cast<void*>(block.get()), 0xaa, sizeof *block);  // shared memory holds what it will
      const int turn = static_cast<int>(below(block_threads));
      const auto all = [&](const auto& part) {
        for (int thread = 0; thread < block_threads; ++thread) part((thread + turn) % block_threads);
      };
      all([&](int thread) { prepare(*block, arguments, number, thread); });
      if (arguments.reads_numbers) all([&](int thread) { read_numbers(*block, arguments, thread); });
      if (is_learning(arguments)) all([&](int thread) { sum_radial(*block, arguments, thread); });
      all([&](int thread) { run(*block, arguments, thread); });
      if (is_learning(arguments)) all([&](int thread) { sum_second(*block, arguments, thread); });
    }
  }
}

// The table of a launch in memory of its own, written by kernels or copied.
struct Table {
  std::vector<Span> spans;
  std::vector<int64_t> first_chunk;
};
Table table_of(const Launch& launch, CudaCall& call) {
  const std::vector<Span> spans(launch.spans, launch.spans + launch.span_count);
  Table table{spans, {0}};
  for (const Span& span : spans)
    table.first_chunk.push_back(table.first_chunk.back() + chunks_of(span.size, call.chunk));
  const Table wanted = table;
  if (chance(0.5)) {
    std::memset(static_cast<void*>(table.spans.data()), 0xaa, spans.size() * sizeof(Span));
    std::memset(table.first_chunk.data(), 0xaa, table.first_chunk.size() * sizeof(int64_t));
  }
  call.spans = table.spans.data();
  call.first_chunk = table.first_chunk.data();
  for (int64_t row = 0; row <= launch.span_count;) {
    const TablePart part = table_part(launch, call, row);
    for (int64_t number = 0; number < chunks_of(int64_t{part.rows} * table_columns, block_threads) * block_threads;
         ++number)
      write_entry(part, number);
    row += part.rows;
  }
  if (std::memcmp(table.spans.data(), spans.data(), spans.size() * sizeof(Span)) != 0 ||
      table.first_chunk != wanted.first_chunk)
    fail("another table than the launch's", launch.span_count, 0);
  return table;
}

std::vector<int64_t> first_chunks(const std::vector<Span>& spans, int64_t chunk) {
  std::vector<int64_t> first(1, 0);
  for (const Span& span : spans) first.push_back(first.back() + chunks_of(span.size, chunk));
  return first;
}

void compare(const std::vector<Tensor>& expected, const std::vector<Tensor>& actual) {
  for (size_t t = 0; t < expected.size(); ++t) {
    for (size_t k = 0; k < expected[t].numbers.size(); ++k) {
      const auto& [dtype, wanted] = expected[t].numbers[k];
      const Buffer& found = actual[t].numbers[k].second;
      if (std::memcmp(wanted.memory.get(), found.memory.get(), wanted.offset) != 0)
        fail("written before the start", t, k);
      for (int64_t i = 0; i < expected[t].size; ++i) {
        const char *a = wanted.data() + i * size_of(dtype), *b = found.data() + i * size_of(dtype);
        const bool same = dtype == Dtype::float64   ? alike<double>(a, b)
                          : dtype == Dtype::float32 ? alike<float>(a, b)
                          : dtype == Dtype::float16 ? alike<Float16>(a, b)
                                                    : alike<BFloat16>(a, b);
        if (!same) fail("another value than the CPU's: list, weight", static_cast<int64_t>(k), i);
      }
    }
    for (size_t k = 0; k < expected[t].sums.size(); ++k)
      if (expected[t].sums[k] != actual[t].sums[k]) fail("another sum than the CPU's: tensor, sum", t, k);
    for (const auto& [wanted, found] :
         {std::pair{&expected[t].codes, &actual[t].codes}, {&expected[t].remainders, &actual[t].remainders}}) {
      if (wanted->empty()) continue;
      const Buffer &a = wanted->front(), &b = found->front();
      if (std::memcmp(a.memory.get(), b.memory.get(), a.bytes + a.offset) != 0)
        fail("another value than the CPU's: bytes of tensor", t, 0);
    }
  }
}

// One launch, drawn. False where the program has not been built for its variant.
bool run_case() {
  Setup setup = draw_setup();
  Launch& launch = setup.launch;
  bool is_built = false;
  visit_variant(launch, [&](auto variant) { is_built = built<decltype(variant)>(); });
  if (!is_built) return false;
  std::vector<Tensor> tensors;
  for (int64_t count = pick<int64_t>({1, 2, 5, chance(0.2) ? few_spans + 3 : 3}); count > 0; --count)
    tensors.push_back(draw_tensor(setup));
  std::vector<Tensor> expected = tensors;

  std::vector<Span> spans;
  for (Tensor& tensor : expected) spans.push_back(span_of(tensor, setup));
  launch.spans = spans.data();
  launch.span_count = static_cast<int64_t>(spans.size());
  const bool found_inf = chance(0.1);
  if (!found_inf)
    cpu_step_baseline(launch, first_chunks(spans, cpu_chunk).data(), 0, first_chunks(spans, cpu_chunk).back());

  // What only the device knows: then the settings that the host knows are wrong.
  CudaCall call{};
  const double zero = 0, one = 1, lr = launch.settings.lr, epsilon = launch.settings.epsilon;
  const float grad_scale = static_cast<float>(launch.settings.grad_scale);
  if (found_inf || chance(0.1)) call.numbers.found_inf = {found_inf ? &one : &zero, true};
  const auto hide = [](double& setting, DeviceNumber& number, const void* at, bool is_double) {
    if (!chance(0.3)) return;
    number = {at, is_double};
    setting = 0.123;
  };
  hide(launch.settings.lr, call.numbers.lr, &lr, true);
  hide(launch.settings.epsilon, call.numbers.epsilon, &epsilon, true);
  hide(launch.settings.grad_scale, call.numbers.grad_scale, &grad_scale, false);
  const int64_t seed = static_cast<int64_t>(launch.settings.seed);
  if (chance(0.3)) {
    call.numbers.seed = &seed;
    launch.settings.seed = 0;
  }
  if (setup.steps_there) launch.settings.steps = 55;
  call.numbers.step_is_double = true;
  for (size_t t = 0; t < tensors.size(); ++t) spans[t] = span_of(tensors[t], setup);
  call.chunk = pick({smallest_chunk, 2 * smallest_chunk, largest_chunk});
  Table table;
  if (chance(0.5) || launch.span_count > few_spans) table = table_of(launch, call);
  visit_variant(launch, [&](auto variant) {
    visit_kind(launch, variant, [&](auto kind) { run_blocks<decltype(kind)>(launch, call); });
  });
  compare(expected, tensors);
  return true;
}

// Every weight in one chunk and every chunk in one span, for lists that mix empty, tiny and huge spans.
void check_chunk_map() {
  using V = Any<Variant<float, Sgd, Capture, Book::uniform>>;
  const double levels[] = {-1, 1};
  const std::vector<float> scales(1000, 1.0f);
  for (int round = 0; round < 200; ++round) {
    std::vector<Span> spans(1 + below(chance(0.2) ? 700 : few_spans));
    int64_t huge = round % 8 == 0 ? 1 : 0;
    for (Span& span : spans) {
      span = Span{};
      span.size = pick<int64_t>({0, 0, 1, 2, largest_chunk - 1, largest_chunk, largest_chunk + 1, 5 * largest_chunk});
      if (huge-- > 0) span.size = (int64_t{1} << 31) + below(1 << 20);
      span.scale = scales.data();
      span.scale_count = pick<int64_t>({1, 7, 1000});
      span.scale_run = pick<int64_t>({1, 27, 5000, 1 << 22, int64_t{1} << 33});
      if (span.scale_count == 7 && span.scale_run <= 5000) {
        span.outer_run = 7 * span.scale_run * pick<int64_t>({1, 2, 11});
        span.outer_count = pick<int64_t>({1, 2, 100});
      }
    }
    Launch launch{};
    launch.levels = {levels, 2};
    launch.spans = spans.data();
    launch.span_count = static_cast<int64_t>(spans.size());
    CudaCall call{};
    call.chunk = largest_chunk;
    Table table;
    if (chance(0.5) || launch.span_count > few_spans) table = table_of(launch, call);
    KernelArguments<V> arguments = arguments_of<V>(launch, call);
    const int64_t blocks = set_spans(arguments, launch);
    size_t which = 0;
    int64_t upto = 0;  // weights of the span that are covered
    for (int64_t number = 0; number < blocks; ++number) {
      Block<V> block;
      std::memset(static_cast<void*>(&block), 0xaa, sizeof block);
      for (int thread = 0; thread < block_threads; ++thread) prepare(block, arguments, number, thread);
      while (upto == spans[which].size) ++which, upto = 0;
      if (block.span.size != spans[which].size || block.span.scale_run != spans[which].scale_run)
        fail("wrong span for block", number, which);
      if (block.begin != upto || block.size < 1 || block.size > largest_chunk)
        fail("wrong weights for block", number, block.begin);
      const int32_t position = static_cast<int32_t>(below(block.size));
      int32_t end;
      const float* scale = &block.runs.at(position, block.span, block.begin, end);
      if (scale - scales.data() != scale_of(spans[which], upto + position)) fail("wrong scale", number, position);
      upto += block.size;
    }
    while (which < spans.size() && upto == spans[which].size) ++which, upto = 0;
    if (which != spans.size()) fail("weights without a block: span, first", which, upto);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 1000;
  source.seed(argc > 2 ? std::atoi(argv[2]) : 0);
  check_chunk_map();
  int done = 0;
  for (int i = 0; i < cases; ++i) done += run_case();
  std::printf("%d of %d cases: every thread of every block as the CPU\n", done, cases);
  return done > 0 ? 0 : 1;
}
