// Vectors of 32 bytes: AVX2, FMA and F16C; with MINIGPT4_USE_VNNI also AVX-VNNI.
#pragma once

#include <immintrin.h>

#include "half.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

constexpr int kBytes = 32, kLanes = 8;
// Sums that fit 16 registers.
constexpr int kTileRows = 4, kTileOutputs = 2, kFloatTileOutputs = 3;
// One row waits for memory, which is read best from many places, without fetching ahead.
constexpr int kOneRowOutputs = 8, kTwoRowOutputs = 4, kFloatAhead = 0;
constexpr int kWideFloatRows = 4, kWideFloatVectors = 3;
constexpr int kWideRows = 3, kWideVectors = 2;

using Float = __m256;
using Integers = __m256i;
using Bytes = __m256i;

MINIGPT4_INLINE Float zero() { return _mm256_setzero_ps(); }
MINIGPT4_INLINE Float set(float x) { return _mm256_set1_ps(x); }
MINIGPT4_INLINE Float load(const float* p) { return _mm256_loadu_ps(p); }
MINIGPT4_INLINE void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
MINIGPT4_INLINE Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
MINIGPT4_INLINE Float divide(Float a, Float b) { return _mm256_div_ps(a, b); }
MINIGPT4_INLINE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
MINIGPT4_INLINE Float multiply_add(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
MINIGPT4_INLINE Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
MINIGPT4_INLINE Float abs(Float a) { return _mm256_andnot_ps(set(-0.0f), a); }
MINIGPT4_INLINE Float to_float(Integers a) { return _mm256_cvtepi32_ps(a); }

MINIGPT4_INLINE Float load_float16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

MINIGPT4_INLINE Float load_bfloat16(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

MINIGPT4_INLINE Float load_int8(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return to_float(_mm256_cvtepi8_epi32(bytes));
}

// The low and the high nibbles of so many bytes as there are lanes.
MINIGPT4_INLINE void load_nibbles(const uint8_t* p, Float& low, Float& high) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m256i wide = _mm256_cvtepu8_epi32(bytes);
  low = to_float(_mm256_and_si256(wide, _mm256_set1_epi32(15)));
  high = to_float(_mm256_srli_epi32(wide, 4));
}

// One float for all lanes, or two for one half each.
template <int kCount>
MINIGPT4_INLINE Float set_lanes(const float* p) {
  if (kCount == 1) return _mm256_broadcast_ss(p);
  const __m256 both = _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(p)));
  return _mm256_permutevar_ps(both, _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0));
}

