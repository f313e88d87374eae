// The CUDA backend as the binding sees it.
#pragma once

#include <string>

#include "../launch.h"

namespace askew {

constexpr int64_t block_chunk =
    1 << 13;                       // weights of a block: 32 a thread, so that what a thread does once is a small share
constexpr int64_t few_spans = 16;  // travel as kernel arguments: as many as leave those below 4 KiB

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

struct CudaCall {
  int device;
  void* stream;  // cudaStream_t
  DeviceNumbers numbers;
  const Span*
      spans;  // the launch's, in device memory: one launch; null: they travel as arguments, in as many as it takes
  const int64_t* first_chunk;  // in device memory too: [span_count + 1] chunks of block_chunk weights before each span
};

const char* cuda_step(const Launch& launch, const CudaCall& call);  // null, or what went wrong
// (E7) From the sums of blocks to `count` sums, of `each` of them; and what scales learn. Null, or what went wrong.
const char* cuda_add_up(const double* blocks, double* sums, int64_t count, int64_t each, const CudaCall& call);
const char* cuda_learn(const ScaleSettings& settings, const ScaleSpan* spans, int64_t count, const CudaCall& call);
bool cuda_is_capturing(void* stream);  // whether a CUDA graph is being captured
std::string cuda_problem(int device);  // why kernels can't run there, and what helps; "" where they can
std::string cuda_built_for();          // toolkit and architectures

}  // namespace askew
