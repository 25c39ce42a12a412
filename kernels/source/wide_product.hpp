// Products with integer weights whose lanes are outputs. For many rows a block of outputs is put in
// order once, and then multiplied by one row after another; weights that lie in order are multiplied
// by few rows as they lie.
//
// Owns   the way of a product through blocks and strips of weights, and of a block's scales.
#pragma once

#include <algorithm>

#include "weight_scales.hpp"
#include "wide_tile.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

constexpr int64_t kStripBytes = 16384;  // Of a block in order: it stays in the first cache.

// The work of one product that all threads share.
template <class Format, int Planes>
class WideProduct {
 public:
  using Order = WideOrder<Format>;
  using Tile = WideTile<Format>;
  static constexpr int64_t kBlockOutputs = Tile::kOutputs, kOutputsAtOnce = kBlockOutputs;

  WideProduct(const Product& product, const RoundedRows& rounded)
      : product_(product), weight_(product.weight), rounded_(rounded) {
    const RowLayout& layout = rounded.layout;
    is_grouped_ = layout.is_grouped;
    has_offsets_ = weight_.zero_points || weight_.ordered_zero_points.data;
    spans_ = round_up(layout.scales, kLanes);  // The turned scales are whole vectors too.
    // Whole steps and spans.
    const int64_t strip = kStripBytes / (kBlockOutputs * Format::kWideBytes);
    const int64_t part = std::max<int64_t>(Format::kNumbers, is_grouped_ ? layout.span : kFreeSpan);
    strip_ = std::max(part, strip / part * part);
    if (product.rows >= kMatrixRows && kMatrixRows > 0) {
      matrix_depth_ = Planes == 1 && layout.span % (2 * kChunk) == 0 ? 2 * kChunk : kChunk;
    }
  }

  static void run(const void* work, int64_t first, int64_t last) {
    const auto* mine = static_cast<const WideProduct*>(work);
    const Matrices matrices(mine->matrix_depth_);
    for (int64_t n = first; n < last; n += kBlockOutputs) {
      mine->multiply_block(n, std::min(kBlockOutputs, last - n));
    }
  }

 private:
  static constexpr int kRows = Planes == 1 ? Format::kRows : (Format::kRows + 1) / 2;
  static constexpr int64_t kMatrixTileRows = Planes == 1 ? 2 * kMatrixRows : kMatrixRows;

  struct Block {
    int64_t first, outputs;
    float *scales, *offsets;  // (spans_, kBlockOutputs), or (kBlockOutputs) without groups.
    float* sums;              // (rows, kBlockOutputs)
    uint8_t* weights;         // A strip of it in order.
  };

  void multiply_block(int64_t first, int64_t outputs) const {
    const int64_t rows = product_.rows;
    const int64_t weight_bytes = strip_ * kBlockOutputs * Format::kWideBytes;
    const int64_t floats = kBlockOutputs * (2 * spans_ + rows);
    auto* memory = static_cast<uint8_t*>(scratch(1, weight_bytes + sizeof(float) * floats));
    Block block = {first, outputs, nullptr, nullptr, nullptr, memory};
    block.scales = reinterpret_cast<float*>(memory + weight_bytes);
    block.offsets = block.scales + kBlockOutputs * spans_;
    block.sums = block.offsets + kBlockOutputs * spans_;
    std::memset(block.sums, 0, sizeof(float) * rows * kBlockOutputs);
    if constexpr (Format::kIsOrdered) {
      take_ordered_scales(block);
      if (rows <= kRows) {
        add_strip<Packed<Format>>(block, packed(block, 0), 0, weight_.inputs);
        return store_block(block);
      }
    } else {
      take_scales(block);
    }
    for (int64_t start = 0; start < weight_.inputs; start += strip_) {
      const int64_t end = std::min(weight_.inputs, start + strip_);
      if constexpr (Format::kIsOrdered) {
        widen(block, start, end);
      } else {
        arrange(block, start, end);
      }
      add_strip<Arranged<Format>>(block, block.weights, start, end);
    }
    store_block(block);
  }

  void take_ordered_scales(const Block& block) const {
    const int64_t count = weight_.groups() * kBlockOutputs, first = block.first * weight_.groups();
    load_row(weight_.scale, first, count, block.scales);
    if (has_offsets_) load_row(weight_.ordered_zero_points, first, count, block.offsets);
  }

  // Where the numbers from input k on lie.
  const uint8_t* packed(const Block& block, int64_t k) const {
    return weight_.values + (block.first * weight_.inputs + k * kBlockOutputs) / 2;
  }

