// Moves between a GPU's memory and its registers; on a processor, for tests, the same with the alignment that a GPU
// asks for.
#pragma once

#include "../maths/pack.h"

// What is long and done seldom: one function, not a copy in each place.
#if defined(__CUDACC__)
#define ASKEW_RARE_FN __host__ __device__ __noinline__ inline
#else
#define ASKEW_RARE_FN inline
#endif

namespace askew {

// What moves at a time: 16 bytes of neighbouring elements, or all of them where they are fewer. Memory is aligned to as
// many bytes.
template <int bytes> struct Unit {
  struct __attribute__((may_alias, aligned(bytes))) type {
    uint32_t words[bytes / 4];
  };
};
template <> struct Unit<2> {
  typedef uint16_t __attribute__((may_alias)) type;
};
template <> struct Unit<1> {
  typedef uint8_t __attribute__((may_alias)) type;
};

// All of a span lies in global memory: the compiler need not think of the other kinds.
ASKEW_FN void assume_global([[maybe_unused]] const void* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
}

// What a block shares is read again where it is needed: kept in registers from turn to turn, its pointers would crowd
// out the weights.
ASKEW_FN void reload_shared() {
#if defined(__CUDA_ARCH__)
  asm volatile("" ::: "memory");
#endif
}

template <int count, typename Any>
ASKEW_FN void read(const void* base, int64_t i, Any (&to)[count]) {
  constexpr int bytes = count * sizeof(Any), step = bytes < 16 ? bytes : 16;
  using Piece = typename Unit<step>::type;
  const auto* from = reinterpret_cast<const Piece*>(static_cast<const Any*>(base) + i);
  assume_global(from);
#pragma unroll
  for (int k = 0; k < bytes / step; ++k) {
    const Piece piece = from[k];
    std::memcpy(reinterpret_cast<char*>(to) + k * step, &piece, step);
  }
}

template <int count, typename Any>
ASKEW_FN void write(void* base, int64_t i, const Any (&from)[count]) {
  constexpr int bytes = count * sizeof(Any), step = bytes < 16 ? bytes : 16;
  using Piece = typename Unit<step>::type;
  auto* to = reinterpret_cast<Piece*>(static_cast<Any*>(base) + i);
  assume_global(to);
#pragma unroll
  for (int k = 0; k < bytes / step; ++k) {
    Piece piece;
    std::memcpy(&piece, reinterpret_cast<const char*>(from) + k * step, step);
    to[k] = piece;
  }
}

template <typename Out, int count, typename T>
ASKEW_FN void write_as(void* base, int64_t i, const T (&from)[count]) {
  Out out[count];
#pragma unroll
  for (int k = 0; k < count; ++k) narrow(out[k], static_cast<Arithmetic<Out>>(from[k]));
  write(base, i, out);
}

}  // namespace askew
