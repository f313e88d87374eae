// Launches of the step, one file for the weights of each storage type, so that they are compiled side by side.
#pragma once

#include <cuda_runtime.h>

#include "block.h"

namespace askew {

cudaError_t step_float32(const Launch& launch, const CudaCall& call);
cudaError_t step_float64(const Launch& launch, const CudaCall& call);
cudaError_t step_bfloat16(const Launch& launch, const CudaCall& call);
cudaError_t step_float16(const Launch& launch, const CudaCall& call);

template <typename Argument>
cudaError_t start(void (*kernel)(Argument), dim3 blocks, const Argument& argument, void* stream) {
  void* arguments[] = {const_cast<Argument*>(&argument)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks, dim3(block_threads), arguments, 0,
                          static_cast<cudaStream_t>(stream));
}
template <typename Argument>
cudaError_t start(void (*kernel)(Argument), int64_t blocks, const Argument& argument, void* stream) {
  return start(kernel, dim3(static_cast<unsigned>(blocks)), argument, stream);
}

// Blocks that a multiprocessor holds at a time: 4 leave a thread 64 registers, 3 leave it 80, 2 leave it 128. Where
// AdamW's state has 16 bits and weights are rounded with care, vectors of 8 need more than 64. Kernels that ask for
// flags need more than 64 where weights have 16 bits or AdamW meets interval annealing, AdamW of 16-bit weights more
// than 80; so does float64, whose numbers take two each. Enough bytes stay in flight.
template <typename V>
constexpr int resident_blocks() {
  constexpr bool is_adamw = V::RuleType::states > 1, is_interval = std::is_same_v<typename V::Annealing, Interval>;
  constexpr size_t bytes = sizeof(typename V::Storage);
  if constexpr (V::usual) {
    constexpr bool rounds = V::rounding == Rounding::remainder || (V::rounding == Rounding::stochastic && V::may_learn);
    return bytes == 2 && is_adamw && !V::wide_state && rounds ? 3 : 4;
  } else {
    if (bytes == 8 || (bytes == 2 && is_adamw)) return 2;
    return bytes == 2 || (is_interval && is_adamw) ? 3 : 4;
  }
}

template <typename V>
__global__ void __launch_bounds__(block_threads, resident_blocks<V>())
    step_kernel(const __grid_constant__ KernelArguments<V> arguments) {
  static_assert(sizeof(KernelArguments<V>) <= 4096, "what a launch carries at little cost");
  __shared__ Block<V> block;
  prepare(block, arguments, blockIdx.x, threadIdx.x);
  __syncthreads();
  if (arguments.reads_numbers) {
    read_numbers(block, arguments, threadIdx.x);
    __syncthreads();
  }
  if (!is_learning(arguments)) return run(block, arguments, threadIdx.x);
  sum_radial(block, arguments, threadIdx.x);
  __syncthreads();
  run(block, arguments, threadIdx.x);
  __syncthreads();
  sum_second(block, arguments, threadIdx.x);
}

template <typename Storage>
cudaError_t step_storage(const Launch& launch, const CudaCall& call) {
  cudaError_t error = cudaSuccess;
  visit_rule<Storage>(launch, [&](auto variant) {
    visit_kind(launch, variant, [&](auto kind) {
      using V = decltype(kind);
      KernelArguments<V> arguments = arguments_of<V>(launch, call);
      const int64_t blocks = set_spans(arguments, launch);
      if (blocks > 0) error = start(step_kernel<V>, blocks, arguments, call.stream);
    });
  });
  return error;
}

}  // namespace askew
