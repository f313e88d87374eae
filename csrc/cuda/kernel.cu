// The CUDA backend as the binding sees it: the launches, and the kernels beside the step.
#include "launches.h"

#include <algorithm>

#include "table.h"

static_assert(CUDART_VERSION >= 12010,
              "the table of a captured launch travels as 32 KB of kernel arguments: CUDA 12.1");

namespace askew {
namespace {

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

cudaError_t count_steps(const Launch& launch, const CudaCall& call) {
  Counters counters{call.numbers, launch.span_count, call.spans, {}};
  for (int64_t i = 0; i < launch.span_count && !call.spans; ++i) counters.few[i] = launch.spans[i].step;
  return start(count_kernel, chunks_of(launch.span_count, block_threads), counters, call.stream);
}

__global__ void write_table_kernel(const __grid_constant__ TablePart part) {
  write_entry(part, blockIdx.x * int64_t{block_threads} + threadIdx.x);
}

// (E7) Both kernels below take several tensors, blockIdx.y says which: few, whose arguments cost a launch little, or as
// many as 32 KB hold.
template <typename Span, typename Start>
cudaError_t few_or_many(int64_t count, const Start& start_with) {
  constexpr int few = 32, many = (32764 - 256) / sizeof(Span);
  return count <= few ? start_with(std::integral_constant<int, few>{})
                      : start_with(std::integral_constant<int, many>{});
}

// From the sums of blocks to those of scales. Where the blocks of one are more than a chunk of order.h, all threads of
// a block of threads add up chunks.
template <int capacity> struct SumArguments {
  DeviceNumber found_inf;
  SumSpan tensors[capacity];
};

template <int capacity>
__global__ void add_up_kernel(const __grid_constant__ SumArguments<capacity> arguments) {
  const DeviceNumber& found_inf = arguments.found_inf;
  if (found_inf.at && found_inf.read() != 0) return;
  const auto [blocks, sums, count, each] = arguments.tensors[blockIdx.y];
  if (each <= chunk_blocks) {
    for (int64_t k = blockIdx.x * int64_t{block_threads} + threadIdx.x; k < count; k += gridDim.x * block_threads)
      sums[k] = add_blocks(blocks + k * each, each);
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

template <int capacity> struct ScaleArguments {
  ScaleSettings settings;
  DeviceNumbers numbers;
  ScaleSpan tensors[capacity];
};

template <int capacity>
__global__ void learn_kernel(const __grid_constant__ ScaleArguments<capacity> arguments) {
  const DeviceNumbers& numbers = arguments.numbers;
  if (numbers.found_inf.at && numbers.found_inf.read() != 0) return;
  ScaleSettings settings = arguments.settings;
  if (numbers.lr.at) settings.lr = numbers.lr.read();
  if (numbers.epsilon.at) settings.epsilon = numbers.epsilon.read();
  if (numbers.grad_scale.at) settings.grad_scale = numbers.grad_scale.read();
  const Learning learning = learning_of(settings);
  const ScaleSpan& span = arguments.tensors[blockIdx.y];
  for (int64_t k = blockIdx.x * int64_t{block_threads} + threadIdx.x; k < span.size; k += gridDim.x * block_threads) {
    if (span.is_double)
      span.learn<double>(k, learning);
    else
      span.learn<float>(k, learning);
  }
}

// Launches a kernel for all tensors, as many at a time as its arguments hold. `blocks_of` says how many blocks of
// threads are of use to one.
template <typename Arguments, typename Span, typename BlocksOf>
cudaError_t start_for_each(void (*kernel)(Arguments), Arguments arguments, const Span* tensors, int64_t count,
                           const BlocksOf& blocks_of, void* stream) {
  static_assert(sizeof(Arguments) <= 32764);
  constexpr int64_t capacity = sizeof(arguments.tensors) / sizeof(Span);
  cudaError_t error = cudaSuccess;
  for (int64_t begin = 0; error == cudaSuccess && begin < count; begin += capacity) {
    const int64_t end = std::min(count, begin + capacity);
    int64_t most = 1;
    for (int64_t i = begin; i < end; ++i) {
      arguments.tensors[i - begin] = tensors[i];
      most = std::max<int64_t>(most, blocks_of(tensors[i]));
    }
    error = start(kernel, dim3(static_cast<unsigned>(most), static_cast<unsigned>(end - begin)), arguments, stream);
  }
  return error;
}

constexpr int oldest = 75;  // compute capability that the kernels are compiled for in tests, and that CUDA 13 knows

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

}  // namespace

const char* cuda_step(const Launch& launch, const CudaCall& call) {
  cudaError_t error =
      cudaSetDevice(call.device);  // this copy of the runtime library does not know what torch told its own
  if (error == cudaSuccess) {
    switch (launch.dtype) {
      case Dtype::float32:
        error = step_float32(launch, call);
        break;
      case Dtype::float64:
        error = step_float64(launch, call);
        break;
      case Dtype::bfloat16:
        error = step_bfloat16(launch, call);
        break;
      case Dtype::float16:
        error = step_float16(launch, call);
        break;
    }
  }
  if (error == cudaSuccess && launch.span_count > 0 && launch.spans[0].step && !launch.sums_alone)
    error = count_steps(launch, call);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* cuda_write_table(const Launch& launch, const CudaCall& call) {
  cudaError_t error = cudaSetDevice(call.device);
  for (int64_t row = 0; error == cudaSuccess && row <= launch.span_count;) {
    const TablePart part = table_part(launch, call, row);
    error = start(write_table_kernel, chunks_of(int64_t{part.rows} * table_columns, block_threads), part, call.stream);
    row += part.rows;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* cuda_add_up(const SumSpan* tensors, int64_t count, const CudaCall& call) {
  cudaError_t error = cudaSetDevice(call.device);
  const auto blocks_of = [](const SumSpan& of) {
    return of.each <= chunk_blocks ? std::min<int64_t>(chunks_of(of.count, block_threads), 1024)
                                   : std::min<int64_t>(of.count, 4096);
  };
  const auto start_with = [&](auto capacity) {
    constexpr int room = decltype(capacity)::value;
    return start_for_each(add_up_kernel<room>, SumArguments<room>{call.numbers.found_inf, {}}, tensors, count,
                          blocks_of, call.stream);
  };
  if (error == cudaSuccess) error = few_or_many<SumSpan>(count, start_with);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* cuda_learn(const ScaleSettings& settings, const ScaleSpan* spans, int64_t count, const CudaCall& call) {
  cudaError_t error = cudaSetDevice(call.device);
  const auto blocks_of = [](const ScaleSpan& of) { return std::min<int64_t>(chunks_of(of.size, block_threads), 1024); };
  const auto start_with = [&](auto capacity) {
    constexpr int room = decltype(capacity)::value;
    return start_for_each(learn_kernel<room>, ScaleArguments<room>{settings, call.numbers, {}}, spans, count, blocks_of,
                          call.stream);
  };
  if (error == cudaSuccess) error = few_or_many<ScaleSpan>(count, start_with);
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
  if (driver / 1000 < CUDART_VERSION / 1000 || driver < 12010) {
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
