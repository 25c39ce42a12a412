// The formats of integer weights: how a step of numbers is read, and the order of a row for it.
//
// Owns   the layouts in memory, which are those of the files: nothing is packed anew.
//
// A format has: kNumbers in a step, the bytes of its values, positions and of one plane of a row;
// load for a step; part and add for each of the kParts in which it is multiplied; arrange, which puts
// a row's integers in order; the offset that each of its numbers has too much.
#pragma once

#include "integer_rows.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

struct Int8 : Int8Vectors {
  static constexpr int kValueBytes = kNumbers, kPositionBytes = 0, kParts = 1;
  using Part = Numbers;
  using Sum = Integers;

  MINIGPT4_INLINE Sum start() { return no_integers(); }
  MINIGPT4_INLINE Numbers load(const uint8_t* values, const uint8_t*) {
    return Int8Vectors::load(values);
  }
  MINIGPT4_INLINE Part part(const Numbers& numbers, int) { return numbers; }
  MINIGPT4_INLINE void add(Sum& sum, const Part& part, const uint8_t* row) {
    sum = Int8Vectors::add(sum, part, row);
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
  static constexpr int kPlaneBytes = 2 * kBytes, kOffset = 8, kParts = 2;
  static constexpr bool kHolds16Bits = false;
  using Numbers = Bytes;
  using Part = Bytes;
  using Sum = NibbleSum;

  MINIGPT4_INLINE Sum start() { return no_integers(); }
  MINIGPT4_INLINE Numbers load(const uint8_t* values, const uint8_t*) {
    return load_bytes(values);
  }
  // The even numbers, then the odd ones.
  MINIGPT4_INLINE Part part(const Numbers& numbers, int part) {
    return part == 0 ? low_nibbles(numbers) : high_nibbles(numbers);
  }
  MINIGPT4_INLINE void add(Sum& sum, const Part& part, const uint8_t* row) {
    sum = add_nibbles(sum, part, load_bytes(row));
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
  static constexpr int kPlaneBytes = 2 * kBytes, kOffset = 0, kParts = 1;
  static constexpr bool kHolds16Bits = false;
  using Part = Numbers;
  using Sum = Integers;

  MINIGPT4_INLINE Sum start() { return no_integers(); }
  MINIGPT4_INLINE const Part& part(const Numbers& numbers, int) { return numbers; }
  MINIGPT4_INLINE void add(Sum& sum, const Part& part, const uint8_t* row) {
    sum = SparseVectors::add(sum, part, row);
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
