// The CPU kernels for AVX2, with FMA, which all of its processors but VIA's have. The pragma comes before every
// include, so that all that is compiled here may use it.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c,fma")
#endif
#define ASKEW_PACK_BYTES 32
#define ASKEW_CPU_STEP cpu_step_avx2
#define ASKEW_CPU_FIT cpu_fit_avx2
#define ASKEW_CPU_LOOK cpu_look_avx2
#define ASKEW_CPU_RESTORE cpu_restore_avx2
#include "fit.cpp"
#include "look.cpp"
#include "loop.cpp"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
