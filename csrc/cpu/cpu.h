// The CPU backend as the binding sees it; csrc/cpu/loop.cpp is compiled once for each instruction set.
#pragma once

#include "../launch.h"

namespace askew {

constexpr int64_t cpu_chunk =
    1 << 15;  // 640 KiB of float32 weight, gradient and momentum traffic: well below a millisecond

// Steps the weights of chunks [begin, end), of cpu_chunk weights. They touch disjoint memory: any thread may take any
// of them.
using CpuStep = void (*)(const Launch& launch, const int64_t* first_chunk, int64_t begin, int64_t end);

void cpu_step_baseline(const Launch& launch, const int64_t* first_chunk, int64_t begin, int64_t end);
#if defined(__x86_64__)
void cpu_step_avx2(const Launch& launch, const int64_t* first_chunk, int64_t begin, int64_t end);
void cpu_step_avx512(const Launch& launch, const int64_t* first_chunk, int64_t begin, int64_t end);
#endif

}  // namespace askew
