// The formats of integer weights: how a step of numbers is read, and the order of a row for it.
//
// Owns   the layouts in memory, which are those of the files: nothing is packed anew.
//
// A format has: kNumbers in a step, the bytes of its values, positions and of one plane of a row;
// load and add for a step; arrange, which puts a row's integers in order; the offset that each of
// its numbers has too much.
#pragma once

#include "integer_rows.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

struct Int8 : Int8Vectors {
  static constexpr int kValueBytes = kNumbers, kPositionBytes = 0;
  using Sum = Integers;

  MINIGPT4_INLINE Sum start() { return no_integers(); }
  MINIGPT4_INLINE Int8Vectors::Numbers load(const uint8_t* values, const uint8_t*) {
    return Int8Vectors::load(values);
  }
  template <class Numbers>
  MINIGPT4_INLINE void add(Sum& sum, const Numbers& numbers, const uint8_t* row) {
    sum = Int8Vectors::add(sum, numbers, row);
  }
  MINIGPT4_INLINE Integers finish(Sum sum) { return sum; }

  static void arrange(const int32_t* integers, uint8_t* out) {
    if (kHolds16Bits) {
      int16_t wide[kNumbers];
      for (int i = 0; i < kNumbers; ++i) wide[i] = static_cast<int16_t>(integers[i]);
      std::memcpy(out, wide, sizeof wide);
    } else {
      for (int i = 0; i < kNumbers; ++i) out[i] = static_cast<uint8_t>(integers[i]);
    }
  }

  static float offset(const Weight& weight, int64_t output, int64_t group) {
    if (weight.zero_points == nullptr) return kOffset;
    const auto* zero_points = reinterpret_cast<const int8_t*>(weight.zero_points);
    return static_cast<float>(kOffset + zero_points[output * weight.groups() + group]);
  }
};

// Byte k of a row holds number 2k in its low half and 2k + 1 in its high half, each 8 too much.
struct Int4 {
  static constexpr int kNumbers = 2 * kBytes, kValueBytes = kBytes, kPositionBytes = 0;
  static constexpr int kPlaneBytes = 2 * kBytes, kOffset = 8;
  static constexpr bool kHolds16Bits = false;
  struct Numbers {
    Bytes even, odd;
  };
  using Sum = NibbleSum;

  MINIGPT4_INLINE Sum start() { return no_integers(); }
  MINIGPT4_INLINE Numbers load(const uint8_t* values, const uint8_t*) {
    const Bytes bytes = load_bytes(values);
    return {low_nibbles(bytes), high_nibbles(bytes)};
  }
  MINIGPT4_INLINE void add(Sum& sum, const Numbers& numbers, const uint8_t* row) {
    sum = add_nibbles(sum, numbers.even, load_bytes(row));
    sum = add_nibbles(sum, numbers.odd, load_bytes(row + kBytes));
  }
  MINIGPT4_INLINE Integers finish(Sum sum) { return finish_nibbles(sum); }

  static void arrange(const int32_t* integers, uint8_t* out) {
    for (int i = 0; i < kBytes; ++i) {
      out[i] = static_cast<uint8_t>(integers[2 * i]);
      out[kBytes + i] = static_cast<uint8_t>(integers[2 * i + 1]);
    }
  }

  // Zero points are nibbles too: that of output n is in word (n / 8, group), at bits 4 (n % 8).
  static float offset(const Weight& weight, int64_t output, int64_t group) {
    if (weight.zero_points == nullptr) return kOffset;
    const uint8_t* word = weight.zero_points + 4 * (output / 8 * weight.groups() + group);
    const int place = static_cast<int>(output % 8);
    return static_cast<float>(word[place / 2] >> 4 * (place % 2) & 15);
  }
};

// Two of four neighbours are kept. A byte of positions holds four of them, 2 bits each.
struct Sparse24 : SparseVectors {
  static constexpr int kNumbers = 2 * kBytes, kValueBytes = kBytes, kPositionBytes = kBytes / 4;
  static constexpr int kPlaneBytes = 2 * kBytes, kOffset = 0;
  static constexpr bool kHolds16Bits = false;
  using Sum = Integers;

  MINIGPT4_INLINE Sum start() { return no_integers(); }
  MINIGPT4_INLINE void add(Sum& sum, const SparseVectors::Numbers& numbers, const uint8_t* row) {
    sum = SparseVectors::add(sum, numbers, row);
  }
  MINIGPT4_INLINE Integers finish(Sum sum) { return sum; }

  // Of each 32 numbers, the first 16 go to one vector and the others to the next, so that a
  // shuffle within 16 bytes reaches all numbers of a value's four.
  static void arrange(const int32_t* integers, uint8_t* out) {
    for (int i = 0; i < kNumbers; ++i) {
      const int place = i / 32 * 16 + i % 16 + (i % 32 < 16 ? 0 : kBytes);
      out[place] = static_cast<uint8_t>(integers[i]);
    }
  }

  static float offset(const Weight&, int64_t, int64_t) { return 0; }
};

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
