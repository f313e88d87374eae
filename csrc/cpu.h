// The CPU backend as the binding sees it; csrc/cpu.cpp is compiled once for each instruction set.
#pragma once

#include "spans.h"

namespace askew {

// Steps the weights of chunks [begin, end). Chunks touch disjoint memory: any thread may take any of them.
using CpuStep = void (*)(const Launch& launch, int64_t begin, int64_t end);

void cpu_step_baseline(const Launch& launch, int64_t begin, int64_t end);
#if defined(__x86_64__)
void cpu_step_avx2(const Launch& launch, int64_t begin, int64_t end);
void cpu_step_avx512(const Launch& launch, int64_t begin, int64_t end);
#endif

}  // namespace askew
