// Products with integer weights for few rows: each weight's row is read once, as it lies, and
// multiplied by all rows while it is in the first cache.
//
// Owns   the tiles of sums. A format (formats.hpp) says how a step of numbers is read and multiplied.
#pragma once

#include <algorithm>

#include "weight_scales.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

constexpr int64_t kFreeSpan = 256;  // Of 16-bit rows where the weight has no groups.

constexpr int kGroupOutputs = 4;  // Rows of weights that are read together.

// How many of them a tile of so many rows takes: its sums should fit the registers.
constexpr int outputs_for(int rows) { return rows == 1 ? kGroupOutputs : kTileOutputs; }

// Rows of weights against rows of activations, over one stretch of the inputs.
struct Tile {
  const uint8_t* values[kGroupOutputs];
  const uint8_t* positions[kGroupOutputs];
  const uint8_t* rows[kTileRows];
  const float* scales[kTileRows][kGroupOutputs];
  int64_t spans;
  int64_t steps;  // In a span.
  int64_t ahead;  // Bytes from what is read to what is read in the next tile.
  float* sums;    // sums[m * kGroupOutputs + n] += …
};

// The sums of a span, before they are floats. Everything in it is known to the compiler, which keeps
// them in registers.
template <class Format, int Planes, int M, int N>
struct TileSums {
  typename Format::Sum sums[M][N][Planes];

  MINIGPT4_MEMBER void start() {
    for (auto& row : sums) {
      for (auto& planes : row) {
        for (auto& each : planes) each = Format::start();
      }
    }
  }

  MINIGPT4_MEMBER void add_step(const uint8_t* const (&values)[N],
                                const uint8_t* const (&positions)[N],
                                const uint8_t* const (&rows)[M], int64_t step) {
    typename Format::Numbers numbers[N];
    for (int n = 0; n < N; ++n) {
      numbers[n] = Format::load(values[n] + step * Format::kValueBytes,
                                positions[n] + step * Format::kPositionBytes);
    }
    for (int m = 0; m < M; ++m) {
      const uint8_t* row = rows[m] + step * (Planes * Format::kPlaneBytes);
      for (int p = 0; p < Planes; ++p) {
        for (int n = 0; n < N; ++n) {
          Format::add(sums[m][n][p], numbers[n], row + p * Format::kPlaneBytes);
        }
      }
    }
  }

  MINIGPT4_MEMBER Float finish(int m, int n) const {
    const Float value = to_float(Format::finish(sums[m][n][0]));
    if (Planes == 1) return value;
    const Float low = to_float(Format::finish(sums[m][n][Planes - 1]));
    return multiply_add(value, set(kPlaneBase), low);
  }
};

// `Lanes` is how many spans share a step, which is then a tile's only one.
template <class Format, int Planes, int M, int Lanes>
void add_tile(const Tile& tile, int first) {
  constexpr int N = outputs_for(M);
  // So many steps at once as a cache line has, and one prefetch for them.
  constexpr int kUnrolled = Lanes > 1 ? 1 : std::max(1, 64 / Format::kValueBytes);
  Float totals[M][N];
  for (auto& row : totals) {
    for (Float& total : row) total = zero();
  }
  const uint8_t *values[N], *positions[N], *rows[M];
  for (int n = 0; n < N; ++n) {
    values[n] = tile.values[first + n], positions[n] = tile.positions[first + n];
  }
  for (int m = 0; m < M; ++m) rows[m] = tile.rows[m];
  const auto forward = [&](int64_t steps) MINIGPT4_LAMBDA {
    for (int n = 0; n < N; ++n) {
      values[n] += steps * Format::kValueBytes;
      positions[n] += steps * Format::kPositionBytes;
    }
    for (int m = 0; m < M; ++m) rows[m] += steps * (Planes * Format::kPlaneBytes);
  };
  for (int64_t span = 0; span < tile.spans; ++span) {
    TileSums<Format, Planes, M, N> tile_sums;
    tile_sums.start();
    int64_t left = Lanes > 1 ? 1 : tile.steps;
    for (; left >= kUnrolled; left -= kUnrolled) {
      for (int n = 0; n < N; ++n) prefetch(values[n] + tile.ahead);
      for (int i = 0; i < kUnrolled; ++i) tile_sums.add_step(values, positions, rows, i);
      forward(kUnrolled);
    }
    for (; left > 0; --left) {
      tile_sums.add_step(values, positions, rows, 0);
      forward(1);
    }
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) {
        const Float scale = set_lanes<Lanes>(tile.scales[m][first + n] + span * Lanes);
        totals[m][n] = multiply_add(tile_sums.finish(m, n), scale, totals[m][n]);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      tile.sums[m * kGroupOutputs + first + n] += sum(totals[m][n]);
    }
  }
}

