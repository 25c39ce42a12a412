// The rows of a product, rounded to integers in the order in which a weight format takes them.
//
// Owns   the scale of each span of a row, its rounding, and the planes that stand for 16 bits.
//
// A number of 8 bits is one byte. One of 16 bits is high · 255 + low, two bytes from -127 to 127,
// so that a kernel multiplies by bytes only: the planes' sums come together at a span's end.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "parallel.hpp"
#include "product.hpp"
#include "simd.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

constexpr int kPlaneBase = 255;
constexpr float kLimit8 = 127, kLimit16 = 127 * kPlaneBase + 127;
constexpr float kSmallest = 1e-30f;

// How a row is divided. A span is what a kernel sums up in integers; its inputs share a scale. Where
// each span has its own sum, a weight's zero points may differ from span to span.
struct RowLayout {
  int64_t inputs = 0, rows = 0;
  int64_t span = 0;
  int64_t steps = 0;      // With the last one filled up by zeros.
  int64_t row_bytes = 0;
  int64_t scales = 0;     // Of a row; zeros behind them fill up a step.
  int64_t sums = 0;
  bool is_grouped = false;
  bool is_8_bit = false;
};

struct RoundedRows {
  RowLayout layout;
  uint8_t* values = nullptr;
  float* scales = nullptr;
  float* sums = nullptr;  // Of what offsets are multiplied by; without groups one, times the scales.

  const uint8_t* row(int64_t m) const { return values + m * layout.row_bytes; }
  const float* scale(int64_t m) const { return scales + m * layout.scales; }
  const float* sum(int64_t m) const { return sums + m * layout.sums; }
};

inline int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// The number at an index, whatever its type.
inline float load_one(const Floats& floats, int64_t index) {
  if (floats.type == Number::float32) return static_cast<const float*>(floats.data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(floats.data)[index];
  return floats.type == Number::bfloat16 ? widen_bfloat16(bits) : widen_float16(bits);
}

inline void store_one(void* y, Number type, int64_t index, float value) {
  if (type == Number::float32) {
    static_cast<float*>(y)[index] = value;
  } else {
    static_cast<uint16_t*>(y)[index] =
        type == Number::bfloat16 ? narrow_bfloat16(value) : narrow_float16(value);
  }
}

// `count` results at an index of y.
inline void store_row(void* y, Number type, int64_t index, int64_t count, const float* values) {
  if (type == Number::float32) {
    std::memcpy(static_cast<float*>(y) + index, values, count * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; ++i) store_one(y, type, index + i, values[i]);
}

// `count` floats from an index on, as float32.
inline void load_row(const Floats& floats, int64_t index, int64_t count, float* out) {
  if (floats.type == Number::float32) {
    std::memcpy(out, static_cast<const float*>(floats.data) + index, count * sizeof(float));
    return;
  }
  const uint16_t* bits = static_cast<const uint16_t*>(floats.data) + index;
  const bool is_bfloat16 = floats.type == Number::bfloat16;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(out + i, is_bfloat16 ? load_bfloat16(bits + i) : load_float16(bits + i));
  }
  for (; i < count; ++i) out[i] = is_bfloat16 ? widen_bfloat16(bits[i]) : widen_float16(bits[i]);
}

// Rounds numbers that share a scale, and gives it. An infinity or NaN among them makes it NaN, and so
// the row's results, as those of a product of floats would be.
inline float round_shared(const float* x, int64_t count, float limit, int32_t* integers) {
  Float largest = zero(), broken = zero();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Float some = load(x + i);
    largest = max(largest, abs(some));
    broken = multiply_add(some, zero(), broken);
  }
  float most = max_lane(largest), is_broken = sum(broken);
  for (; i < count; ++i) {
    most = std::fmax(most, std::fabs(x[i]));
    is_broken += x[i] * 0.0f;
  }
  if (is_broken != 0.0f) {
    std::memset(integers, 0, count * sizeof(int32_t));
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float scale = std::fmax(most, kSmallest) / limit;
  const Float scales = set(scale);
  for (i = 0; i + kLanes <= count; i += kLanes) round(divide(load(x + i), scales), integers + i);
  for (; i < count; ++i) integers[i] = static_cast<int32_t>(std::nearbyintf(x[i] / scale));
  return scale;
}

template <class Order>
int64_t sum_of(const int32_t* integers, int64_t count) {
  int32_t total = 0;  // At most 2^15 · 2^16 of them in a span.
  for (int64_t i = 0; i < count; ++i) total += Order::correction(integers[i]);
  return total;
}

template <class Order, int Planes>
void arrange_row(const int32_t* integers, int64_t steps, uint8_t* out) {
  int32_t high[Order::kNumbers], low[Order::kNumbers];
  for (int64_t step = 0; step < steps; ++step, integers += Order::kNumbers) {
    if (Planes == 1) {
      Order::arrange(integers, out);
    } else {
      for (int i = 0; i < Order::kNumbers; ++i) {
        const float share = integers[i] * (1.0f / kPlaneBase);
        high[i] = static_cast<int32_t>(share + (share < 0 ? -0.5f : 0.5f));
        low[i] = integers[i] - high[i] * kPlaneBase;
      }
      Order::arrange(high, out);
      Order::arrange(low, out + Order::kPlaneBytes);
    }
    out += Planes * Order::kPlaneBytes;
  }
}

template <class Order, int Planes>
void round_rows(const Floats& x, const RoundedRows& rounded, int64_t first, int64_t last) {
  const RowLayout& layout = rounded.layout;
  const int64_t width = layout.steps * Order::kNumbers;
  float* floats = static_cast<float*>(scratch(2, width * (sizeof(float) + sizeof(int32_t))));
  int32_t* integers = reinterpret_cast<int32_t*>(floats + width);
  const float limit = layout.is_8_bit ? kLimit8 : kLimit16;
  std::memset(integers + layout.inputs, 0, (width - layout.inputs) * sizeof(int32_t));
  for (int64_t m = first; m < last; ++m) {
    load_row(x, m * layout.inputs, layout.inputs, floats);
    float* scales = rounded.scales + m * layout.scales;
    float* sums = rounded.sums + m * layout.sums;
    std::memset(scales, 0, layout.scales * sizeof(float));
    std::memset(sums, 0, layout.sums * sizeof(float));
    for (int64_t k = 0, span = 0; k < layout.inputs; k += layout.span, ++span) {
      const int64_t count = std::min(layout.span, layout.inputs - k);
      scales[span] = round_shared(floats + k, count, limit, integers + k);
      const float sum = sum_of<Order>(integers + k, count);
      if (layout.is_grouped) {
        sums[span] = sum;
      } else {
        sums[0] += scales[span] * sum;
      }
    }
    arrange_row<Order, Planes>(integers, layout.steps, rounded.values + m * layout.row_bytes);
  }
}

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
