// The operators around the step: scales, codes, snapping, what a report counts. Each checks its tensors and deals rows,
// or chunks, to torch's threads, or to a GPU's.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "backends.h"

namespace askew {
namespace {

using at::Tensor;

Levels levels_of(at::ArrayRef<double> levels) {
  TORCH_CHECK_VALUE(levels.size() >= 2 && levels.size() <= 256, "askew_cuda: levels has ", levels.size(),
                    " entries; 2 to 256 are supported");
  for (size_t k = 0; k < levels.size(); ++k)
    TORCH_CHECK_VALUE(static_cast<float>(levels[k]) == levels[k] && (k == 0 || levels[k] > levels[k - 1]),
                      "askew_cuda: levels[", k, "] = ", levels[k], "; levels are float32 numbers, strictly increasing");
  return {levels.data(), static_cast<int>(levels.size())};
}

// Chunks of a row that all threads work on, a few for each at a time: their sums are added up in sequence.
template <typename Result, typename Work, typename Take>
void over_chunks(int64_t chunks, int64_t results, const Work& work, const Take& take) {
  const int64_t together = std::min<int64_t>(chunks, 64 * at::get_num_threads());
  std::vector<Result> found(together * results);
  for (int64_t first = 0; first < chunks; first += together) {
    const int64_t count = std::min(together, chunks - first);
    std::fill(found.begin(), found.end(), Result{});
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      work(first + begin, first + end, found.data() + begin * results);
    });
    for (int64_t k = 0; k < count; ++k) take(found.data() + k * results);
  }
}

double fit_together(const Rows& rows, int64_t row, const Fitting& fit) {
  const auto part_of = cpu_kernels.load()->fit.part;
  const int64_t chunks = chunks_of(rows.columns, sum_chunk);
  Range range{};
  over_chunks<Range>(
      chunks, 1,
      [&](int64_t begin, int64_t end, Range* found) { part_of(rows, {row, begin, end, nullptr, found, nullptr}); },
      [&](const Range* found) {
        range.up = std::max(range.up, found->up);
        range.down = std::max(range.down, found->down);
        range.total += found->total;
      });
  Search search = Search::of(fit, range);
  for (int phase = 0; phase < Search::phases && search.largest > 0; ++phase) {
    const Sequence trials = search.trials(phase);
    std::vector<Sums> sums(trials.count);
    over_chunks<Sums>(
        chunks, trials.count,
        [&](int64_t begin, int64_t end, Sums* found) { part_of(rows, {row, begin, end, &trials, nullptr, found}); },
        [&](const Sums* found) {
          for (int trial = 0; trial < trials.count; ++trial) sums[trial].add(found[trial]);
        });
    search.take_all(trials, sums.data());
  }
  return search.scale();
}

Tensor fit_scales(const Tensor& rows, at::ArrayRef<double> levels) {
  TORCH_CHECK_VALUE(rows.dim() == 2, "askew_cuda: rows has shape ", rows.sizes(), "; two dimensions are needed");
  const int64_t count = rows.size(0), columns = rows.size(1);
  Tensor scales = at::zeros({count}, rows.options().dtype(at::kDouble));
  const Rows all{dtype_of(rows, "rows"), rows.const_data_ptr(), columns,
                 rows.stride(0),         rows.stride(1),        levels_of(levels)};
  if (count == 0 || columns == 0) return scales;
  double* found = scales.mutable_data_ptr<double>();
#if defined(ASKEW_WITH_CUDA)
  if (rows.is_cuda()) {
    fit_cuda(all, count, found, rows.device());
    return scales;
  }
#endif
  if (count >= 2 * at::get_num_threads() || columns <= sum_chunk) {
    const auto fit = cpu_kernels.load()->fit.rows;
    const int64_t grain = std::max<int64_t>(1, 4096 / columns);
    at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { fit(all, begin, end, found); });
  } else {
    const Fitting fit = fitting(all.levels, columns);
    for (int64_t row = 0; row < count; ++row) found[row] = fit_together(all, row, fit);
  }
  return scales;
}

void check_with(const char* name, const Tensor& tensor, const Tensor& weight) {
  TORCH_CHECK_VALUE(tensor.device() == weight.device(), "askew_cuda: ", name, " is on ", tensor.device(),
                    " and the weight is on ", weight.device(), "; one device is needed");
}

