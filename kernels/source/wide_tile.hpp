// Tiles of products with integer weights whose lanes are outputs: some rows times a block of outputs.
//
// Owns   the order of a block and of a row, and the sums of a span. A format (formats.hpp) says how its
//        numbers come into that order.
#pragma once

#include "integer_rows.hpp"
#include "simd_amx.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

constexpr int64_t kChunk = 32;  // Numbers of a row that are summed up before the sums are widened.
constexpr int64_t kAhead = 4096;  // Bytes from what is read to what is fetched, of weights in order.

// The order of a row: in a chunk, four bytes of it are what one lane is multiplied by.
template <class Format>
struct WideOrder {
  static constexpr int kNumbers = kChunk, kPlaneBytes = kChunk * Format::kWideBytes;

  static int32_t correction(int32_t integer) { return Format::correction(integer); }

  static void arrange(const int32_t* integers, uint8_t* out) {
    for (int i = 0; i < kNumbers; i += Format::kPiece) {
      Format::template arrange_piece<Format::kPiece>(integers + i, out + i * Format::kWideBytes);
    }
  }
};

// A block of weights in order, and some rows.
template <class Format>
struct WideTile {
  static constexpr int kOutputs = kLanes * Format::kVectors;
  const uint8_t* weights;  // (chunks, bytes of a lane in a chunk / 4, kVectors) vectors, or packed.
  static constexpr int kMostRows = std::max(Format::kRows, 2 * kMatrixRows);
  const uint8_t* rows[kMostRows];
  const float* row_scales[kMostRows];
  const float* row_sums[kMostRows];
  const float* scales;   // (spans, kOutputs); null where a row of weights has one scale.
  const float* offsets;  // The same, of zero points; null where all numbers have Format::kOffset.
  int64_t spans;
  int64_t chunks;  // In a span.
  float* sums[kMostRows];  // (kOutputs) += …

  MINIGPT4_MEMBER Float scale(int64_t span, int c) const {
    return scales ? load(scales + span * kOutputs + c * kLanes) : set(1);
  }

  // A row's total with the sum of a span for the outputs from c · kLanes on, which have that scale.
  MINIGPT4_MEMBER Float add_span(Float total, Float value, Float scale, int64_t m, int64_t span,
                                 int c) const {
    if (offsets) {
      const Float offset = load(offsets + span * kOutputs + c * kLanes);
      value = multiply_add(set(-row_sums[m][span]), offset, value);
    } else if (Format::kOffset != 0 && scales) {
      value = add(value, set(-Format::kOffset * row_sums[m][span]));
    }
    return multiply_add(value, multiply(scale, set(row_scales[m][span])), total);
  }
};

// Numbers of a block that was put in order: each vector is read as it is.
template <class Format>
struct Arranged {
  static constexpr int kChunkBytes = kChunk * Format::kWideBytes * kLanes * Format::kVectors;
  MINIGPT4_INLINE void fetch_ahead(const uint8_t*, int) {}
  MINIGPT4_INLINE Bytes load(const uint8_t* weights, int v, int c) {
    return load_bytes(weights + (v * Format::kVectors + c) * kBytes);
  }
};

// Numbers that lie in order in memory: a vector has two of them in each byte.
template <class Format>
struct Packed {
  static constexpr int kChunkBytes = kChunk * kLanes * Format::kVectors / 2;
  MINIGPT4_INLINE void fetch_ahead(const uint8_t* weights, int v) {
    if (v % 2 == 0) prefetch(weights + v / 2 * Format::kVectors * kBytes + kAhead);
  }
  MINIGPT4_INLINE Bytes load(const uint8_t* weights, int v, int c) {
    return Format::part(load_bytes(weights + (v / 2 * Format::kVectors + c) * kBytes), v % 2);
  }
};

// The sums of a span, before they are floats: each lane is an output.
template <class Format, int Planes, int M>
struct WideSums {
  static constexpr int kVectors = Format::kVectors, kSteps = kChunk * Format::kWideBytes / 4;
  static constexpr int kPlaneBytes = WideOrder<Format>::kPlaneBytes;
  Integers whole[M][kVectors][Planes];

  MINIGPT4_MEMBER void start() {
    for (auto& row : whole) {
      for (auto& planes : row) {
        for (auto& each : planes) each = no_integers();
      }
    }
  }

