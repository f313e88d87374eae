// The CUDA backend: one kernel template around csrc/cuda/block.h, and its launches.
#include <cuda_runtime.h>

#include <algorithm>

#include "block.h"

namespace askew {
namespace {

// Blocks that a multiprocessor holds at a time: 4 leave a thread 64 registers, 3 leave it 80, 2 leave it 128. 16-bit
// weights need more than 64, and so does interval annealing with AdamW; AdamW of 16-bit weights, and float64, whose
// numbers take two each, more than 80. Enough bytes stay in flight.
template <typename V>
constexpr int resident_blocks() {
  constexpr bool is_adamw = V::RuleType::states > 1, is_interval = std::is_same_v<typename V::Annealing, Interval>;
  constexpr size_t bytes = sizeof(typename V::Storage);
  if (bytes == 8 || (bytes == 2 && is_adamw)) return 2;
  return bytes == 2 || (is_interval && is_adamw) ? 3 : 4;
}

template <typename V>
__global__ void __launch_bounds__(block_threads, resident_blocks<V>())
    step_kernel(const __grid_constant__ KernelArguments<V> arguments) {
  static_assert(sizeof(KernelArguments<V>) <= 4096, "what every launch may pass");
  __shared__ Block<V> block;
  prepare(block, arguments, blockIdx.x, threadIdx.x);
  __syncthreads();
  if (V::book == Book::none || !arguments.h.learns) return run(block, arguments, threadIdx.x);
  sum_radial(block, arguments, threadIdx.x);
  __syncthreads();
  run(block, arguments, threadIdx.x);
  __syncthreads();
  sum_second(block, arguments, threadIdx.x);
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
    if (error == cudaSuccess && launch.spans[begin].step && !launch.sums_alone) {
      Counters counters{call.numbers, end - begin, call.spans, {}};
      for (int64_t i = begin; i < end && !call.spans; ++i) counters.few[i - begin] = launch.spans[i].step;
      error = start(count_kernel, chunks_of(end - begin, block_threads), counters, call.stream);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// (E7) From the sums of blocks to those of scales, `each` blocks to one. Where these are more than a chunk of order.h,
// all threads of a block of threads add up chunks.
__global__ void add_up_kernel(const double* blocks, double* sums, int64_t count, int64_t each, DeviceNumber found_inf) {
  if (found_inf.at && found_inf.read() != 0) return;
  if (each <= chunk_blocks) {
    const int64_t k = blockIdx.x * int64_t{block_threads} + threadIdx.x;
    if (k < count) sums[k] = add_blocks(blocks + k * each, each);
    return;
  }
  __shared__ double chunks[block_threads];
  for (int64_t k = blockIdx.x; k < count; k += gridDim.x) {
    double total = 0;
    for (int64_t first = 0; first < each; first += block_threads * chunk_blocks) {
      const int64_t mine = first + threadIdx.x * int64_t{chunk_blocks}, left = each - mine;
      if (left > 0)
        chunks[threadIdx.x] = add_blocks(blocks + k * each + mine, left < chunk_blocks ? left : chunk_blocks);
      __syncthreads();
      for (int c = 0; threadIdx.x == 0 && c < block_threads && first + c * chunk_blocks < each; ++c) total += chunks[c];
      __syncthreads();
    }
    if (threadIdx.x == 0) sums[k] = total;
  }
}

// The scales of a few tensors: blockIdx.y is the tensor.
constexpr int64_t few_scale_spans = 32;
struct ScaleArguments {
  ScaleSettings settings;
  DeviceNumbers numbers;
  ScaleSpan spans[few_scale_spans];
};

__global__ void learn_kernel(const __grid_constant__ ScaleArguments arguments) {
  const DeviceNumbers& numbers = arguments.numbers;
  if (numbers.found_inf.at && numbers.found_inf.read() != 0) return;
  ScaleSettings settings = arguments.settings;
  if (numbers.lr.at) settings.lr = numbers.lr.read();
  if (numbers.epsilon.at) settings.epsilon = numbers.epsilon.read();
  if (numbers.grad_scale.at) settings.grad_scale = numbers.grad_scale.read();
  const Learning learning = learning_of(settings);
  const ScaleSpan& span = arguments.spans[blockIdx.y];
  for (int64_t k = blockIdx.x * int64_t{block_threads} + threadIdx.x; k < span.size; k += gridDim.x * block_threads) {
    if (span.is_double)
      span.learn<double>(k, learning);
    else
      span.learn<float>(k, learning);
  }
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

const char* cuda_add_up(const double* blocks, double* sums, int64_t count, int64_t each, const CudaCall& call) {
  cudaError_t error = cudaSetDevice(call.device);
  if (error == cudaSuccess && count > 0) {
    DeviceNumber found_inf = call.numbers.found_inf;
    void* arguments[] = {&blocks, &sums, &count, &each, &found_inf};
    const int64_t grid = each <= chunk_blocks ? chunks_of(count, block_threads) : std::min<int64_t>(count, 4096);
    error = cudaLaunchKernel(reinterpret_cast<const void*>(add_up_kernel), dim3(static_cast<unsigned>(grid)),
                             dim3(block_threads), arguments, 0, static_cast<cudaStream_t>(call.stream));
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* cuda_learn(const ScaleSettings& settings, const ScaleSpan* spans, int64_t count, const CudaCall& call) {
  cudaError_t error = cudaSetDevice(call.device);
  for (int64_t begin = 0; error == cudaSuccess && begin < count; begin += few_scale_spans) {
    ScaleArguments few{settings, call.numbers, {}};
    const int64_t end = std::min(count, begin + few_scale_spans);
    int64_t most = 1;
    for (int64_t i = begin; i < end; ++i) {
      few.spans[i - begin] = spans[i];
      most = std::max(most, spans[i].size);
    }
    void* arguments[] = {&few};
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(chunks_of(most, block_threads), 1024)),
                    static_cast<unsigned>(end - begin));
    error = cudaLaunchKernel(reinterpret_cast<const void*>(learn_kernel), grid, dim3(block_threads), arguments, 0,
                             static_cast<cudaStream_t>(call.stream));
  }
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
