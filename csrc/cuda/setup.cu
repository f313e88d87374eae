// Launches of the operators around the step.
#include "launches.h"
#include "team_fit.h"
#include "team_look.h"

namespace askew {
namespace {

static_assert(team_threads == block_threads, "start() launches so many");

template <typename V, bool measures>
__global__ void __launch_bounds__(team_threads) look_kernel(const __grid_constant__ LookArguments arguments) {
  __shared__ LookBlock<V> block;
  look_at_chunk<V, measures>(block, arguments, blockIdx.x, Team{});
}

template <typename Storage>
__global__ void __launch_bounds__(team_threads) restore_kernel(const __grid_constant__ RestoreArguments arguments) {
  __shared__ RestoreBlock<Storage> block;
  restore_chunk(block, arguments, blockIdx.x, Team{});
}

template <typename V>
__global__ void __launch_bounds__(team_threads) fit_rows_kernel(const __grid_constant__ FitArguments arguments) {
  __shared__ FitBlock<V> block;
  begin_fit(block, arguments, Team{});
  for (int64_t row = blockIdx.x; row < arguments.count; row += gridDim.x) fit_row(block, arguments, row, Team{});
}

template <typename V>
__global__ void __launch_bounds__(team_threads)
    fit_part_kernel(const __grid_constant__ FitArguments arguments, const int phase) {
  __shared__ FitBlock<V> block;
  begin_fit(block, arguments, Team{});
  fit_part(block, arguments, phase, blockIdx.z, blockIdx.x, blockIdx.y * team_halves, Team{});
}

template <typename V>
__global__ void __launch_bounds__(team_threads)
    fit_take_kernel(const __grid_constant__ FitArguments arguments, const int phase) {
  __shared__ FitBlock<V> block;
  fit_take(block, arguments, phase, blockIdx.x, Team{});
}

template <typename V>
cudaError_t fit_together(const FitArguments& arguments, void* stream) {
  const unsigned chunks = static_cast<unsigned>(chunks_of(arguments.rows.columns, sum_chunk)),
                 rows = static_cast<unsigned>(arguments.count);
  const Grids& grids = arguments.fit.grids;
  cudaError_t error = cudaSuccess;
  for (int phase = -1; error == cudaSuccess && phase < Search::phases; ++phase) {
    const int trials = phase == 1 ? grids.coarse() : phase == 2 ? grids.fine : 1;
    const unsigned groups = static_cast<unsigned>(chunks_of(trials, team_halves));
    fit_part_kernel<V>
        <<<dim3(chunks, groups, rows), team_threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments, phase);
    fit_take_kernel<V><<<rows, team_threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments, phase);
    error = cudaGetLastError();
  }
  return error;
}

const char* said(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

const char* cuda_look(const Looking& looking, const Counted& counted, const CudaCall& call) {
  cudaError_t error = cudaSetDevice(call.device);
  const int64_t chunks = chunks_of(looking.size, sum_chunk);
  if (error != cudaSuccess || chunks == 0) return said(error);
  const LookArguments arguments{looking, list_of(looking.levels), counted};
  visit_around(looking.dtype, looking.levels, [&](auto around) {
    using V = decltype(around);
    error = looking.measures ? start(look_kernel<V, true>, chunks, arguments, call.stream)
                             : start(look_kernel<V, false>, chunks, arguments, call.stream);
  });
  if (error != cudaSuccess || !looking.measures) return said(error);
  const SumSpan squares{counted.squares, counted.numbers + 1, 2, chunks_of(looking.size, block_size)};
  return cuda_add_up(&squares, 1, call);
}

const char* cuda_restore(const Restoring& restoring, const CudaCall& call) {
  cudaError_t error = cudaSetDevice(call.device);
  const int64_t chunks = chunks_of(restoring.size, sum_chunk);
  if (error != cudaSuccess || chunks == 0) return said(error);
  const Levels& levels = restoring.levels;
  const double unit = is_uniform(levels) ? levels.values[1] - levels.values[0] : 1;
  visit_storage(restoring.dtype, [&](auto storage) {
    error = start(restore_kernel<decltype(storage)>, chunks, RestoreArguments{restoring, list_of(levels), unit},
                  call.stream);
  });
  return said(error);
}

const char* cuda_fit(const Rows& rows, int64_t count, const FitSpace& space, double* scales, const CudaCall& call) {
  cudaError_t error = cudaSetDevice(call.device);
  if (error != cudaSuccess || count == 0 || rows.columns == 0) return said(error);
  const FitArguments arguments{rows, count, list_of(rows.levels), fitting(rows.levels, rows.columns), scales, space};
  visit_around(rows.dtype, rows.levels, [&](auto around) {
    using V = decltype(around);
    error = fits_together(count, rows.columns)
                ? fit_together<V>(arguments, call.stream)
                : start(fit_rows_kernel<V>, count < 1 << 20 ? count : int64_t{1} << 20, arguments, call.stream);
  });
  return said(error);
}

}  // namespace askew
