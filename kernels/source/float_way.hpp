// How float weights and rows are read and multiplied, a vector at a time.
//
// Owns   the two ways: all widened to float32; or, where the level can, bfloat16 by bfloat16 as it is.
#pragma once

#include "integer_rows.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

// Weights of any type by rows of float32.
template <Number type>
struct Widened {
  using Row = float;
  using Vector = Float;
  static constexpr Number kType = type;
  static constexpr int kSize = type == Number::float32 ? 4 : 2, kNumbers = kLanes;

  MINIGPT4_INLINE Vector load_weight(const uint8_t* p) {
    if (type == Number::float32) return load(reinterpret_cast<const float*>(p));
    const auto* bits = reinterpret_cast<const uint16_t*>(p);
    return type == Number::bfloat16 ? load_bfloat16(bits) : load_float16(bits);
  }
  MINIGPT4_INLINE Vector load_row(const Row* p) { return load(p); }
  MINIGPT4_INLINE Float add(Float sums, Vector weights, Vector row) {
    return multiply_add(weights, row, sums);
  }
};

#if defined(MINIGPT4_USE_BF16)
// Weights of bfloat16 by rows of bfloat16.
struct Paired {
  using Row = uint16_t;
  using Vector = Pairs;
  static constexpr Number kType = Number::bfloat16;
  static constexpr int kSize = 2, kNumbers = 2 * kLanes;

  MINIGPT4_INLINE Vector load_weight(const uint8_t* p) {
    return load_pairs(reinterpret_cast<const uint16_t*>(p));
  }
  MINIGPT4_INLINE Vector load_row(const Row* p) { return load_pairs(p); }
  MINIGPT4_INLINE Float add(Float sums, Vector weights, Vector row) {
    return dot(sums, weights, row);
  }
};
#endif

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