// What all of the following look at: weights in memory order, one scale for each `run` of them, again and again.
Looking looking_at(const Tensor& weight, const Tensor& scale, int64_t run, at::ArrayRef<double> levels) {
  TORCH_CHECK_VALUE(weight.is_contiguous() && scale.is_contiguous(),
                    "askew_cuda: weight and scale lie in memory in order; contiguous() makes them");
  TORCH_CHECK_TYPE(scale.scalar_type() == (weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat),
                   "askew_cuda: scale is ", scale.scalar_type(), " for a weight that is ", weight.scalar_type());
  check_with("scale", scale, weight);
  TORCH_CHECK_VALUE(weight.numel() == 0 || (run >= 1 && scale.numel() >= 1), "askew_cuda: run = ", run, " and ",
                    scale.numel(), " scales for ", weight.numel(), " weights; at least 1 of both is needed");
  Looking looking{};
  looking.dtype = dtype_of(weight, "weight");
  looking.levels = levels_of(levels);
  looking.weight = weight.const_data_ptr();
  looking.scale = scale.const_data_ptr();
  looking.scale_run = run;
  looking.scale_count = scale.numel();
  looking.size = weight.numel();
  return looking;
}

Squares run(const Looking& looking, Seen& seen) {
  const CpuLook look = cpu_kernels.load()->look;
  const int64_t chunks = chunks_of(looking.size, sum_chunk);
  std::vector<Squares> squares(chunks);
  std::mutex mutex;
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Seen here{};
    look(looking, begin, end, here, squares.data());
    const std::lock_guard<std::mutex> lock(mutex);
    seen.on_level += here.on_level;
    seen.away += here.away;
    seen.lost += here.lost;
    seen.nan += here.nan;
    seen.flipped += here.flipped;
    for (int level = 0; level < 256; ++level) seen.occupancy[level] += here.occupancy[level];
    seen.largest = std::max(seen.largest, here.largest);
  });
  Squares total{0, 0};
  for (const Squares& each : squares) {
    total.weights += each.weights;
    total.errors += each.errors;
  }
  return total;
}

// Without numbers for a report.
void run(const Looking& looking, at::Device device) {
  Seen seen{};
  if (device.is_cpu()) run(looking, seen);
#if defined(ASKEW_WITH_CUDA)
  if (device.is_cuda()) look_cuda(looking, device);
#endif
}

// How codes are packed: digits of which base, how many to a byte.
void check_digits(int64_t base, int64_t per_byte, Levels levels) {
  const std::tuple<int64_t, int64_t> digits{base, per_byte};
  TORCH_CHECK_VALUE(digits == std::tuple(256, 1) || digits == std::tuple(16, 2) || digits == std::tuple(4, 4) ||
                        digits == std::tuple(3, 5) || digits == std::tuple(2, 8),
                    "askew_cuda: base = ", base, " and per_byte = ", per_byte,
                    "; 256 and 1, 16 and 2, 4 and 4, 3 and 5, or 2 and 8");
  TORCH_CHECK_VALUE(levels.count <= base, "askew_cuda: ", levels.count, " levels in base ", base);
}

Tensor codes(const Tensor& weight, const Tensor& scale, int64_t run_, at::ArrayRef<double> levels, int64_t base,
             int64_t per_byte) {
  Looking looking = looking_at(weight, scale, run_, levels);
  check_digits(base, per_byte, looking.levels);
  const int64_t bytes = (looking.size + per_byte - 1) / per_byte;
  Tensor packed = at::empty({bytes}, weight.options().dtype(at::kByte));
  looking.packed = packed.mutable_data_ptr<uint8_t>();
  looking.base = static_cast<int>(base);
  looking.per_byte = static_cast<int>(per_byte);
  run(looking, weight.device());
  return packed;
}

Tensor snap(const Tensor& weight, const Tensor& scale, int64_t run_, at::ArrayRef<double> levels) {
  Looking looking = looking_at(weight, scale, run_, levels);
  Tensor snapped = at::empty_like(weight);
  looking.snapped = snapped.mutable_data_ptr();
  run(looking, weight.device());
  return snapped;
}

void snap_(const Tensor& weight, const Tensor& scale, int64_t run_, at::ArrayRef<double> levels) {
  Looking looking = looking_at(weight, scale, run_, levels);
  looking.snapped = weight.mutable_data_ptr();
  run(looking, weight.device());
  if (!weight.is_inference()) weight.unsafeGetTensorImpl()->bump_version();  // autograd must see that it has changed
}

