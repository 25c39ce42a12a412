// Products with integer weights: the blocks in which a weight is read, and the tiles of sums.
//
// Owns   the order of the work. A format (formats_*.hpp) says how a step of numbers is read and
//        multiplied; here each weight is read from memory once for all rows.
#pragma once

#include <algorithm>

#include "integer_rows.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

constexpr int64_t kPrefetchBytes = 2048;
// Bytes of a weight's row that stay in the first cache while many rows pass, and its rows.
constexpr int64_t kStripBytes = 1024;
constexpr int64_t kBlockOutputs = 16;
constexpr int64_t kNarrowRows = 4;  // Up to so many, a weight's rows are read to their ends.
constexpr int64_t kLongestSpan = 128;  // 16-bit sums of nibbles hold this many.
constexpr int64_t kFreeSpan = 256;     // Of 16-bit rows where the weight has no groups.

// Rows of weights against rows of activations, over one stretch of the inputs.
struct Tile {
  const uint8_t* values[kTileOutputs];
  const uint8_t* positions[kTileOutputs];
  const float* weight_scales[kTileOutputs];  // Null where a weight's row has one scale.
  const uint8_t* rows[kTileRows];
  const float* row_scales[kTileRows];
  int64_t spans;
  int64_t steps;  // In a span.
  int lanes;      // Scales in a step, where spans are shorter than steps.
  int64_t ahead;  // Bytes from a weight's step to what is fetched meanwhile.
  float* sums;    // sums[m * stride + n] += …
  int64_t stride;
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
    for (int part = 0; part < Format::kParts; ++part) {
      typename Format::Part parts[N];
      for (int n = 0; n < N; ++n) parts[n] = Format::part(numbers[n], part);
      for (int m = 0; m < M; ++m) {
        const uint8_t* row = rows[m] + step * (Planes * Format::kPlaneBytes) +
                             part * (Format::kPlaneBytes / Format::kParts);
        for (int p = 0; p < Planes; ++p) {
          for (int n = 0; n < N; ++n) {
            Format::add(sums[m][n][p], parts[n], row + p * Format::kPlaneBytes);
          }
        }
      }
    }
  }
};

