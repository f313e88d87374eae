// The CUDA backend as the binding sees it.
#pragma once

#include <string>

#include "../setup.h"

namespace askew {

constexpr int64_t few_spans = 16;  // travel as kernel arguments: as many as leave those below 4 KiB

// Weights of a block: a power of two, so that whole vectors fit. Few, where blocks would else be fewer than a large GPU
// holds at a time; many, where what a block does once is to be a small share.
constexpr int64_t smallest_chunk = 1 << 10, largest_chunk = 1 << 13;
ASKEW_HOST_FN int64_t chunk_of(const Launch& launch) {
  int64_t total = 0, chunk = smallest_chunk;
  for (int64_t i = 0; i < launch.span_count; ++i) total += launch.spans[i].size;
  while (chunk < largest_chunk && total / chunk > 2048) chunk *= 2;
  return chunk;
}

// A number that changes from step to step and that only the device knows: float32 or float64; null where the host knows
// it.
struct DeviceNumber {
  const void* at;
  bool is_double;

  ASKEW_FN double read() const { return is_double ? *static_cast<const double*>(at) : *static_cast<const float*>(at); }
};

struct DeviceNumbers {
  DeviceNumber lr, epsilon, grad_scale, found_inf;
  const int64_t* seed;  // of stochastic rounding
  bool step_is_double;  // Span.step
};

// (E7) Of one tensor: the sums of blocks, `each` of them to one of `count` sums.
struct SumSpan {
  const double* blocks;
  double* sums;
  int64_t count, each;
};

// What is counted of weights that are looked at, in device memory: zeros before.
struct Counted {
  unsigned long long* counts;  // on their level, away from it, without a distance, NaN, flipped; then of each level
  double* numbers;             // the largest distance; sums of squares, of weights and of errors
  double* squares;             // the same of blocks of order.h, one kind after the other
};

// What the search for the scales of long rows keeps, in device memory: of each row, and of its chunks of order.h.
struct FitSpace {
  Search* searches;
  Range* ranges;  // [rows, chunks]
  Sums* sums;     // [rows, chunks, trials]
};
// Rows so long, and so few, that more than a block of threads is to work on each.
ASKEW_HOST_FN bool fits_together(int64_t rows, int64_t columns) { return columns > sum_chunk && rows < 256; }

struct CudaCall {
  int device;
  void* stream;  // cudaStream_t
  DeviceNumbers numbers;
  int64_t chunk;               // weights of a block
  const Span* spans;           // the launch's, in device memory; null: they are few, and travel as arguments
  const int64_t* first_chunk;  // in device memory too: [span_count + 1] chunks before each span
};

const char* cuda_step(const Launch& launch, const CudaCall& call);  // null, or what went wrong
// Fills call.spans and call.first_chunk, as a CUDA graph can capture it: by kernels whose arguments hold the content.
const char* cuda_write_table(const Launch& launch, const CudaCall& call);
// (E7) From the sums of blocks to those of the scales of tensors; and what scales learn. Null, or what went wrong.
const char* cuda_add_up(const SumSpan* tensors, int64_t count, const CudaCall& call);
const char* cuda_learn(const ScaleSettings& settings, const ScaleSpan* spans, int64_t count, const CudaCall& call);
// The operators around the step.
const char* cuda_look(const Looking& looking, const Counted& counted, const CudaCall& call);
const char* cuda_restore(const Restoring& restoring, const CudaCall& call);
const char* cuda_fit(const Rows& rows, int64_t count, const FitSpace& space, double* scales, const CudaCall& call);
bool cuda_is_capturing(void* stream);  // whether a CUDA graph is being captured
std::string cuda_problem(int device);  // why kernels can't run there, and what helps; "" where they can
std::string cuda_built_for();          // toolkit and architectures

}  // namespace askew