  // The weights of a strip, each number in a byte of its own.
  void widen(const Block& block, int64_t start, int64_t end) const {
    using Source = Packed<Format>;
    const uint8_t* from = packed(block, start);
    uint8_t* out = block.weights;
    for (int64_t k = start; k < end; k += kChunk, from += Source::kChunkBytes) {
      for (int v = 0; v < kChunk / 4; ++v) {
        Source::fetch_ahead(from, v);
        for (int c = 0; c < Format::kVectors; ++c, out += kBytes) {
          store_bytes(out, Source::load(from, v, c));
        }
      }
    }
  }

  // Scales of neighbouring outputs side by side.
  void take_scales(const Block& block) const {
    std::memset(block.scales, 0, sizeof(float) * 2 * kBlockOutputs * spans_);
    if (!is_grouped_) {
      for (int64_t n = 0; n < block.outputs; ++n) {
        block.scales[n] = load_one(weight_.scale, block.first + n);
        block.offsets[n] = Format::offset(weight_, block.first + n, 0);
      }
      return;
    }
    float* memory = static_cast<float*>(scratch(2, sizeof(float) * 2 * kLanes * spans_));
    std::memset(memory, 0, sizeof(float) * 2 * kLanes * spans_);
    for (int64_t c = 0; c < Format::kVectors; ++c) {
      const int64_t count = std::min<int64_t>(kLanes, block.outputs - c * kLanes);
      for (int64_t n = 0; n < count; ++n) {
        load_scales<Format>(weight_, block.first + c * kLanes + n, rounded_.layout.scales,
                            memory + n * spans_, memory + (kLanes + n) * spans_);
      }
      turn(memory, block.scales + c * kLanes);
      if (has_offsets_) turn(memory + kLanes * spans_, block.offsets + c * kLanes);
    }
  }

  // (kLanes, spans_) → (spans_, kBlockOutputs)
  void turn(const float* from, float* to) const {
    for (int64_t s = 0; s < spans_; s += kLanes) {
      Bytes vectors[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        vectors[i] = load_bytes(reinterpret_cast<const uint8_t*>(from + i * spans_ + s));
      }
      transpose(vectors);
      for (int i = 0; i < kLanes; ++i) {
        store_bytes(reinterpret_cast<uint8_t*>(to + (s + i) * kBlockOutputs), vectors[i]);
      }
    }
  }

  // Where a step of kLanes outputs is read: as it is stored, or for what is not whole as a copy.
  struct Step {
    const uint8_t *values[kLanes], *positions[kLanes];
    uint8_t value_copies[kLanes][Format::kValueBytes];
    uint8_t position_copies[kLanes][Format::kPositionBytes + 1];
  };

  // The weights of a strip, each step of each kLanes outputs put in order. Zeros fill up a chunk.
  void arrange(const Block& block, int64_t start, int64_t end) const {
    constexpr int kStepBytes = Format::kNumbers * Format::kWideBytes * kBlockOutputs;
    // What is read next: the next strip, or the first one of the next block.
    const int64_t ahead = end < weight_.inputs ? bytes_of(end - start)
                                               : kBlockOutputs * weight_.value_stride - bytes_of(start);
    const int64_t padded = start + round_up(end - start, std::max<int64_t>(kChunk, Format::kNumbers));
    Step step;
    for (int c = 0; c < Format::kVectors; ++c) {
      const int64_t first = block.first + c * kLanes, last = block.first + block.outputs;
      uint8_t* out = block.weights + c * kBytes;
      for (int64_t k = start; k < padded; k += Format::kNumbers, out += kStepBytes) {
        const int64_t there = std::clamp<int64_t>(end - k, 0, Format::kNumbers);
        for (int n = 0; n < kLanes; ++n) {
          find(step, n, first + n, k, first + n < last ? there : 0, ahead);
        }
        Format::arrange_step(step.values, step.positions, out);
      }
    }
  }

  // An output's numbers from k on, of which `there` are stored: nothing behind them is read.
  void find(Step& step, int n, int64_t output, int64_t k, int64_t there, int64_t ahead) const {
    step.values[n] = step.value_copies[n];
    step.positions[n] = step.position_copies[n];
    if (there < Format::kNumbers) {
      std::memset(step.value_copies[n], 0, Format::kValueBytes);
      std::memset(step.position_copies[n], 0, Format::kPositionBytes);
      if (there == 0) return;
    }
    const uint8_t* values = weight_.values + output * weight_.value_stride + bytes_of(k);
    const uint8_t* positions = weight_.positions + output * weight_.position_stride +
                               k * Format::kPositionBytes / Format::kNumbers;
    if (there == Format::kNumbers) {
      prefetch(values + ahead);
      step.values[n] = values;
      step.positions[n] = positions;
      return;
    }
    std::memcpy(step.value_copies[n], values, bytes_of(there));
    if (Format::kPositionBytes == 0) return;
    std::memcpy(step.position_copies[n], positions,
                there * Format::kPositionBytes / Format::kNumbers);
  }