template <class Format, int Planes, int M, int N>
void add_tile(const Tile& tile) {
  // So many steps at once as a cache line has, and one prefetch for them.
  constexpr int kUnrolled = std::max(1, 64 / Format::kValueBytes);
  Float totals[M][N];
  for (auto& row : totals) {
    for (Float& total : row) total = zero();
  }
  const uint8_t *values[N], *positions[N], *rows[M];
  for (int n = 0; n < N; ++n) values[n] = tile.values[n], positions[n] = tile.positions[n];
  for (int m = 0; m < M; ++m) rows[m] = tile.rows[m];
  const auto forward = [&](int64_t steps) {
    for (int n = 0; n < N; ++n) {
      values[n] += steps * Format::kValueBytes;
      positions[n] += steps * Format::kPositionBytes;
    }
    for (int m = 0; m < M; ++m) rows[m] += steps * (Planes * Format::kPlaneBytes);
  };
  for (int64_t span = 0; span < tile.spans; ++span) {
    TileSums<Format, Planes, M, N> tile_sums;
    tile_sums.start();
    int64_t left = tile.steps;
    for (; left >= kUnrolled; left -= kUnrolled) {
      for (int n = 0; n < N; ++n) prefetch(values[n] + tile.ahead);
      for (int i = 0; i < kUnrolled; ++i) tile_sums.add_step(values, positions, rows, i);
      forward(kUnrolled);
    }
    for (; left > 0; --left) {
      tile_sums.add_step(values, positions, rows, 0);
      forward(1);
    }
    Float weight_scales[N];
    for (int n = 0; n < N; ++n) {
      const float* scales = tile.weight_scales[n];
      weight_scales[n] = scales ? set_lanes(scales + span * tile.lanes, tile.lanes) : set(1);
    }
    for (int m = 0; m < M; ++m) {
      const Float row_scale = set_lanes(tile.row_scales[m] + span * tile.lanes, tile.lanes);
      for (int n = 0; n < N; ++n) {
        const auto& sums = tile_sums.sums[m][n];
        Float value = to_float(Format::finish(sums[0]));
        if (Planes == 2) {
          const Float low = to_float(Format::finish(sums[Planes - 1]));
          value = multiply_add(value, set(kPlaneBase), low);
        }
        const Float scale = multiply(row_scale, weight_scales[n]);
        totals[m][n] = multiply_add(value, scale, totals[m][n]);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) tile.sums[m * tile.stride + n] += sum(totals[m][n]);
  }
}

// The work of one product that all threads share.
template <class Format, int Planes>
class IntegerProduct {
 public:
  IntegerProduct(const Product& product, const RoundedRows& rounded)
      : product_(product), weight_(product.weight), rounded_(rounded) {
    const RowLayout& layout = rounded.layout;
    is_grouped_ = weight_.group < weight_.inputs;
    lanes_ = layout.span < Format::kNumbers ? Format::kNumbers / layout.span : 1;
    corrects_ = Format::kOffset != 0 || weight_.zero_points != nullptr;
    const bool is_narrow = product.rows <= kNarrowRows;
    block_outputs_ = is_narrow ? kTileOutputs : kBlockOutputs;
    strip_steps_ = is_narrow ? layout.steps : kStripBytes / Format::kValueBytes;
    scales_ = layout.scales;
  }

  static void run(const void* work, int64_t first, int64_t last) {
    static_cast<const IntegerProduct*>(work)->multiply(first, last);
  }

 private:
  static constexpr int kRows = kTileRows / Planes;  // Each plane has sums of its own.

  void multiply(int64_t first, int64_t last) const {
    const int64_t rows = product_.rows;
    float* memory = static_cast<float*>(
        scratch(1, sizeof(float) * block_outputs_ * (2 * scales_ + rows + 1)));
    Block block;
    block.scales = memory;
    block.offsets = memory + block_outputs_ * scales_;
    block.sums = memory + block_outputs_ * 2 * scales_;
    for (block.first = first; block.first < last; block.first += block_outputs_) {
      block.outputs = std::min(block_outputs_, last - block.first);
      load_scales(block);
      std::memset(block.sums, 0, sizeof(float) * rows * block_outputs_);
      const int64_t whole = weight_.inputs / Format::kNumbers;
      for (int64_t step = 0; step < whole; step += strip_steps_) {
        add_strip(block, step, std::min(whole, step + strip_steps_));
      }
      if (weight_.inputs % Format::kNumbers != 0) add_rest(block, whole);
      store_block(block);
    }
  }

  struct Block {
    int64_t first = 0, outputs = 0;
    float* scales = nullptr;   // (outputs, scales_)
    float* offsets = nullptr;  // The same, times what each number has too much.
    float* sums = nullptr;     // (rows, block_outputs_)
  };

  void load_scales(const Block& block) const {
    const int64_t groups = weight_.groups();
    for (int64_t n = 0; n < block.outputs; ++n) {
      float* scales = block.scales + n * scales_;
      float* offsets = block.offsets + n * scales_;
      const int64_t output = block.first + n;
      if (!is_grouped_) {
        scales[0] = load_one(weight_.scale, output);
        offsets[0] = Format::offset(weight_, output, 0);
        continue;
      }
      const int64_t spans = weight_.inputs / rounded_.layout.span;
      if (spans == groups) {
        load_row(weight_.scale, output * groups, groups, scales);
      } else {
        const int64_t repeats = spans / groups;
        for (int64_t s = 0; s < spans; ++s) {
          scales[s] = load_one(weight_.scale, output * groups + s / repeats);
        }
      }
      std::fill(scales + spans, scales + scales_, 0.0f);
      if (!corrects_) continue;
      const bool is_constant = weight_.zero_points == nullptr;
      const float constant = is_constant ? Format::offset(weight_, output, 0) : 0;
      const int64_t repeats = spans / groups;
      for (int64_t s = 0; s < scales_; ++s) {
        const float offset = is_constant || s >= spans
                                 ? constant
                                 : Format::offset(weight_, output, s / repeats);
        offsets[s] = scales[s] * offset;
      }
    }
  }

  // Whole steps from `step` to `end`. A span that they cut short is a part of its own.
  void add_strip(const Block& block, int64_t step, int64_t end) const {
    const int64_t span_steps = rounded_.layout.span / Format::kNumbers;
    if (lanes_ > 1) return add_part(block, step, end - step, 1);
    if (rounded_.layout.scales == 1) return add_part(block, step, 1, end - step);
    const int64_t spans = (end - step) / span_steps;
    if (spans > 0) add_part(block, step, spans, span_steps);
    step += spans * span_steps;
    if (step < end) add_part(block, step, 1, end - step);
  }

  void add_part(const Block& block, int64_t step, int64_t spans, int64_t steps) const {
    Tile tile = at(spans, steps);
    for (int64_t m = 0; m < product_.rows;) {
      const int64_t count = take_rows(tile, m, step);
      for (int64_t n = 0; n < block.outputs;) {
        const int64_t outputs = block.outputs - n >= kTileOutputs ? kTileOutputs : 1;
        for (int64_t i = 0; i < outputs; ++i) {
          const int64_t output = block.first + n + i;
          tile.values[i] = weight_.values + output * weight_.value_stride +
                           step * Format::kValueBytes;
          tile.positions[i] = weight_.positions + output * weight_.position_stride +
                              step * Format::kPositionBytes;
        }
        take_scales(tile, block, n, outputs, step);
        tile.sums = block.sums + m * block_outputs_ + n;
        tile.ahead = m > 0 ? 0 : product_.rows <= kNarrowRows ? kPrefetchBytes : kStripBytes;
        add(tile, count, outputs);
        n += outputs;
      }
      m += count;
    }
  }

  // The inputs behind the last whole step: the weight's are copied, lest bytes behind its end be
  // read, and stand before zeros.
  void add_rest(const Block& block, int64_t step) const {
    uint8_t values[Format::kValueBytes], positions[Format::kPositionBytes + 1];
    const int64_t rest = weight_.inputs - step * Format::kNumbers;
    Tile tile = at(1, 1);
    tile.values[0] = values;
    tile.positions[0] = positions;
    for (int64_t n = 0; n < block.outputs; ++n) {
      const int64_t output = block.first + n;
      std::memset(values, 0, sizeof values);
      std::memset(positions, 0, sizeof positions);
      std::memcpy(values,
                  weight_.values + output * weight_.value_stride + step * Format::kValueBytes,
                  rest * Format::kValueBytes / Format::kNumbers);
      if (Format::kPositionBytes > 0) {
        std::memcpy(positions,
                    weight_.positions + output * weight_.position_stride +
                        step * Format::kPositionBytes,
                    rest * Format::kPositionBytes / Format::kNumbers);
      }
      take_scales(tile, block, n, 1, step);
      for (int64_t m = 0; m < product_.rows;) {
        const int64_t count = take_rows(tile, m, step);
        tile.sums = block.sums + m * block_outputs_ + n;
        add(tile, count, 1);
        m += count;
      }
    }
  }

  Tile at(int64_t spans, int64_t steps) const {
    Tile tile = {};
    tile.spans = spans;
    tile.steps = steps;
    tile.lanes = lanes_;
    tile.stride = block_outputs_;
    return tile;
  }

  int64_t scale_at(int64_t step) const {
    return scales_ == 1 ? 0 : step * Format::kNumbers / rounded_.layout.span;
  }

  int64_t take_rows(Tile& tile, int64_t m, int64_t step) const {
    const int64_t left = product_.rows - m;
    const int64_t count = left >= kRows ? kRows : left >= 2 ? 2 : 1;
    for (int64_t i = 0; i < count; ++i) {
      tile.rows[i] = rounded_.row(m + i) + step * (Planes * Format::kPlaneBytes);
      tile.row_scales[i] = rounded_.scale(m + i) + scale_at(step);
    }
    return count;
  }

  void take_scales(Tile& tile, const Block& block, int64_t n, int64_t count, int64_t step) const {
    if (!is_grouped_) return;
    for (int64_t i = 0; i < count; ++i) {
      tile.weight_scales[i] = block.scales + (n + i) * scales_ + scale_at(step);
    }
  }

  static void add(const Tile& tile, int64_t rows, int64_t outputs) {
    constexpr int N = kTileOutputs;
    if (outputs == N) {
      if (rows == kRows) return add_tile<Format, Planes, kRows, N>(tile);
      if (rows == 2) return add_tile<Format, Planes, 2, N>(tile);
      return add_tile<Format, Planes, 1, N>(tile);
    }
    if (rows == kRows) return add_tile<Format, Planes, kRows, 1>(tile);
    if (rows == 2) return add_tile<Format, Planes, 2, 1>(tile);
    return add_tile<Format, Planes, 1, 1>(tile);
  }

  void store_block(const Block& block) const {
    for (int64_t n = 0; n < block.outputs; ++n) {
      const int64_t output = block.first + n;
      const float bias = product_.bias.data == nullptr ? 0 : load_one(product_.bias, output);
      for (int64_t m = 0; m < product_.rows; ++m) {
        float value = block.sums[m * block_outputs_ + n];
        if (corrects_) value -= correction(block.offsets + n * scales_, rounded_.sum(m));
        if (!is_grouped_) value *= block.scales[n * scales_];
        store_one(product_.y, product_.x.type, m * weight_.outputs + output, value + bias);
      }
    }
  }

  float correction(const float* offsets, const float* sums) const {
    if (!is_grouped_) return offsets[0] * sums[0];
    Float total = zero();
    int64_t s = 0;
    for (; s + kLanes <= scales_; s += kLanes) {
      total = multiply_add(load(offsets + s), load(sums + s), total);
    }
    float rest = 0;
    for (; s < scales_; ++s) rest += offsets[s] * sums[s];
    return rest + sum(total);
  }

  const Product& product_;
  const Weight& weight_;
  const RoundedRows& rounded_;
  bool is_grouped_, corrects_;
  int lanes_;
  int64_t block_outputs_, strip_steps_, scales_;
};

template <class Format, int Planes>
RowLayout lay_out(const Product& product) {
  const Weight& weight = product.weight;
  const bool is_grouped = weight.group < weight.inputs;
  RowLayout layout;
  layout.inputs = weight.inputs;
  layout.rows = product.rows;
  layout.is_8_bit = product.rounds_rows;
  layout.span = is_grouped            ? std::min(weight.group, kLongestSpan)
                : product.rounds_rows ? weight.inputs
                                      : kFreeSpan;
  layout.shared = is_grouped && product.rounds_rows ? weight.group : layout.span;
  layout.steps = round_up(weight.inputs, Format::kNumbers) / Format::kNumbers;
  layout.row_bytes = layout.steps * Planes * Format::kPlaneBytes;
  const int64_t numbers = layout.steps * Format::kNumbers;
  layout.scales = layout.span == weight.inputs ? 1 : round_up(numbers, layout.span) / layout.span;
  layout.sums = is_grouped ? layout.scales : 1;
  return layout;
}

// Rounds the rows and multiplies.
template <class Format, int Planes>
void multiply_integers(const Product& product) {
  RoundedRows rounded;
  rounded.layout = lay_out<Format, Planes>(product);
  const RowLayout& layout = rounded.layout;
  const size_t value_bytes = layout.rows * layout.row_bytes;
  const size_t float_bytes = layout.rows * (layout.scales + layout.sums) * sizeof(float);
  rounded.values = static_cast<uint8_t*>(scratch(0, value_bytes + float_bytes));
  rounded.scales = reinterpret_cast<float*>(rounded.values + value_bytes);
  rounded.sums = rounded.scales + layout.rows * layout.scales;

  struct Rounding {
    const Product& product;
    const RoundedRows& rounded;
  } const rounding{product, rounded};
  const auto round = [](const void* work, int64_t first, int64_t last) {
    const auto* mine = static_cast<const Rounding*>(work);
    round_rows<Format, Planes>(mine->product.x, mine->rounded, first, last);
  };
  // Waking the threads costs more than the rounding of a few rows.
  constexpr int64_t kNumbersAtOnce = 1 << 14;
  const int64_t rows_at_once = std::max<int64_t>(1, kNumbersAtOnce / layout.inputs);
  if (layout.rows <= rows_at_once) {
    round(&rounding, 0, layout.rows);
  } else {
    in_parallel(layout.rows, rows_at_once, round, &rounding);
  }
  const IntegerProduct<Format, Planes> work(product, rounded);
  const int64_t step = product.rows <= kNarrowRows ? 8 * kTileOutputs : kBlockOutputs;
  in_parallel(product.weight.outputs, step, work.run, &work);
}

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