void restore_(const Tensor& weight, const Tensor& packed, int64_t base, int64_t per_byte, const Tensor& scale,
              int64_t run_, at::ArrayRef<double> levels) {
  const Looking looking = looking_at(weight, scale, run_, levels);
  check_digits(base, per_byte, looking.levels);
  const int64_t bytes = (looking.size + per_byte - 1) / per_byte;
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kByte && packed.numel() == bytes && packed.is_contiguous(),
                    "askew_cuda: packed is ", packed.toString(), " of shape ", packed.sizes(), "; ", bytes,
                    " bytes are needed, in order");
  check_with("packed", packed, weight);
  const Restoring restoring{looking.dtype,
                            looking.levels,
                            packed.const_data_ptr<uint8_t>(),
                            static_cast<int>(base),
                            static_cast<int>(per_byte),
                            looking.scale,
                            looking.scale_run,
                            looking.scale_count,
                            looking.size,
                            weight.mutable_data_ptr()};
  if (weight.is_cpu()) {
    const CpuRestore restore = cpu_kernels.load()->restore;
    at::parallel_for(0, chunks_of(looking.size, sum_chunk), 8,
                     [&](int64_t begin, int64_t end) { restore(restoring, begin, end); });
  }
#if defined(ASKEW_WITH_CUDA)
  if (weight.is_cuda()) restore_cuda(restoring, weight.device());
#endif
  if (!weight.is_inference()) weight.unsafeGetTensorImpl()->bump_version();  // autograd must see that it has changed
}

std::tuple<Tensor, Tensor> measure(const Tensor& weight, const Tensor& scale, int64_t run_, at::ArrayRef<double> levels,
                                   double near, const std::optional<Tensor>& codes, bool compare) {
  Looking looking = looking_at(weight, scale, run_, levels);
  looking.measures = true;
  looking.near = near;
  if (codes) {
    TORCH_CHECK_VALUE(codes->scalar_type() == at::kByte && codes->numel() == weight.numel() && codes->is_contiguous(),
                      "askew_cuda: codes is ", codes->toString(), " of shape ", codes->sizes(),
                      "; a byte for each weight is needed, in order");
    check_with("codes", *codes, weight);
    looking.codes = codes->mutable_data_ptr<uint8_t>();
    if (compare) looking.before = looking.codes;
  }
#if defined(ASKEW_WITH_CUDA)
  if (weight.is_cuda()) return measure_cuda(looking, weight.device());
#endif
  Seen seen{};
  const Squares squares = run(looking, seen);
  const int64_t count = looking.levels.count;
  Tensor counts = at::empty({5 + count}, weight.options().dtype(at::kLong));
  Tensor numbers = at::empty({3}, weight.options().dtype(at::kDouble));
  int64_t* whole = counts.mutable_data_ptr<int64_t>();
  for (const int64_t each : {seen.on_level, seen.away, seen.lost, seen.nan, seen.flipped}) *whole++ = each;
  std::copy(seen.occupancy, seen.occupancy + count, whole);
  double* real = numbers.mutable_data_ptr<double>();
  for (const double each : {seen.largest, squares.weights, squares.errors}) *real++ = each;
  return {counts, numbers};
}

void implement(torch::Library& m) {
  m.impl("fit_scales", fit_scales);
  m.impl("codes", codes);
  m.impl("snap", snap);
  m.impl("snap_", snap_);
  m.impl("restore_", restore_);
  m.impl("measure", measure);
}

}  // namespace
}  // namespace askew

TORCH_LIBRARY_FRAGMENT(askew_cuda, m) {
  m.def("fit_scales(Tensor rows, float[] levels) -> Tensor");
  m.def("codes(Tensor weight, Tensor scale, int run, float[] levels, int base, int per_byte) -> Tensor");
  m.def("snap(Tensor weight, Tensor scale, int run, float[] levels) -> Tensor");
  m.def("snap_(Tensor(a!) weight, Tensor scale, int run, float[] levels) -> ()");
  m.def(
      "restore_(Tensor(a!) weight, Tensor packed, int base, int per_byte, Tensor scale, int run, float[] levels) -> "
      "()");
  m.def(
      "measure(Tensor weight, Tensor scale, int run, float[] levels, float near, Tensor(a!)? codes, bool compare) -> "
      "(Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(askew_cuda, CPU, m) { askew::implement(m); }

#if defined(ASKEW_WITH_CUDA)
TORCH_LIBRARY_IMPL(askew_cuda, CUDA, m) { askew::implement(m); }
#endif
