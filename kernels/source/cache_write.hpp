// Keys and values of new tokens into a cache of integers.
//
// Owns   their rounding, which is that of the torch operations of cache/key_value.py, number by number.
//
// Float additions to 1.5 · 2^23 and back round to whole numbers, of two to the even one, without an
// instruction that a level may lack.
#pragma once

#include <algorithm>
#include <limits>

#include "row_operations.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

constexpr float kWhole = 12582912.0f;
constexpr float kLeastDivisor = std::numeric_limits<float>::min();

inline bool has_nan(const float* row, int64_t count) {
  int found = 0;
  for (int64_t i = 0; i < count; ++i) found |= row[i] != row[i];
  return found != 0;
}

// The largest number over 127 is the scale. With NaN among them all are NaN when they are read.
inline void write_int8(const float* row, int64_t dim, int8_t* numbers, float* scale) {
  if (has_nan(row, dim)) {
    *scale = std::numeric_limits<float>::quiet_NaN();
    std::memset(numbers, 0, dim);
    return;
  }
  Float largest = zero();
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) largest = max(largest, abs(load(row + i)));
  float most = max_lane(largest);
  for (; i < dim; ++i) most = std::max(most, std::fabs(row[i]));
  *scale = most / 127;
  const float divisor = std::max(*scale, kLeastDivisor);
  for (i = 0; i < dim; ++i) {
    const float whole = (row[i] / divisor + kWhole) - kWhole;
    numbers[i] = static_cast<int8_t>(whole == whole ? whole : 0.0f);  // Infinity over infinity.
  }
}

// A float16 step and lowest for a group, and 15 steps at most. See CachedInt4 for the order.
inline void write_int4(const float* group, int64_t half, uint8_t* numbers, uint16_t* scales) {
  const bool is_broken = has_nan(group, 2 * half);
  float lowest = group[0], highest = group[0];
  for (int64_t i = 1; i < 2 * half; ++i) {
    lowest = group[i] < lowest ? group[i] : lowest;
    highest = group[i] > highest ? group[i] : highest;
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  scales[0] = narrow_float16(is_broken ? nan : (highest - lowest) / 15);
  scales[1] = narrow_float16(is_broken ? nan : lowest);
  const float divisor = std::max(kLeastDivisor, widen_float16(scales[0]));
  const float start = widen_float16(scales[1]);
  const auto steps = [&](float x) {
    const float whole = ((x - start) / divisor + kWhole) - kWhole;
    return static_cast<int32_t>(whole > 0 ? (whole < 15 ? whole : 15.0f) : 0.0f);
  };
  for (int64_t i = 0; i < half; ++i) {
    numbers[i] = static_cast<uint8_t>(steps(group[i]) | steps(group[half + i]) << 4);
  }
}

// A head of a key or a value is one item: first those of all keys.
inline void write_heads(const void* work, int64_t first, int64_t last) {
  const auto& w = *static_cast<const CacheWrite*>(work);
  const int64_t dim = w.head_dim, half = dim / w.groups / 2;
  float* row = static_cast<float*>(scratch(1, dim * sizeof(float)));
  for (int64_t i = first; i < last; ++i) {
    const int64_t side = i / (w.tokens * w.heads), source = i % (w.tokens * w.heads);
    const int64_t head = source % w.heads;
    load_row(side == 0 ? w.keys : w.values, source * dim, dim, row);
    if (side == 0 && w.centre != nullptr) {
      for (int64_t d = 0; d < dim; ++d) row[d] -= w.centre[head * dim + d];
    }
    const int64_t there = (side * w.num_slots + w.slots[source / w.heads]) * w.heads + head;
    if (w.format == CacheFormat::int8) {
      write_int8(row, dim, static_cast<int8_t*>(w.numbers) + there * dim,
                 static_cast<float*>(w.scales) + there);
      continue;
    }
    for (int64_t g = 0; g < w.groups; ++g) {
      write_int4(row + g * 2 * half, half,
                 static_cast<uint8_t*>(w.numbers) + there * dim / 2 + g * half,
                 static_cast<uint16_t*>(w.scales) + (there * w.groups + g) * 2);
    }
  }
}

static void write(const CacheWrite& work) {
  constexpr int64_t kCost = 4;  // Multiplications that the rounding of a number takes as long as.
  const int64_t step = least_step(1, kCost * work.head_dim);
  in_parallel(2 * work.tokens * work.heads, step, write_heads, &work);
}

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
