// float16 and bfloat16, one number at a time, without instructions that a level may lack.
#pragma once

#include <cstdint>
#include <cstring>

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

static inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float widen_bfloat16(uint16_t bits) {
  return from_bits(static_cast<uint32_t>(bits) << 16);
}

// Rounds to the nearest, of two to the even one.
static inline uint16_t narrow_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float widen_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(bits & 0x7fff) << 13;
  if ((bits & 0x7c00) == 0x7c00) return from_bits(sign | rest | 0x7f800000);
  // The exponents differ by 112; the product is exact for small numbers too.
  return from_bits(sign | to_bits(from_bits(rest) * from_bits(0x77800000)));
}

static inline uint16_t narrow_float16(float value) {
  const uint32_t bits = to_bits(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity.
  if (rest < 0x38800000) {
    // Below 2^-14 the last place is 2^-24: that of a float near 0.5.
    const float shifted = from_bits(rest) + 0.5f;
    return static_cast<uint16_t>(sign | (to_bits(shifted) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
