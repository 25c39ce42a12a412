// The formats of integer weights: how a step of numbers is read, and the order of a row for it.
//
// Owns   the layouts in memory: those of the files, but for 4 bits.
//
// A format has: kNumbers in a step and the bytes of its values; the offset that each of its numbers has
// too much, and of what in a row the sum is times that offset (correction).
// For few rows (narrow_product.hpp): the bytes of positions and of one plane of a row; load for a step;
// add, which multiplies it; arrange, which puts a row's integers in order.
// One that kIsWide is for many rows (wide_product.hpp) from kWideFrom on: it has a tile's kVectors of
// outputs and kRows; a piece of kPiece of a row's integers in order; add_wide; and arrange_step, which
// turns a step of kLanes outputs so that an output is a lane, or it kIsOrdered so in memory.
#pragma once

#include "integer_rows.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

struct Int8 : Int8Vectors {
  static constexpr int kValueBytes = kNumbers, kPositionBytes = 0;
  using Sum = Integers;

  MINIGPT4_INLINE Sum start() { return no_integers(); }
  MINIGPT4_INLINE Numbers load(const uint8_t* values, const uint8_t*) {
    return Int8Vectors::load(values);
  }
  MINIGPT4_INLINE void add(Sum& sum, const Numbers& numbers, const uint8_t* row) {
    sum = Int8Vectors::add(sum, numbers, load_bytes(row));
  }
  MINIGPT4_INLINE Integers finish(Sum sum) { return sum; }

  static constexpr bool kIsWide = true, kIsOrdered = false;
  static constexpr int kWideFrom = 17, kWideBytes = kHolds16Bits ? 2 : 1, kPiece = 4;
  static constexpr int kVectors = kWideVectors, kRows = kWideRows;
  MINIGPT4_INLINE Sum add_wide(Sum sum, Bytes numbers, Bytes row) {
    return Int8Vectors::add(sum, numbers, row);
  }

  MINIGPT4_INLINE void arrange_step(const uint8_t* const* values, const uint8_t* const*,
                                    uint8_t* out) {
    Bytes vectors[kLanes];
    for (int n = 0; n < kLanes; ++n) vectors[n] = Int8Vectors::load(values[n]);
    transpose(vectors);
    for (int i = 0; i < kLanes; ++i) store_bytes(out + i * kVectors * kBytes, vectors[i]);
  }

  template <int kCount>
  static void arrange_piece(const int32_t* integers, uint8_t* out) {
    if (kHolds16Bits) {
      int16_t wide[kCount];
      for (int i = 0; i < kCount; ++i) wide[i] = static_cast<int16_t>(integers[i]);
      std::memcpy(out, wide, sizeof wide);
    } else {
      for (int i = 0; i < kCount; ++i) out[i] = static_cast<uint8_t>(integers[i]);
    }
  }
  static void arrange(const int32_t* integers, uint8_t* out) {
    arrange_piece<kNumbers>(integers, out);
  }

  static int32_t correction(int32_t integer) { return integer; }
  static float offset(const Weight& weight, int64_t output, int64_t group) {
    if (weight.zero_points == nullptr) return kOffset;
    const auto* zero_points = reinterpret_cast<const int8_t*>(weight.zero_points);
    return static_cast<float>(kOffset + zero_points[output * weight.groups() + group]);
  }
};

// 8-bit weights and rows where bytes are multiplied unsigned by signed: |x| · (w ^ s), s being all
// ones where x is negative. As w ^ -1 is -w - 1, the sum lacks the magnitudes of the negative x.
struct Int8Magnitudes {
  static constexpr int kNumbers = kBytes, kValueBytes = kBytes, kPositionBytes = 0;
  static constexpr int kPlaneBytes = 2 * kBytes, kOffset = -1;
  static constexpr bool kHolds16Bits = false, kIsWide = false, kIsOrdered = false;
  using Numbers = Bytes;
  using Sum = Integers;

  MINIGPT4_INLINE Sum start() { return no_integers(); }
  MINIGPT4_INLINE Numbers load(const uint8_t* values, const uint8_t*) {
    return load_bytes(values);
  }
  MINIGPT4_INLINE void add(Sum& sum, const Numbers& numbers, const uint8_t* row) {
    sum = dot(sum, load_bytes(row), exclusive_or(numbers, load_bytes(row + kBytes)));
  }
  MINIGPT4_INLINE Integers finish(Sum sum) { return sum; }

