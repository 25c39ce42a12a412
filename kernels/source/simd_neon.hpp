// Vectors of 16 bytes: ARM's NEON with the dot product.
#pragma once

#include <arm_neon.h>

#include "half.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

constexpr int kBytes = 16, kLanes = 4;
// Sums that fit 32 registers.
constexpr int kTileRows = 4, kTileOutputs = 4, kFloatTileOutputs = 4;
constexpr int kOneRowOutputs = 4, kTwoRowOutputs = 4, kFloatAhead = 2048;
constexpr int kWideFloatRows = 8, kWideFloatVectors = 3;
constexpr int kWideRows = 4, kWideVectors = 2;

using Float = float32x4_t;
using Integers = int32x4_t;
using Bytes = uint8x16_t;

MINIGPT4_INLINE Float set(float x) { return vdupq_n_f32(x); }
MINIGPT4_INLINE Float zero() { return set(0); }
MINIGPT4_INLINE Float load(const float* p) { return vld1q_f32(p); }
MINIGPT4_INLINE void store(float* p, Float x) { vst1q_f32(p, x); }
MINIGPT4_INLINE Float multiply(Float a, Float b) { return vmulq_f32(a, b); }
MINIGPT4_INLINE Float divide(Float a, Float b) { return vdivq_f32(a, b); }
MINIGPT4_INLINE Float add(Float a, Float b) { return vaddq_f32(a, b); }
MINIGPT4_INLINE Float multiply_add(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
MINIGPT4_INLINE Float max(Float a, Float b) { return vmaxq_f32(a, b); }
MINIGPT4_INLINE Float abs(Float a) { return vabsq_f32(a); }
MINIGPT4_INLINE Float to_float(Integers a) { return vcvtq_f32_s32(a); }
MINIGPT4_INLINE float sum(Float x) { return vaddvq_f32(x); }
MINIGPT4_INLINE float max_lane(Float x) { return vmaxvq_f32(x); }
// A step here is at most the shortest group.
template <int>
MINIGPT4_INLINE Float set_lanes(const float* p) { return vld1q_dup_f32(p); }

MINIGPT4_INLINE Float load_float16(const uint16_t* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

MINIGPT4_INLINE Float load_bfloat16(const uint16_t* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}

MINIGPT4_INLINE Float load_int8(const int8_t* p) {
  uint32_t four;
  std::memcpy(&four, p, sizeof four);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(vcreate_u8(four)));
  return to_float(vmovl_s16(vget_low_s16(wide)));
}

// The low and the high nibbles of so many bytes as there are lanes.
MINIGPT4_INLINE void load_nibbles(const uint8_t* p, Float& low, Float& high) {
  uint32_t four;
  std::memcpy(&four, p, sizeof four);
  const uint16x4_t bytes = vget_low_u16(vmovl_u8(vcreate_u8(four)));
  low = vcvtq_f32_u32(vmovl_u16(vand_u16(bytes, vdup_n_u16(15))));
  high = vcvtq_f32_u32(vmovl_u16(vshr_n_u16(bytes, 4)));
}

// To the nearest, of two to the even one.
MINIGPT4_INLINE void round(Float x, int32_t* out) { vst1q_s32(out, vcvtnq_s32_f32(x)); }

MINIGPT4_INLINE void prefetch(const void* p) {
#if !defined(_MSC_VER)
  __builtin_prefetch(p);
#else
  (void)p;
#endif
}

MINIGPT4_INLINE Bytes load_bytes(const uint8_t* p) { return vld1q_u8(p); }
MINIGPT4_INLINE Bytes to_bytes(Float x) { return vreinterpretq_u8_f32(x); }
MINIGPT4_INLINE Bytes exclusive_or(Bytes a, Bytes b) { return veorq_u8(a, b); }
MINIGPT4_INLINE Bytes low_nibbles(Bytes x) { return vandq_u8(x, vdupq_n_u8(15)); }
MINIGPT4_INLINE Bytes high_nibbles(Bytes x) { return vshrq_n_u8(x, 4); }
MINIGPT4_INLINE Integers no_integers() { return vdupq_n_s32(0); }
MINIGPT4_INLINE Integers add(Integers a, Integers b) { return vaddq_s32(a, b); }
MINIGPT4_INLINE void store_bytes(uint8_t* p, Bytes x) { vst1q_u8(p, x); }

// Four bytes in each lane.
MINIGPT4_INLINE Bytes repeat(const uint8_t* p) {
  uint32_t four;
  std::memcpy(&four, p, sizeof four);
  return vreinterpretq_u8_u32(vdupq_n_u32(four));
}

// Lane i of vector n ↔ lane n of vector i.
MINIGPT4_INLINE void transpose(Bytes (&x)[kLanes]) {
  uint32x4_t words[kLanes];
  for (int i = 0; i < kLanes; ++i) words[i] = vreinterpretq_u32_u8(x[i]);
  const uint32x4x2_t low = vzipq_u32(words[0], words[2]), high = vzipq_u32(words[1], words[3]);
  for (int i = 0; i < 2; ++i) {
    const uint32x4x2_t both = vzipq_u32(low.val[i], high.val[i]);
    x[2 * i] = vreinterpretq_u8_u32(both.val[0]);
    x[2 * i + 1] = vreinterpretq_u8_u32(both.val[1]);
  }
}

// sums += bytes · bytes, each four of them together; both signed, nibbles being so as well.
MINIGPT4_INLINE Integers dot(Integers sums, Bytes a, Bytes b) {
  return vdotq_s32(sums, vreinterpretq_s8_u8(a), vreinterpretq_s8_u8(b));
}

using NibbleSum = Integers;
MINIGPT4_INLINE NibbleSum add_nibbles(NibbleSum sums, Bytes nibbles, Bytes row) {
  return dot(sums, nibbles, row);
}
MINIGPT4_INLINE Integers finish_nibbles(NibbleSum sums) { return sums; }

struct Int8Vectors {
  static constexpr int kOffset = 0, kNumbers = kBytes, kPlaneBytes = kBytes;
  static constexpr bool kHolds16Bits = false;
  using Numbers = Bytes;
  MINIGPT4_INLINE Numbers load(const uint8_t* p) { return load_bytes(p); }
  MINIGPT4_INLINE Integers add(Integers sums, Numbers numbers, Bytes row) {
    return dot(sums, numbers, row);
  }
};

// 2:4 values, and for each the place in 32 bytes of a row that it is multiplied by.
struct SparseVectors {
  struct Numbers {
    Bytes values, places;
  };
  MINIGPT4_INLINE Numbers load(const uint8_t* values, const uint8_t* positions) {
    // Four bytes, each of four values: a byte goes to four places and is shifted there.
    uint32_t word;
    std::memcpy(&word, positions, sizeof word);
    const uint8x16_t packed = vreinterpretq_u8_u32(vdupq_n_u32(word));
    const uint8x16_t fours = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    const int8x16_t shifts = {0, -2, -4, -6, 0, -2, -4, -6, 0, -2, -4, -6, 0, -2, -4, -6};
    const uint8x16_t starts = {0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28};
    const uint8x16_t spread = vshlq_u8(vqtbl1q_u8(packed, fours), shifts);
    return {load_bytes(values), vorrq_u8(vandq_u8(spread, vdupq_n_u8(3)), starts)};
  }
  MINIGPT4_INLINE Integers add(Integers sums, const Numbers& numbers, const uint8_t* row) {
    const uint8x16x2_t both = {{load_bytes(row), load_bytes(row + kBytes)}};
    return dot(sums, numbers.values, vqtbl2q_u8(both, numbers.places));
  }
};

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
