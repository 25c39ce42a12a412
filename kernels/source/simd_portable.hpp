// Vectors of 16 bytes in plain C++, which compilers turn into what the processor surely has.
#pragma once

#include <algorithm>
#include <cmath>

#include "half.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

constexpr int kBytes = 16, kLanes = 4;
constexpr int kTileRows = 4, kTileOutputs = 2, kFloatTileOutputs = 2;
constexpr int kOneRowOutputs = 2, kTwoRowOutputs = 2, kFloatAhead = 0;
constexpr int kWideFloatRows = 2, kWideFloatVectors = 2;
constexpr int kWideRows = 2, kWideVectors = 2;

struct Float {
  float lane[kLanes];
};
struct Integers {
  int32_t lane[kLanes];
};
struct Bytes {
  uint8_t lane[kBytes];
};

template <class Function>
MINIGPT4_INLINE Float each_lane(Function function) {
  Float out;
  for (int i = 0; i < kLanes; ++i) out.lane[i] = function(i);
  return out;
}

MINIGPT4_INLINE Float set(float x) {
  return each_lane([&](int) { return x; });
}
MINIGPT4_INLINE Float zero() { return set(0); }
MINIGPT4_INLINE Float load(const float* p) {
  return each_lane([&](int i) { return p[i]; });
}
MINIGPT4_INLINE void store(float* p, const Float& x) { std::memcpy(p, x.lane, sizeof x.lane); }
MINIGPT4_INLINE Float multiply(const Float& a, const Float& b) {
  return each_lane([&](int i) { return a.lane[i] * b.lane[i]; });
}
MINIGPT4_INLINE Float divide(const Float& a, const Float& b) {
  return each_lane([&](int i) { return a.lane[i] / b.lane[i]; });
}
MINIGPT4_INLINE Float add(const Float& a, const Float& b) {
  return each_lane([&](int i) { return a.lane[i] + b.lane[i]; });
}
MINIGPT4_INLINE Float multiply_add(const Float& a, const Float& b, const Float& c) {
  return each_lane([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
MINIGPT4_INLINE Float max(const Float& a, const Float& b) {
  return each_lane([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
MINIGPT4_INLINE Float abs(const Float& a) {
  return each_lane([&](int i) { return std::fabs(a.lane[i]); });
}
MINIGPT4_INLINE Float to_float(const Integers& a) {
  return each_lane([&](int i) { return static_cast<float>(a.lane[i]); });
}
MINIGPT4_INLINE Float load_float16(const uint16_t* p) {
  return each_lane([&](int i) { return widen_float16(p[i]); });
}
MINIGPT4_INLINE Float load_bfloat16(const uint16_t* p) {
  return each_lane([&](int i) { return widen_bfloat16(p[i]); });
}
MINIGPT4_INLINE Float load_int8(const int8_t* p) {
  return each_lane([&](int i) { return static_cast<float>(p[i]); });
}
// The low and the high nibbles of so many bytes as there are lanes.
MINIGPT4_INLINE void load_nibbles(const uint8_t* p, Float& low, Float& high) {
  low = each_lane([&](int i) { return static_cast<float>(p[i] & 15); });
  high = each_lane([&](int i) { return static_cast<float>(p[i] >> 4); });
}
// A step here is at most the shortest group.
template <int>
MINIGPT4_INLINE Float set_lanes(const float* p) { return set(*p); }
MINIGPT4_INLINE float sum(const Float& x) {
  return (x.lane[0] + x.lane[2]) + (x.lane[1] + x.lane[3]);
}
MINIGPT4_INLINE float max_lane(const Float& x) {
  return std::max(std::max(x.lane[0], x.lane[1]), std::max(x.lane[2], x.lane[3]));
}
MINIGPT4_INLINE void round(const Float& x, int32_t* out) {
  for (int i = 0; i < kLanes; ++i) out[i] = static_cast<int32_t>(std::nearbyintf(x.lane[i]));
}
MINIGPT4_INLINE void prefetch(const void*) {}

MINIGPT4_INLINE Bytes load_bytes(const uint8_t* p) {
  Bytes out;
  std::memcpy(out.lane, p, kBytes);
  return out;
}
MINIGPT4_INLINE Bytes to_bytes(const Float& x) {
  Bytes out;
  std::memcpy(out.lane, x.lane, kBytes);
  return out;
}
MINIGPT4_INLINE Bytes exclusive_or(Bytes a, const Bytes& b) {
  for (int i = 0; i < kBytes; ++i) a.lane[i] ^= b.lane[i];
  return a;
}
MINIGPT4_INLINE Bytes low_nibbles(Bytes x) {
  for (uint8_t& each : x.lane) each &= 15;
  return x;
}
MINIGPT4_INLINE Bytes high_nibbles(Bytes x) {
  for (uint8_t& each : x.lane) each >>= 4;
  return x;
}
MINIGPT4_INLINE Integers no_integers() { return Integers{{0, 0, 0, 0}}; }
MINIGPT4_INLINE Integers add(const Integers& a, const Integers& b) {
  Integers out;
  for (int i = 0; i < kLanes; ++i) out.lane[i] = a.lane[i] + b.lane[i];
  return out;
}
MINIGPT4_INLINE void store_bytes(uint8_t* p, const Bytes& x) { std::memcpy(p, x.lane, kBytes); }

// Four bytes in each lane.
MINIGPT4_INLINE Bytes repeat(const uint8_t* p) {
  Bytes out;
  for (int i = 0; i < kBytes; i += 4) std::memcpy(out.lane + i, p, 4);
  return out;
}

// Lane i of vector n ↔ lane n of vector i.
MINIGPT4_INLINE void transpose(Bytes (&x)[kLanes]) {
  const Bytes before[kLanes] = {x[0], x[1], x[2], x[3]};
  for (int n = 0; n < kLanes; ++n) {
    for (int i = 0; i < kLanes; ++i) std::memcpy(x[i].lane + 4 * n, before[n].lane + 4 * i, 4);
  }
}

// sums += bytes · bytes, each four of them together; both signed, nibbles being so as well.
MINIGPT4_INLINE Integers dot(Integers sums, const Bytes& a, const Bytes& b) {
  for (int i = 0; i < kBytes; ++i) {
    sums.lane[i / 4] += static_cast<int8_t>(a.lane[i]) * static_cast<int8_t>(b.lane[i]);
  }
  return sums;
}

using NibbleSum = Integers;
MINIGPT4_INLINE NibbleSum add_nibbles(const NibbleSum& sums, const Bytes& nibbles,
                                      const Bytes& row) {
  return dot(sums, nibbles, row);
}
MINIGPT4_INLINE Integers finish_nibbles(const NibbleSum& sums) { return sums; }

struct Int8Vectors {
  static constexpr int kOffset = 0, kNumbers = kBytes, kPlaneBytes = kBytes;
  static constexpr bool kHolds16Bits = false;
  using Numbers = Bytes;
  MINIGPT4_INLINE Numbers load(const uint8_t* p) { return load_bytes(p); }
  MINIGPT4_INLINE Integers add(const Integers& sums, const Numbers& numbers, const Bytes& row) {
    return dot(sums, numbers, row);
  }
};

struct SparseVectors {
  struct Numbers {
    Bytes values;
    uint8_t places[kBytes];  // In the row's two vectors.
  };
  MINIGPT4_INLINE Numbers load(const uint8_t* values, const uint8_t* positions) {
    Numbers out;
    out.values = load_bytes(values);
    for (int i = 0; i < kBytes; ++i) {
      const int position = positions[i / 4] >> 2 * (i % 4) & 3;
      out.places[i] = static_cast<uint8_t>(i / 2 * 4 + position);
    }
    return out;
  }
  MINIGPT4_INLINE Integers add(const Integers& sums, const Numbers& numbers, const uint8_t* row) {
    Bytes chosen;
    for (int i = 0; i < kBytes; ++i) chosen.lane[i] = row[numbers.places[i]];
    return dot(sums, numbers.values, chosen);
  }
};

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
