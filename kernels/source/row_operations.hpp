// What is done to rows between products: a residual sum with its norm, and the gate of a feed-forward.
//
// Owns   their rounding, which is that of the operations of torch that they stand for, one by one.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

template <Number type>
MINIGPT4_INLINE float rounded(float value) {
  if (type == Number::bfloat16) return widen_bfloat16(narrow_bfloat16(value));
  if (type == Number::float16) return widen_float16(narrow_float16(value));
  return value;
}

inline float sum_of_squares(const float* row, int64_t width) {
  Float first = zero(), second = zero();
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    const Float a = load(row + i), b = load(row + i + kLanes);
    first = multiply_add(a, a, first);
    second = multiply_add(b, b, second);
  }
  float rest = 0;
  for (; i < width; ++i) rest += row[i] * row[i];
  return sum(add(first, second)) + rest;
}

template <Number type>
void norm_rows(const void* work, int64_t first, int64_t last) {
  const auto& norm = *static_cast<const Norm*>(work);
  const int64_t width = norm.width;
  float* row = static_cast<float*>(scratch(1, 2 * width * sizeof(float)));
  float* other = row + width;
  for (int64_t m = first; m < last; ++m) {
    load_row({norm.hidden, type}, m * width, width, row);
    if (norm.added != nullptr) {
      load_row({norm.added, type}, m * width, width, other);
      for (int64_t i = 0; i < width; ++i) row[i] = rounded<type>(row[i] + other[i]);
      store_row(norm.added, type, m * width, width, row);
    }
    const float length = 1 / std::sqrt(sum_of_squares(row, width) / width + norm.epsilon);
    load_row(norm.weight, 0, width, other);
    for (int64_t i = 0; i < width; ++i) row[i] = rounded<type>(row[i] * length) * other[i];
    store_row(norm.y, type, m * width, width, row);
  }
}

// x · sigmoid(x), by e^-|x|, which does not overflow.
inline float silu(float x) {
  const float power = exponential(-std::fabs(x));
  return x * (x < 0 ? power : 1.0f) / (1.0f + power);
}

template <Number type>
void gate_numbers(const void* work, int64_t first, int64_t last) {
  const auto& gated = *static_cast<const Gate*>(work);
  constexpr int64_t kAtOnce = 256;
  float gate[kAtOnce], up[kAtOnce];
  for (int64_t i = first; i < last; i += kAtOnce) {
    const int64_t count = std::min(kAtOnce, last - i);
    load_row({gated.gate, type}, i, count, gate);
    load_row({gated.up, type}, i, count, up);
    for (int64_t k = 0; k < count; ++k) gate[k] = rounded<type>(silu(gate[k])) * up[k];
    store_row(gated.gate, type, i, count, gate);
  }
}

static void norm(const Norm& work) {
  const int64_t step = least_step(1, work.width);
  switch (work.type) {
    case Number::float32:
      return in_parallel(work.rows, step, norm_rows<Number::float32>, &work);
    case Number::float16:
      return in_parallel(work.rows, step, norm_rows<Number::float16>, &work);
    case Number::bfloat16:
      return in_parallel(work.rows, step, norm_rows<Number::bfloat16>, &work);
  }
}

static void gate(const Gate& work) {
  constexpr int64_t kCost = 8;  // Multiplications that one number's exponential takes as long as.
  const int64_t step = least_step(256, kCost);
  switch (work.type) {
    case Number::float32:
      return in_parallel(work.count, step, gate_numbers<Number::float32>, &work);
    case Number::float16:
      return in_parallel(work.count, step, gate_numbers<Number::float16>, &work);
    case Number::bfloat16:
      return in_parallel(work.count, step, gate_numbers<Number::bfloat16>, &work);
  }
}

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
