// Products with float weights for many rows, whose lanes are outputs. A strip of a block of outputs is
// widened and put in order in a thread's own memory, and then multiplied by all rows. What is put in
// order next is fetched meanwhile: the memory works while the processor computes.
//
// Owns   the order of a block, and the way of a product through blocks and strips.
#pragma once

#include <algorithm>

#include "float_way.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

// A block in order is (inputs, kWideFloatOutputs), its sums are (rows, kWideFloatOutputs).
constexpr int kWideFloatOutputs = kWideFloatVectors * kLanes;

template <int M>
MINIGPT4_INLINE void add_wide_float_step(const float* weights, const float* const (&rows)[M],
                                         int64_t k, Float (&totals)[M][kWideFloatVectors]) {
  Float numbers[kWideFloatVectors];
  for (int c = 0; c < kWideFloatVectors; ++c) {
    numbers[c] = load(weights + k * kWideFloatOutputs + c * kLanes);
  }
  for (int m = 0; m < M; ++m) {
    const Float row = set(rows[m][k]);
    for (int c = 0; c < kWideFloatVectors; ++c) {
      totals[m][c] = multiply_add(numbers[c], row, totals[m][c]);
    }
  }
}

// sums += M rows, `stride` apart, by so many inputs of a block.
template <int M>
MINIGPT4_ALONE void add_wide_float_tile(const float* weights, const float* first_row,
                                        int64_t stride, int64_t inputs, float* sums) {
  Float totals[M][kWideFloatVectors];
  const float* rows[M];
  for (int m = 0; m < M; ++m) {
    rows[m] = first_row + m * stride;
    for (int c = 0; c < kWideFloatVectors; ++c) {
      totals[m][c] = load(sums + m * kWideFloatOutputs + c * kLanes);
    }
  }
  constexpr int kSteps = 4;
  int64_t k = 0;
  for (; k + kSteps <= inputs; k += kSteps) {
    MINIGPT4_UNROLL
    for (int i = 0; i < kSteps; ++i) add_wide_float_step<M>(weights, rows, k + i, totals);
  }
  for (; k < inputs; ++k) add_wide_float_step<M>(weights, rows, k, totals);
  for (int m = 0; m < M; ++m) {
    for (int c = 0; c < kWideFloatVectors; ++c) {
      store(sums + m * kWideFloatOutputs + c * kLanes, totals[m][c]);
    }
  }
}

template <Number type>
class WideFloatProduct {
 public:
  WideFloatProduct(const Product& product, const float* rows)
      : product_(product), weight_(product.weight), rows_(rows) {}

  static void run(const void* work, int64_t first, int64_t last) {
    const auto* mine = static_cast<const WideFloatProduct*>(work);
    for (int64_t n = first; n < last; n += kGroup) {
      mine->multiply_group(n, std::min(last, n + kGroup), last);
    }
  }

 private:
  using Way = Widened<type>;
  static constexpr int64_t kOutputs = kWideFloatOutputs;
  static constexpr int64_t kStrip = 256;  // A block of it stays in the first cache.
  static constexpr int64_t kGroup = 4 * kOutputs;  // A strip of the rows is used so often at once.
  static constexpr int64_t kLine = 64;

  // A strip of a block.
  struct Part {
    int64_t output, outputs, input, inputs;
  };

  // A part's lines in memory, fetched bit by bit.
  struct Fetch {
    const uint8_t* values;
    int64_t stride, lines, count, done = 0;  // `lines` of each output, `count` of all.

    void until(int64_t end) {
      for (; done < end; ++done) prefetch(values + done / lines * stride + done % lines * kLine);
    }
  };

  Part part_of(int64_t output, int64_t end, int64_t input) const {
    return {output, std::min(kOutputs, end - output), input,
            std::min(kStrip, weight_.inputs - input)};
  }

  // What follows a part of the group from `first` to `end`, or behind it; without outputs at `last`.
  Part next_part(const Part& part, int64_t first, int64_t end, int64_t last) const {
    if (part.output + kOutputs < end) return part_of(part.output + kOutputs, end, part.input);
    if (part.input + part.inputs < weight_.inputs) return part_of(first, end, part.input + part.inputs);
    return part_of(end, last, 0);
  }

