// Keys and values of new tokens into a cache of integers.
//
// Owns   their rounding, which is that of the torch operations of cache/key_value.py, number by number.
//
// Float additions to 1.5 · 2^23 and back round to whole numbers, of two to the even one, without an
// instruction that a level may lack.
#pragma once

#include <algorithm>
#include <limits>

#include "group_scales.hpp"
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

inline float to_whole(float x, float most) {
  const float whole = (x + kWhole) - kWhole;
  return std::max(-most, std::min(whole == whole ? whole : 0.0f, most));
}

// See `GroupScales` and `CachedInt4`. With NaN among them all are NaN when they are read.
inline void write_int4(const float* row, int64_t dim, int64_t groups, uint8_t* numbers,
                       uint8_t* scales) {
  const int64_t group = dim / groups;
  float wanted[2 * kMostGroups], largest[2] = {0, 0};
  for (int64_t g = 0; g < groups; ++g) {
    const auto [lowest, highest] = std::minmax_element(row + g * group, row + (g + 1) * group);
    wanted[g] = (*highest - *lowest) / 15;
    wanted[groups + g] = *lowest;
    largest[0] = std::max(largest[0], wanted[g]);
    largest[1] = std::max(largest[1], std::fabs(*lowest));
  }
  const bool is_broken = has_nan(row, dim);
  uint16_t narrow[2];
  float units[2];
  for (int side = 0; side < 2; ++side) {
    narrow[side] =
        narrow_float16(is_broken ? std::numeric_limits<float>::quiet_NaN()
                                 : largest[side] * (1 / (kShare * kMostShare)));
    units[side] = kShare * widen_float16(narrow[side]);
  }
  std::memcpy(scales, narrow, 4);
  auto* shares = reinterpret_cast<int8_t*>(scales + 4);
  for (int64_t i = 0; i < 2 * groups; ++i) {
    const float unit = std::max(units[i / groups], kLeastDivisor);
    shares[i] = static_cast<int8_t>(to_whole(is_broken ? 0 : wanted[i] / unit, kMostShare));
  }
  const auto steps = [&](int64_t g, int64_t i) {
    const float step = units[0] * shares[g], start = units[1] * shares[groups + g];
    const float whole = to_whole((row[g * group + i] - start) / std::max(step, kLeastDivisor), 15);
    return static_cast<uint8_t>(std::max(whole, 0.0f));
  };
  for (int64_t i = 0; i < dim / 2; ++i) {
    const int64_t far = dim / 2 + i;
    numbers[i] = static_cast<uint8_t>(steps(i % groups, i / groups) |
                                      steps(far % groups, far / groups) << 4);
  }
}

// A head of a key or a value is one item: first those of all keys.
inline void write_heads(const void* work, int64_t first, int64_t last) {
  const auto& w = *static_cast<const CacheWrite*>(work);
  const int64_t dim = w.head_dim;
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
    write_int4(row, dim, w.groups, static_cast<uint8_t*>(w.numbers) + there * dim / 2,
               static_cast<uint8_t*>(w.scales) + there * group_scale_bytes(w.groups));
  }
}

static void write(const CacheWrite& work) {
  constexpr int64_t kCost = 4;  // Multiplications that the rounding of a number takes as long as.
  const int64_t step = least_step(1, kCost * work.head_dim);
  in_parallel(2 * work.tokens * work.heads, step, write_heads, &work);
}

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
