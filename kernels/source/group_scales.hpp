// The steps and lowests of a head of nibbles in the cache.
//
// Owns   their layout: two float16, 128/127 of a head's largest step and of its largest lowest by
//        magnitude; then for each group its step as 128ths of the first, then its lowest of the second.
//
// The product of a share and its unit is exact, so that it may be fused with a sum.
#pragma once

#include <cstring>

#include "integer_rows.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

constexpr float kShare = 1.0f / 128, kMostShare = 127;
constexpr int64_t kMostGroups = 128;
constexpr int64_t group_scale_bytes(int64_t groups) { return 4 + 2 * groups; }

struct GroupUnits {
  float step, lowest;  // What a group's shares are multiplied by.
};

// Shares: the steps of all groups of a head, then their lowests; both again and again up to `count`.
MINIGPT4_INLINE GroupUnits load_group_scales(const uint8_t* scales, int64_t groups, int64_t count,
                                             int64_t head, float* shares) {
  const uint8_t* own = scales + head * group_scale_bytes(groups);
  uint16_t largest[2];
  std::memcpy(largest, own, 4);
  const auto* bytes = reinterpret_cast<const int8_t*>(own + 4);
  for (int side = 0; side < 2; ++side, bytes += groups, shares += count) {
    int64_t i = 0;
    for (; i + kLanes <= groups; i += kLanes) store(shares + i, load_int8(bytes + i));
    for (; i < groups; ++i) shares[i] = bytes[i];
    for (; i < count; ++i) shares[i] = shares[i - groups];
  }
  return {kShare * widen_float16(largest[0]), kShare * widen_float16(largest[1])};
}

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
