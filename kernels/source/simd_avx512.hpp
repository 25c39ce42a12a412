// Vectors of 64 bytes: AVX-512 F, BW, DQ and VL; with MINIGPT4_USE_VNNI also VNNI, and with
// MINIGPT4_USE_BF16 also BF16.
#pragma once

#include <immintrin.h>

#include "half.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

constexpr int kBytes = 64, kLanes = 16;
// Sums that fit 32 registers.
constexpr int kTileRows = 4, kTileOutputs = 4, kFloatTileOutputs = 4;
constexpr int kOneRowOutputs = 4, kTwoRowOutputs = 4, kFloatAhead = 2048;
constexpr int kWideFloatRows = 8, kWideFloatVectors = 3;
constexpr int kWideRows = 4, kWideVectors = 2;

using Float = __m512;
using Integers = __m512i;
using Bytes = __m512i;

MINIGPT4_INLINE Float zero() { return _mm512_setzero_ps(); }
MINIGPT4_INLINE Float set(float x) { return _mm512_set1_ps(x); }
MINIGPT4_INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
MINIGPT4_INLINE void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
MINIGPT4_INLINE Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
MINIGPT4_INLINE Float divide(Float a, Float b) { return _mm512_div_ps(a, b); }
MINIGPT4_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
MINIGPT4_INLINE Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
MINIGPT4_INLINE Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
MINIGPT4_INLINE Float abs(Float a) { return _mm512_abs_ps(a); }
MINIGPT4_INLINE Float to_float(Integers a) { return _mm512_cvtepi32_ps(a); }
MINIGPT4_INLINE float sum(Float x) { return _mm512_reduce_add_ps(x); }
MINIGPT4_INLINE float max_lane(Float x) { return _mm512_reduce_max_ps(x); }

MINIGPT4_INLINE Float load_float16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

MINIGPT4_INLINE Float load_bfloat16(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

MINIGPT4_INLINE Float load_int8(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return to_float(_mm512_cvtepi8_epi32(bytes));
}

// The low and the high nibbles of so many bytes as there are lanes.
MINIGPT4_INLINE void load_nibbles(const uint8_t* p, Float& low, Float& high) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m512i wide = _mm512_cvtepu8_epi32(bytes);
  low = to_float(_mm512_and_si512(wide, _mm512_set1_epi32(15)));
  high = to_float(_mm512_srli_epi32(wide, 4));
}

// One float for all lanes, two for one half each, or four for a quarter each.
template <int kCount>
MINIGPT4_INLINE Float set_lanes(const float* p) {
  if (kCount == 1) return _mm512_set1_ps(*p);
  if (kCount == 2) {
    return _mm512_insertf32x8(_mm512_set1_ps(p[0]), _mm256_set1_ps(p[1]), 1);
  }
  const __m512i quarters = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return _mm512_permutexvar_ps(quarters, _mm512_castps128_ps512(_mm_loadu_ps(p)));
}

MINIGPT4_INLINE void round(Float x, int32_t* out) {
  _mm512_storeu_si512(out, _mm512_cvtps_epi32(x));
}

MINIGPT4_INLINE void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