MINIGPT4_INLINE float sum(Float x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

MINIGPT4_INLINE float max_lane(Float x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

MINIGPT4_INLINE void round(Float x, int32_t* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_cvtps_epi32(x));
}

MINIGPT4_INLINE void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

MINIGPT4_INLINE Bytes load_bytes(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
MINIGPT4_INLINE Bytes to_bytes(Float x) { return _mm256_castps_si256(x); }
MINIGPT4_INLINE Bytes exclusive_or(Bytes a, Bytes b) { return _mm256_xor_si256(a, b); }
MINIGPT4_INLINE Bytes low_nibbles(Bytes x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
MINIGPT4_INLINE Bytes high_nibbles(Bytes x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }

// sums += unsigned bytes · signed bytes, each four of them together. Two neighbours' products must
// not exceed 16 bits: 128 · 127 · 2 does not.
MINIGPT4_INLINE Integers dot(Integers sums, Bytes is_unsigned, Bytes is_signed) {
#if defined(MINIGPT4_USE_VNNI)
  return _mm256_dpbusd_avx_epi32(sums, is_unsigned, is_signed);
#else
  const __m256i pairs = _mm256_maddubs_epi16(is_unsigned, is_signed);
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

#if defined(MINIGPT4_USE_VNNI)
using NibbleSum = __m256i;
MINIGPT4_INLINE NibbleSum add_nibbles(NibbleSum sums, Bytes nibbles, Bytes row) {
  return dot(sums, nibbles, row);
}
MINIGPT4_INLINE Integers finish_nibbles(NibbleSum sums) { return sums; }
#else
// Sums of 16 bits: each add is at most 2 · 15 · 127, and a span has eight of them at most.
using NibbleSum = __m256i;
MINIGPT4_INLINE NibbleSum add_nibbles(NibbleSum sums, Bytes nibbles, Bytes row) {
  return _mm256_add_epi16(sums, _mm256_maddubs_epi16(nibbles, row));
}
MINIGPT4_INLINE Integers finish_nibbles(NibbleSum sums) {
  return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
}
#endif
MINIGPT4_INLINE Integers no_integers() { return _mm256_setzero_si256(); }
MINIGPT4_INLINE Integers add(Integers a, Integers b) { return _mm256_add_epi32(a, b); }

MINIGPT4_INLINE void store_bytes(uint8_t* p, Bytes x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
}

// Four bytes in each lane.
MINIGPT4_INLINE Bytes repeat(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return _mm256_set1_epi32(four);
}

// Lane i of vector n ↔ lane n of vector i.
MINIGPT4_INLINE void transpose(Bytes (&x)[kLanes]) {
  Bytes pairs[kLanes], fours[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm256_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
      fours[i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
    x[i + 4] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
  }
}

struct Int8Vectors {
#if defined(MINIGPT4_USE_VNNI)
  // The instruction wants unsigned weights: each is 128 too much.
  static constexpr int kOffset = 128, kNumbers = kBytes, kPlaneBytes = kBytes;
  static constexpr bool kHolds16Bits = false;
  using Numbers = __m256i;
  MINIGPT4_INLINE Numbers load(const uint8_t* p) {
    return _mm256_xor_si256(load_bytes(p), _mm256_set1_epi8(-128));
  }
  MINIGPT4_INLINE Integers add(Integers sums, Numbers numbers, Bytes row) {
    return dot(sums, numbers, row);
  }
#else
  // Rows are of 16 bits, and weights become so: as fast as bytes are here, and twice as exact.
  static constexpr int kOffset = 0, kNumbers = kBytes / 2, kPlaneBytes = kBytes;
  static constexpr bool kHolds16Bits = true;
  using Numbers = __m256i;
  MINIGPT4_INLINE Numbers load(const uint8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  MINIGPT4_INLINE Integers add(Integers sums, Numbers numbers, Bytes row) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(numbers, row));
  }
#endif
};

// 2:4 values, and for each the place in 16 bytes of a row that it is multiplied by.
struct SparseVectors {
  struct Numbers {
    __m256i values, magnitudes, places;
  };
  MINIGPT4_INLINE Numbers load(const uint8_t* values, const uint8_t* positions) {
    const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(positions));
    const __m256i words = _mm256_cvtepu8_epi32(packed);  // A byte is four values' positions.
    __m256i spread = _mm256_or_si256(words, _mm256_slli_epi32(words, 6));
    spread = _mm256_or_si256(spread, _mm256_slli_epi32(spread, 12));
    spread = _mm256_and_si256(spread, _mm256_set1_epi8(3));
    const __m256i starts = _mm256_set1_epi64x(0x0c0c080804040000);
    const __m256i numbers = load_bytes(values);
    return {numbers, _mm256_abs_epi8(numbers), _mm256_or_si256(spread, starts)};
  }
  MINIGPT4_INLINE Integers add(Integers sums, const Numbers& numbers, const uint8_t* row) {
    const __m256i first = _mm256_shuffle_epi8(load_bytes(row), numbers.places);
    const __m256i second = _mm256_shuffle_epi8(load_bytes(row + kBytes), numbers.places);
    const __m256i chosen = _mm256_blend_epi32(first, second, 0xcc);
    return dot(sums, numbers.magnitudes, _mm256_sign_epi8(chosen, numbers.values));
  }
};

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