  void multiply_group(int64_t first, int64_t end, int64_t last) const {
    const int64_t block_sums = product_.rows * kOutputs, in_order = kStrip * kOutputs;
    const int64_t all_sums = round_up(end - first, kOutputs) * product_.rows;
    auto* weights = static_cast<float*>(scratch(1, sizeof(float) * (in_order + all_sums)));
    float* sums = weights + in_order;
    std::memset(sums, 0, sizeof(float) * all_sums);
    for (int64_t k = 0; k < weight_.inputs; k += kStrip) {
      for (int64_t n = first, block = 0; n < end; n += kOutputs, ++block) {
        const Part part = part_of(n, end, k);
        arrange(part, weights);
        add_part(part, next_part(part, first, end, last), weights, sums + block * block_sums);
      }
    }
    for (int64_t n = first, block = 0; n < end; n += kOutputs, ++block) {
      store_block(n, std::min(kOutputs, end - n), sums + block * block_sums);
    }
  }

  const uint8_t* find(int64_t output, int64_t input) const {
    return weight_.values + output * weight_.value_stride + input * Way::kSize;
  }

  // Zeros stand for outputs that a block lacks.
  void arrange(const Part& part, float* out) const {
    for (int64_t c = 0; c < kOutputs; c += kLanes) {
      for (int64_t k = 0; k < part.inputs; k += kLanes) {
        const int64_t inputs = std::min<int64_t>(kLanes, part.inputs - k);
        Bytes vectors[kLanes];
        for (int64_t n = 0; n < kLanes; ++n) {
          const bool is_there = c + n < part.outputs;
          vectors[n] = to_bytes(
              is_there ? load_numbers(find(part.output + c + n, part.input + k), inputs) : zero());
        }
        transpose(vectors);
        for (int64_t i = 0; i < inputs; ++i) {
          store_bytes(reinterpret_cast<uint8_t*>(out + (k + i) * kOutputs + c), vectors[i]);
        }
      }
    }
  }

  // Nothing behind the numbers is read.
  MINIGPT4_INLINE Float load_numbers(const uint8_t* p, int64_t count) {
    if (count == kLanes) return Way::load_weight(p);
    uint8_t copy[kLanes * Way::kSize] = {};
    std::memcpy(copy, p, count * Way::kSize);
    return Way::load_weight(copy);
  }

  void add_part(const Part& part, const Part& next, const float* weights, float* sums) const {
    Fetch fetch = {find(next.output, next.input), weight_.value_stride,
                   (next.inputs * Way::kSize + kLine - 1) / kLine, 0};
    fetch.count = fetch.lines * next.outputs;
    int64_t m = add_rows<kWideFloatRows>(part, weights, 0, fetch, sums);
    m = add_rows<2>(part, weights, m, fetch, sums);
    add_rows<1>(part, weights, m, fetch, sums);
  }

  // M at a time from a row on, as far as they go; with each tile its share of what is fetched.
  template <int M>
  int64_t add_rows(const Part& part, const float* weights, int64_t m, Fetch& fetch,
                   float* sums) const {
    for (; m + M <= product_.rows; m += M) {
      fetch.until(fetch.count * (m + M) / product_.rows);
      add_wide_float_tile<M>(weights, rows_ + m * weight_.inputs + part.input, weight_.inputs,
                             part.inputs, sums + m * kOutputs);
    }
    return m;
  }

  void store_block(int64_t first, int64_t outputs, const float* sums) const {
    float bias[kOutputs] = {}, results[kOutputs];
    if (product_.bias.data != nullptr) load_row(product_.bias, first, outputs, bias);
    for (int64_t m = 0; m < product_.rows; ++m) {
      for (int64_t n = 0; n < kOutputs; n += kLanes) {
        store(results + n, add(load(sums + m * kOutputs + n), load(bias + n)));
      }
      store_row(product_.y, product_.x.type, m * weight_.outputs + first, outputs, results);
    }
  }

  const Product& product_;
  const Weight& weight_;
  const float* rows_;
};

template <Number type>
void multiply_wide_floats(const Product& product, const float* rows) {
  const WideFloatProduct<type> work(product, rows);
  const int64_t step = least_step(kWideFloatOutputs, product.rows * product.weight.inputs);
  in_parallel(product.weight.outputs, step, work.run, &work);
}

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
