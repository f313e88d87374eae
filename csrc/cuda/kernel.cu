// The CUDA backend: one kernel template around csrc/cuda/block.h, and its launches.
#include <cuda_runtime.h>

#include <algorithm>

#include "block.h"

namespace askew {
namespace {

// Blocks that a multiprocessor holds at a time: 4 leave a thread 64 registers, 3 leave it 80, 2 leave it 128. Interval
// annealing needs more than 64 with AdamW or 16-bit weights; AdamW of 16-bit weights, and float64, whose numbers take
// two each, more than 80. Enough bytes stay in flight.
template <typename V>
constexpr int resident_blocks() {
  constexpr bool is_adamw = V::RuleType::states > 1, is_interval = std::is_same_v<typename V::Annealing, Interval>;
  constexpr size_t bytes = sizeof(typename V::Storage);
  if (bytes == 8 || (bytes == 2 && is_adamw)) return 2;
  return is_interval && (bytes == 2 || is_adamw) ? 3 : 4;
}

template <typename V>
__global__ void __launch_bounds__(block_threads, resident_blocks<V>())
    step_kernel(const __grid_constant__ KernelArguments<V> arguments) {
  static_assert(sizeof(KernelArguments<V>) <= 4096, "what every launch may pass");
  __shared__ Block<V> block;
  prepare(block, arguments, blockIdx.x, threadIdx.x);
  __syncthreads();
  run(block, arguments, threadIdx.x);
}

// AdamW's step counters that live on the device: one more each, unless AMP found an infinity.
struct Counters {
  DeviceNumbers numbers;
  int64_t count;
  const Span* spans;  // in device memory; null: the list below
  void* few[few_spans];
};

__global__ void count_kernel(const __grid_constant__ Counters counters) {
  const int64_t i = blockIdx.x * int64_t{block_threads} + threadIdx.x;
  const DeviceNumbers& numbers = counters.numbers;
  if (i >= counters.count || (numbers.found_inf.at && numbers.found_inf.read() != 0)) return;
  void* step = counters.spans ? counters.spans[i].step : counters.few[i];
  if (numbers.step_is_double)
    *static_cast<double*>(step) += 1;
  else
    *static_cast<float*>(step) += 1;
}

template <typename Argument>
cudaError_t start(void (*kernel)(Argument), int64_t blocks, const Argument& argument, void* stream) {
  void* arguments[] = {const_cast<Argument*>(&argument)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                          dim3(block_threads), arguments, 0, static_cast<cudaStream_t>(stream));
}

template <typename V>
cudaError_t step_variant(const Launch& launch, const CudaCall& call) {
  KernelArguments<V> arguments = arguments_of<V>(launch, call);
  const int64_t at_a_time = spans_at_a_time(launch, call);
  for (int64_t begin = 0; begin < launch.span_count; begin += at_a_time) {
    const int64_t end = std::min(launch.span_count, begin + at_a_time),
                  blocks = set_spans(arguments, launch, begin, end);
    cudaError_t error = blocks > 0 ? start(step_kernel<V>, blocks, arguments, call.stream) : cudaSuccess;
    if (error == cudaSuccess && launch.spans[begin].step) {
      Counters counters{call.numbers, end - begin, call.spans, {}};
      for (int64_t i = begin; i < end && !call.spans; ++i) counters.few[i - begin] = launch.spans[i].step;
      error = start(count_kernel, chunks_of(end - begin, block_threads), counters, call.stream);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

constexpr int oldest = 75;  // compute capability that the kernels are compiled for in tests, and that CUDA 13 knows

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

}  // namespace

const char* cuda_step(const Launch& launch, const CudaCall& call) {
  cudaError_t error =
      cudaSetDevice(call.device);  // this copy of the runtime library does not know what torch told its own
  if (error == cudaSuccess)
    visit_variant(launch, [&](auto variant) { error = step_variant<decltype(variant)>(launch, call); });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

bool cuda_is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) == cudaSuccess &&
         status != cudaStreamCaptureStatusNone;
}

std::string cuda_built_for() { return version(CUDART_VERSION) + " for compute capability " ASKEW_CUDA_ARCHITECTURES; }

std::string cuda_problem(int device) {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no NVIDIA driver; install one";
  if (driver / 1000 < CUDART_VERSION / 1000) {
    return "the driver knows CUDA " + version(driver) + " and the kernels were built with " + version(CUDART_VERSION) +
           "; update the driver, or reinstall askew_cuda with a toolkit as old";
  }
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  cudaDeviceProp properties{};
  if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaFuncAttributes attributes{};
  error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(count_kernel));
  cudaSetDevice(before);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // it is reported here and need not be seen again
  const std::string here = std::to_string(properties.major) + "." + std::to_string(properties.minor);
  if (10 * properties.major + properties.minor < oldest)
    return std::string(properties.name) + " has compute capability " + here + ", and the kernels need 7.5";
  return "the kernels were built with CUDA " + cuda_built_for() + " and " + properties.name +
         " has compute capability " + here + " (" + cudaGetErrorString(error) +
         "); reinstall askew_cuda with TORCH_CUDA_ARCH_LIST=" + here;
}

}  // namespace askew