// The work of one product that all threads share.
template <class Format, int Planes>
class NarrowProduct {
 public:
  using Order = Format;
  static constexpr int64_t kOutputsAtOnce = 4 * kGroupOutputs;

  NarrowProduct(const Product& product, const RoundedRows& rounded)
      : product_(product), weight_(product.weight), rounded_(rounded) {
    const RowLayout& layout = rounded.layout;
    is_grouped_ = layout.is_grouped;
    lanes_ = is_grouped_ && layout.span < Format::kNumbers ? Format::kNumbers / layout.span : 1;
  }

  static void run(const void* work, int64_t first, int64_t last) {
    const auto* mine = static_cast<const NarrowProduct*>(work);
    for (int64_t n = first; n < last; n += kGroupOutputs) {
      mine->multiply_block(n, std::min<int64_t>(kGroupOutputs, last - n));
    }
  }

 private:
  static constexpr int kRows = kTileRows / Planes;  // Each plane has sums of its own.

  // The scales of some outputs.
  struct Block {
    int64_t first, outputs;
    float *scales, *offsets;  // (outputs, scales of a row), or (outputs) without groups.
    float* products;          // (kRows, outputs, scales): of a row's scales with a weight's.
  };

  // A last block may have fewer than kGroupOutputs: its last output then fills the other places.
  void multiply_block(int64_t first, int64_t outputs) const {
    const int64_t scales = rounded_.layout.scales;
    float* memory =
        static_cast<float*>(scratch(1, sizeof(float) * kGroupOutputs * scales * (2 + kRows)));
    const Block block = {first, outputs, memory, memory + kGroupOutputs * scales,
                         memory + 2 * kGroupOutputs * scales};
    for (int64_t n = 0; n < kGroupOutputs; ++n) take_scales(block, n);
    for (int64_t m = 0; m < product_.rows;) {
      const int64_t left = product_.rows - m;
      const int64_t count = left >= kRows ? kRows : left >= 2 ? 2 : 1;
      multiply_tile(block, m, count);
      m += count;
    }
  }

  int64_t output_of(const Block& block, int64_t n) const {
    return block.first + std::min(n, block.outputs - 1);
  }

  void take_scales(const Block& block, int64_t n) const {
    const RowLayout& layout = rounded_.layout;
    const int64_t output = output_of(block, n);
    if (is_grouped_) {
      load_scales<Format>(weight_, output, layout.scales, block.scales + n * layout.scales, block.offsets + n * layout.scales);
    } else {
      block.scales[n] = load_one(weight_.scale, output);
      block.offsets[n] = Format::offset(weight_, output, 0);
    }
  }