  static int64_t bytes_of(int64_t numbers) {
    return numbers * Format::kValueBytes / Format::kNumbers;
  }

  template <class Source>
  void add_strip(const Block& block, const uint8_t* weights, int64_t start, int64_t end) const {
    const RowLayout& layout = rounded_.layout;
    const int64_t chunks = round_up(end - start, kChunk) / kChunk;
    const bool is_one = layout.scales == 1;
    const int64_t span_chunks = is_one ? chunks : layout.span / kChunk;
    Tile tile = {};
    tile.weights = weights;
    tile.chunks = span_chunks;
    const int64_t first_span = is_one ? 0 : start / layout.span;
    if (is_grouped_) {
      tile.scales = block.scales + first_span * kBlockOutputs;
      if (has_offsets_) tile.offsets = block.offsets + first_span * kBlockOutputs;
    }
    for (int64_t m = 0; m < product_.rows;) {
      const int64_t left = product_.rows - m;
      const int64_t count = rows_at_once(left);
      for (int64_t i = 0; i < count; ++i) {
        tile.rows[i] = rounded_.row(m + i) + start / kChunk * (Planes * Order::kPlaneBytes);
        tile.row_scales[i] = rounded_.scale(m + i) + first_span;
        tile.row_sums[i] = rounded_.sum(m + i) + (is_grouped_ ? first_span : 0);
        tile.sums[i] = block.sums + (m + i) * kBlockOutputs;
      }
      tile.spans = chunks / span_chunks;
      multiply_tile<Source>(tile, count);
      if (const int64_t rest = chunks % span_chunks) add_rest<Source>(tile, count, rest);
      m += count;
    }
  }

  int64_t rows_at_once(int64_t left) const {
    if (matrix_depth_ > 0 && left > kRows) return std::min(left, kMatrixTileRows);
    return left >= kRows ? kRows : left >= 2 ? 2 : 1;
  }

  // The last span of rows of 16 bits may be shorter.
  template <class Source>
  void add_rest(const Tile& whole, int64_t count, int64_t chunks) const {
    Tile tile = whole;
    const int64_t done = whole.spans * whole.chunks;
    tile.weights += done * Source::kChunkBytes;
    for (int64_t i = 0; i < count; ++i) {
      tile.rows[i] += done * Planes * Order::kPlaneBytes;
      tile.row_scales[i] += whole.spans;
    }
    tile.spans = 1;
    tile.chunks = chunks;
    multiply_tile<Source>(tile, count);
  }

  template <class Source>
  void multiply_tile(const Tile& tile, int64_t rows) const {
#if defined(MINIGPT4_USE_AMX)
    if (rows > kRows) return add_matrix_tile<Format, Planes>(tile, rows, matrix_depth_);
#endif
    if (rows == kRows) return add_wide_tile<Source, Format, Planes, kRows>(tile);
    if constexpr (kRows > 2) {
      if (rows == 2) return add_wide_tile<Source, Format, Planes, 2>(tile);
    }
    add_wide_tile<Source, Format, Planes, 1>(tile);
  }

  void store_block(const Block& block) const {
    float bias[kBlockOutputs] = {}, results[kBlockOutputs];
    for (int64_t n = 0; n < block.outputs && product_.bias.data != nullptr; ++n) {
      bias[n] = load_one(product_.bias, block.first + n);
    }
    for (int64_t m = 0; m < product_.rows; ++m) {
      for (int c = 0; c < kBlockOutputs; c += kLanes) {
        Float value = load(block.sums + m * kBlockOutputs + c);
        if (!is_grouped_) {
          value = multiply_add(load(block.offsets + c), set(-rounded_.sum(m)[0]), value);
          value = multiply(value, load(block.scales + c));
        }
        store(results + c, add(value, load(bias + c)));
      }
      store_row(product_.y, product_.x.type, m * weight_.outputs + block.first, block.outputs,
                results);
    }
  }

  const Product& product_;
  const Weight& weight_;
  const RoundedRows& rounded_;
  bool is_grouped_, has_offsets_;
  int64_t spans_, strip_;
  int64_t matrix_depth_ = 0;  // Numbers of a row in one step of AMX; 0 where it is not used.
};

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