  static void arrange(const int32_t* integers, uint8_t* out) {
    for (int i = 0; i < kBytes; ++i) {
      const int32_t sign = integers[i] >> 31;
      out[i] = static_cast<uint8_t>((integers[i] ^ sign) - sign);
      out[kBytes + i] = static_cast<uint8_t>(sign);
    }
  }
  static int32_t correction(int32_t integer) { return std::max(-integer, 0); }
  static float offset(const Weight&, int64_t, int64_t) { return kOffset; }
};

// 4-bit weights lie in order, 16 outputs side by side: for each 8 inputs, 4 bytes of each output. Byte
// i of them holds number 2i in its low half and 2i + 1 in its high half, each 8 too much.
struct Int4 {
  static constexpr int kNumbers = 32, kValueBytes = 16;
  static constexpr int kOffset = 8;
  static constexpr bool kHolds16Bits = false, kIsWide = true, kIsOrdered = true;
  static constexpr int kWideFrom = 1, kWideBytes = 1, kPiece = 8;
  static constexpr int kVectors = kOrderedOutputs / kLanes;
  static constexpr int kRows = std::max(1, kWideRows * kWideVectors / kVectors);
  using Sum = NibbleSum;

  MINIGPT4_INLINE Sum start() { return no_integers(); }
  MINIGPT4_INLINE Integers finish(Sum sum) { return finish_nibbles(sum); }
  MINIGPT4_INLINE Sum add_wide(Sum sum, Bytes numbers, Bytes row) {
    return add_nibbles(sum, numbers, row);
  }

  // The even numbers, then the odd ones.
  MINIGPT4_INLINE Bytes part(Bytes packed, int part) {
    return part == 0 ? low_nibbles(packed) : high_nibbles(packed);
  }

  template <int kCount>
  static void arrange_piece(const int32_t* integers, uint8_t* out) {
    for (int i = 0; i < kCount / 2; ++i) {
      out[i] = static_cast<uint8_t>(integers[2 * i]);
      out[kCount / 2 + i] = static_cast<uint8_t>(integers[2 * i + 1]);
    }
  }

  static int32_t correction(int32_t integer) { return integer; }
};

// Two of four neighbours are kept. A byte of positions holds four of them, 2 bits each.
struct Sparse24 : SparseVectors {
  static constexpr int kNumbers = 2 * kBytes, kValueBytes = kBytes, kPositionBytes = kBytes / 4;
  static constexpr int kPlaneBytes = 2 * kBytes, kOffset = 0;
  static constexpr bool kHolds16Bits = false, kIsWide = false, kIsOrdered = false;
  using Sum = Integers;

  MINIGPT4_INLINE Sum start() { return no_integers(); }
  MINIGPT4_INLINE void add(Sum& sum, const Numbers& numbers, const uint8_t* row) {
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

  static int32_t correction(int32_t integer) { return integer; }
  static float offset(const Weight&, int64_t, int64_t) { return 0; }
};

// The same weights for many rows: put in order, they are plain 8-bit ones with zeros.
struct Sparse24InOrder : Int8 {
  static constexpr int kNumbers = 2 * kBytes, kValueBytes = kBytes, kPositionBytes = kBytes / 4;
  static constexpr int kWideFrom = 33;

  static void arrange_step(const uint8_t* const* values, const uint8_t* const* positions,
                           uint8_t* out) {
    uint8_t dense[kLanes][kNumbers] = {};
    for (int n = 0; n < kLanes; ++n) {
      for (int i = 0; i < kValueBytes; ++i) {
        const int position = positions[n][i / 4] >> 2 * (i % 4) & 3;
        dense[n][i / 2 * 4 + position] = values[n][i];
      }
    }
    constexpr int kStepBytes = Int8::kNumbers * kWideBytes * kLanes * kVectors;
    for (int k = 0; k < kNumbers; k += Int8::kNumbers, out += kStepBytes) {
      const uint8_t* starts[kLanes];
      for (int n = 0; n < kLanes; ++n) starts[n] = dense[n] + k;
      Int8::arrange_step(starts, nullptr, out);
    }
  }
};

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