  void multiply_tile(const Block& block, int64_t m, int64_t count) const {
    float sums[kTileRows * kGroupOutputs] = {};
    Tile tile = {};
    tile.ahead = kGroupOutputs * weight_.value_stride;
    tile.sums = sums;
    float excess[kTileRows][kGroupOutputs];
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t n = 0; n < kGroupOutputs; ++n) {
        if (is_grouped_) {
          float* products = block.products + (i * kGroupOutputs + n) * rounded_.layout.scales;
          excess[i][n] = weigh(block, n, m + i, products);
          tile.scales[i][n] = products;
        } else {
          excess[i][n] = block.offsets[n] * rounded_.sum(m + i)[0];
          tile.scales[i][n] = rounded_.scale(m + i);
        }
      }
    }
    const int64_t whole = weight_.inputs / Format::kNumbers;
    const int64_t span_steps = lanes_ > 1 ? 1 : rounded_.layout.span / Format::kNumbers;
    const int64_t spans = span_steps == 0 ? 0 : whole / span_steps;
    add(tile, block, m, count, 0, spans, span_steps);
    // A last span may be shorter, and a last step too.
    skip(tile, count, spans);
    const int64_t rest = whole - spans * span_steps;
    if (rest > 0) add(tile, block, m, count, whole - rest, 1, rest);
    if (weight_.inputs % Format::kNumbers != 0) add_rest(tile, block, m, count, whole);
    store_tile(block, m, count, sums, excess);
  }

  // The products of a row's scales with those of a weight, and what the offsets take from the result.
  float weigh(const Block& block, int64_t n, int64_t m, float* products) const {
    const int64_t count = rounded_.layout.scales;
    const float *row = rounded_.scale(m), *sums = rounded_.sum(m);
    const float *scales = block.scales + n * count, *offsets = block.offsets + n * count;
    const bool is_constant = weight_.zero_points == nullptr;
    Float total = zero();
    for (int64_t s = 0; s < count; s += kLanes) {
      const Float product = multiply(load(row + s), load(scales + s));
      store(products + s, product);
      Float excess = load(sums + s);
      if (!is_constant) excess = multiply(excess, load(offsets + s));
      total = multiply_add(product, excess, total);
    }
    return is_constant ? sum(total) * Format::kOffset : sum(total);
  }

  void skip(Tile& tile, int64_t count, int64_t spans) const {
    if (rounded_.layout.scales == 1) return;
    for (int64_t i = 0; i < count; ++i) {
      for (const float*& scales : tile.scales[i]) scales += spans * lanes_;
    }
  }

  void at(Tile& tile, const Block& block, int64_t m, int64_t count, int64_t step) const {
    for (int64_t n = 0; n < kGroupOutputs; ++n) {
      const int64_t output = output_of(block, n);
      tile.values[n] =
          weight_.values + output * weight_.value_stride + step * Format::kValueBytes;
      tile.positions[n] =
          weight_.positions + output * weight_.position_stride + step * Format::kPositionBytes;
    }
    for (int64_t i = 0; i < count; ++i) {
      tile.rows[i] = rounded_.row(m + i) + step * (Planes * Format::kPlaneBytes);
    }
  }

  void add(Tile& tile, const Block& block, int64_t m, int64_t count, int64_t step, int64_t spans,
           int64_t steps) const {
    at(tile, block, m, count, step);
    tile.spans = spans, tile.steps = steps;
    add_rows(tile, count);
  }

  // The inputs behind the last whole step: the weight's are copied, lest bytes behind its end be
  // read, and stand before zeros.
  void add_rest(Tile& tile, const Block& block, int64_t m, int64_t count, int64_t step) const {
    uint8_t values[kGroupOutputs][Format::kValueBytes] = {};
    uint8_t positions[kGroupOutputs][Format::kPositionBytes + 1] = {};
    const int64_t rest = weight_.inputs - step * Format::kNumbers;
    at(tile, block, m, count, step);
    for (int n = 0; n < kGroupOutputs; ++n) {
      std::memcpy(values[n], tile.values[n], rest * Format::kValueBytes / Format::kNumbers);
      tile.values[n] = values[n];
      if (Format::kPositionBytes == 0) continue;
      std::memcpy(positions[n], tile.positions[n],
                  rest * Format::kPositionBytes / Format::kNumbers);
      tile.positions[n] = positions[n];
    }
    tile.spans = tile.steps = 1;
    add_rows(tile, count);
  }

  void add_rows(const Tile& tile, int64_t count) const {
    if (count == kRows) return add_lanes<kRows>(tile);
    if (count == 2) return add_lanes<2>(tile);
    add_lanes<1>(tile);
  }

  template <int M>
  void add_lanes(const Tile& tile) const {
    if constexpr (Format::kNumbers >= 64) {
      if (lanes_ == 2) return add_tiles<M, 2>(tile);
    }
    if constexpr (Format::kNumbers >= 128) {
      if (lanes_ == 4) return add_tiles<M, 4>(tile);
    }
    add_tiles<M, 1>(tile);
  }

  template <int M, int Lanes>
  static void add_tiles(const Tile& tile) {
    for (int n = 0; n < kGroupOutputs; n += outputs_for(M)) {
      add_tile<Format, Planes, M, Lanes>(tile, n);
    }
  }

  void store_tile(const Block& block, int64_t m, int64_t count, const float* sums,
                  const float (&excess)[kTileRows][kGroupOutputs]) const {
    for (int64_t n = 0; n < block.outputs; ++n) {
      const int64_t output = block.first + n;
      const float bias = product_.bias.data == nullptr ? 0 : load_one(product_.bias, output);
      for (int64_t i = 0; i < count; ++i) {
        float value = sums[i * kGroupOutputs + n] - excess[i][n];
        if (!is_grouped_) value *= block.scales[n];
        store_one(product_.y, product_.x.type, (m + i) * weight_.outputs + output, value + bias);
      }
    }
  }

  const Product& product_;
  const Weight& weight_;
  const RoundedRows& rounded_;
  bool is_grouped_;
  int lanes_;
};

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
