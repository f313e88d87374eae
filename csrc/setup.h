// What the operators around the step are told: rows that want scales, weights that are looked at, codes that become
// weights. Plain data, for host and device.
#pragma once

#include "launch.h"
#include "maths/fit.h"

namespace askew {

// Rows of weights that get a scale each.
struct Rows {
  Dtype dtype;
  const void* data;
  int64_t columns, row_stride, column_stride;
  Levels levels;
};

// What is asked of weights beside their levels, in memory order. Unused pointers are null.
struct Looking {
  Dtype dtype;
  Levels levels;
  const void* weight;
  const void* scale;  // as in Span
  int64_t scale_run, scale_count;
  int64_t size;
  uint8_t* codes;         // receives codes, a byte each
  const uint8_t* before;  // other codes, to count those that differ; may be `codes`
  uint8_t* packed;        // receives codes, digits of base `base`, `per_byte` to a byte, the first one lowest
  int base, per_byte;
  void* snapped;  // receives snapped weights; may be `weight`
  bool measures;  // distances and errors are wanted, with
  double near;    // from which distance on a weight is off its level
};

// Packed codes that become weights: scale * level, as Looking's snapped weights.
struct Restoring {
  Dtype dtype;
  Levels levels;
  const uint8_t* packed;  // digits of base `base`, `per_byte` to a byte, the first one lowest
  int base, per_byte;
  const void* scale;  // as in Span
  int64_t scale_run, scale_count;
  int64_t size;
  void* weight;  // receives the weights, in the order of the codes
};

}  // namespace askew
