// Registers of 16 rows by 64 bytes: AMX, with its products of signed by unsigned bytes.
//
// Owns   what each register holds: 0 to 3 sums, 4 and 5 rows, 6 and 7 weights.
#pragma once

#include "simd.hpp"

#if defined(MINIGPT4_USE_AMX)
#include <immintrin.h>

#include <atomic>
#endif

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

#if defined(MINIGPT4_USE_AMX)

constexpr int kMatrixRows = 16;

// The registers' shapes, as the processor reads them.
struct alignas(64) MatrixShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  constexpr explicit MatrixShapes(int depth) {
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? depth : 64);
      rows[i] = static_cast<uint8_t>(i >= 6 ? depth / 4 : kMatrixRows);
    }
  }
};

// While one lives, the registers of its thread are set up for steps of `depth` numbers of a row: 32
// or 64. With 0 they stay as they are.
class Matrices {
 public:
  explicit Matrices(int64_t depth) : is_used_(depth > 0) {
    // Constants: GCC 12 does not know that the instruction reads all of it.
    static constexpr MatrixShapes half(32), whole(64);
    if (is_used_) _tile_loadconfig(depth == 64 ? &whole : &half);
  }
  ~Matrices() {
    if (is_used_) _tile_release();
  }
  Matrices(const Matrices&) = delete;
  Matrices& operator=(const Matrices&) = delete;

  MINIGPT4_INLINE void start() {
    // GCC 12 does not know either that loads read memory: what is stored before stays before.
    std::atomic_signal_fence(std::memory_order_seq_cst);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  // One step: 16 rows, and 16 others if `second` is not null, by one or two vectors of outputs.
  template <int kVectors>
  MINIGPT4_INLINE void add(const uint8_t* first, const uint8_t* second, int64_t stride,
                           const uint8_t* weights) {
    _tile_loadd(4, first, stride);
    _tile_loadd(6, weights, kVectors * kBytes);
    _tile_dpbsud(0, 4, 6);
    if constexpr (kVectors == 2) {
      _tile_loadd(7, weights + kBytes, kVectors * kBytes);
      _tile_dpbsud(1, 4, 7);
    }
    if (second == nullptr) return;
    _tile_loadd(5, second, stride);
    _tile_dpbsud(2, 5, 6);
    if constexpr (kVectors == 2) _tile_dpbsud(3, 5, 7);
  }

  // (2, kVectors, 16, 16)
  template <int kVectors>
  MINIGPT4_INLINE void store(int32_t* sums) {
    constexpr int kNumbers = kMatrixRows * kLanes;
    _tile_stored(0, sums, kBytes);
    if constexpr (kVectors == 2) _tile_stored(1, sums + kNumbers, kBytes);
    _tile_stored(2, sums + kVectors * kNumbers, kBytes);
    if constexpr (kVectors == 2) _tile_stored(3, sums + 3 * kNumbers, kBytes);
  }

 private:
  bool is_used_;
};

#else

constexpr int kMatrixRows = 0;

struct Matrices {
  explicit Matrices(int64_t) {}
};

#endif

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
