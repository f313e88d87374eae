// What the programs have in common that run CUDA threads on the processor: drawn numbers, memory that is watched.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/variants.h"

using namespace askew;

namespace {

std::mt19937 source;
int64_t below(int64_t count) { return static_cast<int64_t>(source() % count); }
bool chance(double share) { return source() < share * 4294967296.0; }
double normal() { return std::normal_distribution<double>()(source); }
template <typename Any> Any pick(std::initializer_list<Any> from) {
  return from.begin()[below(static_cast<int64_t>(from.size()))];
}

[[noreturn]] void fail(const char* what, int64_t a, int64_t b) {
  std::fprintf(stderr, "FAILED: %s (%lld, %lld)\n", what, static_cast<long long>(a), static_cast<long long>(b));
  std::exit(1);
}

// Memory that ends where the tensor ends, so that the sanitizer sees a step beyond it; the `offset` bytes before the
// tensor must stay as they are.
struct Buffer {
  int64_t bytes, offset;
  std::unique_ptr<char[]> memory;

  Buffer(int64_t bytes, int64_t offset) : bytes(bytes), offset(offset), memory(new char[bytes + offset]) {
    std::memset(memory.get(), 0x5a, bytes + offset);
  }
  Buffer(const Buffer& other) : Buffer(other.bytes, other.offset) {
    std::memcpy(memory.get(), other.memory.get(), bytes + offset);
  }
  char* data() const { return memory.get() + offset; }
};

void put(char* base, Dtype dtype, int64_t i, double value) {
  if (dtype == Dtype::float64) std::memcpy(base + i * 8, &value, 8);
  const float single = static_cast<float>(value);
  BFloat16 brain;
  Float16 half;
  narrow(brain, single);
  narrow(half, single);
  if (dtype == Dtype::float32) std::memcpy(base + i * 4, &single, 4);
  if (dtype == Dtype::bfloat16) std::memcpy(base + i * 2, &brain, 2);
  if (dtype == Dtype::float16) std::memcpy(base + i * 2, &half, 2);
}

// The same number: any NaN is as good as another, and -0 as +0.
template <typename Any> bool alike(const char* a, const char* b) {
  Any x, y;
  std::memcpy(&x, a, sizeof x);
  std::memcpy(&y, b, sizeof y);
  return widen(x) == widen(y) || (widen(x) != widen(x) && widen(y) != widen(y));
}

std::vector<double> draw_levels() {
  const int which = static_cast<int>(below(9));
  std::vector<double> levels;
  if (which == 0) return levels;
  const int uniform[] = {2, 4, 16, 256};
  if (which <= 4) {
    for (int k = 0; k < uniform[which - 1]; ++k) levels.push_back(k - (uniform[which - 1] - 1) * 0.5);
  } else if (which == 5) {
    levels = {-1, 0, 1};
  } else {  // uneven: a small table, a full one, a large one
    const int count = which == 6 ? 9 : which == 7 ? 16 : 256;
    for (int k = 0; k < count; ++k) levels.push_back(static_cast<float>(std::sinh((k - count / 2) * 3.0 / count)));
  }
  return levels;
}

}  // namespace