MINIGPT4_INLINE Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
MINIGPT4_INLINE Bytes to_bytes(Float x) { return _mm512_castps_si512(x); }
MINIGPT4_INLINE Bytes exclusive_or(Bytes a, Bytes b) { return _mm512_xor_si512(a, b); }
MINIGPT4_INLINE Bytes low_nibbles(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
MINIGPT4_INLINE Bytes high_nibbles(Bytes x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
MINIGPT4_INLINE Integers no_integers() { return _mm512_setzero_si512(); }
MINIGPT4_INLINE Integers add(Integers a, Integers b) { return _mm512_add_epi32(a, b); }
MINIGPT4_INLINE void store_bytes(uint8_t* p, Bytes x) { _mm512_storeu_si512(p, x); }

// Four bytes in each lane.
MINIGPT4_INLINE Bytes repeat(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return _mm512_set1_epi32(four);
}

// Lane i of vector n ↔ lane n of vector i.
MINIGPT4_INLINE void transpose(Bytes (&x)[kLanes]) {
  Bytes pairs[kLanes], fours[kLanes], eights[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  // Vector 4i + j has numbers j, j + 4, j + 8 and j + 12 of four of them.
  for (int i = 0; i < kLanes; i += 4) {
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
      fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
    }
  }
  for (int i = 0; i < kLanes; i += 8) {
    for (int j = 0; j < 4; ++j) {
      eights[i + j] = _mm512_shuffle_i32x4(fours[i + j], fours[i + j + 4], 0x88);
      eights[i + j + 4] = _mm512_shuffle_i32x4(fours[i + j], fours[i + j + 4], 0xdd);
    }
  }
  for (int j = 0; j < 4; ++j) {
    x[j] = _mm512_shuffle_i32x4(eights[j], eights[j + 8], 0x88);
    x[j + 8] = _mm512_shuffle_i32x4(eights[j], eights[j + 8], 0xdd);
    x[j + 4] = _mm512_shuffle_i32x4(eights[j + 4], eights[j + 12], 0x88);
    x[j + 12] = _mm512_shuffle_i32x4(eights[j + 4], eights[j + 12], 0xdd);
  }
}

// sums += unsigned bytes · signed bytes, each four of them together. Two neighbours' products must
// not exceed 16 bits: 128 · 127 · 2 does not.
MINIGPT4_INLINE Integers dot(Integers sums, Bytes is_unsigned, Bytes is_signed) {
#if defined(MINIGPT4_USE_VNNI)
  return _mm512_dpbusd_epi32(sums, is_unsigned, is_signed);
#else
  const __m512i pairs = _mm512_maddubs_epi16(is_unsigned, is_signed);
  return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}

using NibbleSum = __m512i;
#if defined(MINIGPT4_USE_VNNI)
MINIGPT4_INLINE NibbleSum add_nibbles(NibbleSum sums, Bytes nibbles, Bytes row) {
  return dot(sums, nibbles, row);
}
MINIGPT4_INLINE Integers finish_nibbles(NibbleSum sums) { return sums; }
#else
// Sums of 16 bits: each add is at most 2 · 15 · 127, and a span has eight of them at most.
MINIGPT4_INLINE NibbleSum add_nibbles(NibbleSum sums, Bytes nibbles, Bytes row) {
  return _mm512_add_epi16(sums, _mm512_maddubs_epi16(nibbles, row));
}
MINIGPT4_INLINE Integers finish_nibbles(NibbleSum sums) {
  return _mm512_madd_epi16(sums, _mm512_set1_epi16(1));
}
#endif

#if defined(MINIGPT4_USE_BF16)
using Pairs = __m512bh;
MINIGPT4_INLINE Pairs load_pairs(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }

// Two products of bfloat16 in each lane of float32 sums. Denormal numbers count as zero in it.
MINIGPT4_INLINE Float dot(Float sums, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sums, a, b); }
#endif

struct Int8Vectors {
#if defined(MINIGPT4_USE_VNNI)
  // The instruction wants unsigned weights: each is 128 too much.
  static constexpr int kOffset = 128, kNumbers = kBytes, kPlaneBytes = kBytes;
  static constexpr bool kHolds16Bits = false;
  using Numbers = __m512i;
  MINIGPT4_INLINE Numbers load(const uint8_t* p) {
    return _mm512_xor_si512(load_bytes(p), _mm512_set1_epi8(-128));
  }
  MINIGPT4_INLINE Integers add(Integers sums, Numbers numbers, Bytes row) {
    return dot(sums, numbers, row);
  }
#else
  // Rows are of 16 bits, and weights become so: as fast as bytes are here, and twice as exact.
  static constexpr int kOffset = 0, kNumbers = kBytes / 2, kPlaneBytes = kBytes;
  static constexpr bool kHolds16Bits = true;
  using Numbers = __m512i;
  MINIGPT4_INLINE Numbers load(const uint8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  MINIGPT4_INLINE Integers add(Integers sums, Numbers numbers, Bytes row) {
    return _mm512_add_epi32(sums, _mm512_madd_epi16(numbers, row));
  }
#endif
};

// 2:4 values, and for each the place in 16 bytes of a row that it is multiplied by.
struct SparseVectors {
  struct Numbers {
    __m512i magnitudes, places;
    __mmask64 is_negative;
  };
  MINIGPT4_INLINE Numbers load(const uint8_t* values, const uint8_t* positions) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(positions));
    const __m512i words = _mm512_cvtepu8_epi32(packed);  // A byte is four values' positions.
    __m512i spread = _mm512_or_si512(words, _mm512_slli_epi32(words, 6));
    spread = _mm512_or_si512(spread, _mm512_slli_epi32(spread, 12));
    spread = _mm512_and_si512(spread, _mm512_set1_epi8(3));
    const __m512i starts = _mm512_set1_epi64(0x0c0c080804040000);
    const __m512i numbers = load_bytes(values);
    return {_mm512_abs_epi8(numbers), _mm512_or_si512(spread, starts),
            _mm512_movepi8_mask(numbers)};
  }
  MINIGPT4_INLINE Integers add(Integers sums, const Numbers& numbers, const uint8_t* row) {
    const __m512i first = _mm512_shuffle_epi8(load_bytes(row), numbers.places);
    const __m512i second = _mm512_shuffle_epi8(load_bytes(row + kBytes), numbers.places);
    const __m512i chosen = _mm512_mask_blend_epi32(0xcccc, first, second);
    const __m512i is_signed =
        _mm512_mask_sub_epi8(chosen, numbers.is_negative, no_integers(), chosen);
    return dot(sums, numbers.magnitudes, is_signed);
  }
};

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