  template <class Source>
  MINIGPT4_MEMBER void add_chunk(const uint8_t* weights, const uint8_t* const (&rows)[M]) {
    typename Format::Sum sums[M][kVectors][Planes];
    for (auto& row : sums) {
      for (auto& planes : row) {
        for (auto& each : planes) each = Format::start();
      }
    }
    MINIGPT4_UNROLL
    for (int v = 0; v < kSteps; ++v) {
      Source::fetch_ahead(weights, v);
      Bytes numbers[kVectors];
      for (int c = 0; c < kVectors; ++c) numbers[c] = Source::load(weights, v, c);
      for (int m = 0; m < M; ++m) {
        for (int p = 0; p < Planes; ++p) {
          const Bytes row = repeat(rows[m] + p * kPlaneBytes + 4 * v);
          for (int c = 0; c < kVectors; ++c) {
            sums[m][c][p] = Format::add_wide(sums[m][c][p], numbers[c], row);
          }
        }
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int c = 0; c < kVectors; ++c) {
        for (int p = 0; p < Planes; ++p) {
          whole[m][c][p] = add(whole[m][c][p], Format::finish(sums[m][c][p]));
        }
      }
    }
  }

  MINIGPT4_MEMBER Float finish(int m, int c) const {
    const Float value = to_float(whole[m][c][0]);
    if (Planes == 1) return value;
    return multiply_add(value, set(kPlaneBase), to_float(whole[m][c][Planes - 1]));
  }
};

template <class Source, class Format, int Planes, int M>
void add_wide_tile(const WideTile<Format>& tile) {
  using Sums = WideSums<Format, Planes, M>;
  constexpr int kVectors = Format::kVectors;
  Float totals[M][kVectors];
  for (int m = 0; m < M; ++m) {
    for (int c = 0; c < kVectors; ++c) totals[m][c] = load(tile.sums[m] + c * kLanes);
  }
  const uint8_t *weights = tile.weights, *rows[M];
  for (int m = 0; m < M; ++m) rows[m] = tile.rows[m];
  for (int64_t span = 0; span < tile.spans; ++span) {
    Sums sums;
    sums.start();
    for (int64_t chunk = 0; chunk < tile.chunks; ++chunk) {
      sums.template add_chunk<Source>(weights, rows);
      weights += Source::kChunkBytes;
      for (int m = 0; m < M; ++m) rows[m] += Planes * Sums::kPlaneBytes;
    }
    for (int c = 0; c < kVectors; ++c) {
      const Float scale = tile.scale(span, c);
      for (int m = 0; m < M; ++m) {
        totals[m][c] = tile.add_span(totals[m][c], sums.finish(m, c), scale, m, span, c);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int c = 0; c < kVectors; ++c) store(tile.sums[m] + c * kLanes, totals[m][c]);
  }
}

#if defined(MINIGPT4_USE_AMX)

// The same with one load for 16 rows. Their bytes lie evenly in memory, and whole sixteens can be read.
template <class Format, int Planes>
void add_matrix_tile(const WideTile<Format>& tile, int64_t count, int64_t depth) {
  constexpr int kVectors = Format::kVectors;
  const int64_t stride = tile.rows[1] - tile.rows[0];
  // The second sixteen: of rows, or of the same rows' second plane.
  const bool has_second = Planes == 2 || count > kMatrixRows;
  const int64_t second = Planes == 2 ? WideOrder<Format>::kPlaneBytes : kMatrixRows * stride;
  const uint8_t *weights = tile.weights, *rows = tile.rows[0];
  alignas(kBytes) int32_t sums[2][kVectors][kMatrixRows][kLanes];
  const auto load_sums = [&](int which, int c, int64_t m) MINIGPT4_LAMBDA {
    return to_float(load_bytes(reinterpret_cast<const uint8_t*>(sums[which][c][m])));
  };
  for (int64_t span = 0; span < tile.spans; ++span) {
    Matrices::start();
    for (int64_t k = 0; k < tile.chunks * kChunk; k += depth) {
      Matrices::add<kVectors>(rows, has_second ? rows + second : nullptr, stride, weights);
      rows += depth * Planes;
      weights += depth * kLanes * kVectors;
    }
    Matrices::store<kVectors>(&sums[0][0][0][0]);
    for (int c = 0; c < kVectors; ++c) {
      const Float scale = tile.scale(span, c);
      for (int64_t m = 0; m < count; ++m) {
        float* total = tile.sums[m] + c * kLanes;
        Float value = load_sums(m / kMatrixRows, c, m % kMatrixRows);
        if (Planes == 2) value = multiply_add(value, set(kPlaneBase), load_sums(1, c, m));
        store(total, tile.add_span(load(total), value, scale, m, span, c));
      }
    }
  }
}

#endif

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
