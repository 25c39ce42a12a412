// Products with float weights for few rows: each weight is read once, widened in registers, and
// multiplied by all rows in float32.
//
// Owns   the rows widened to float32, and the tiles of sums.
#pragma once

#include <algorithm>

#include "integer_product.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

constexpr int64_t kFloatPrefetchBytes = 2048;

template <Number type>
MINIGPT4_INLINE Float load_weight(const uint8_t* p) {
  if (type == Number::float32) return load(reinterpret_cast<const float*>(p));
  const auto* bits = reinterpret_cast<const uint16_t*>(p);
  return type == Number::bfloat16 ? load_bfloat16(bits) : load_float16(bits);
}

// sums[m * kFloatTileOutputs + n] += the products of `inputs` numbers, which whole vectors divide.
template <Number type, int M, int N>
void add_float_tile(const uint8_t* const* weights, const float* const* rows, int64_t inputs,
                    int64_t ahead, float* sums) {
  constexpr int kSize = type == Number::float32 ? 4 : 2;
  Float totals[M][N];
  for (auto& row : totals) {
    for (Float& total : row) total = zero();
  }
  const auto add_step = [&](int64_t k) MINIGPT4_LAMBDA {
    Float numbers[N];
    for (int n = 0; n < N; ++n) numbers[n] = load_weight<type>(weights[n] + k * kSize);
    for (int m = 0; m < M; ++m) {
      const Float row = load(rows[m] + k);
      for (int n = 0; n < N; ++n) totals[m][n] = multiply_add(numbers[n], row, totals[m][n]);
    }
  };
  // A cache line at once, and one prefetch for it.
  constexpr int kLine = std::max(1, 64 / (kSize * kLanes)) * kLanes;
  int64_t k = 0;
  for (; k + kLine <= inputs; k += kLine) {
    for (int n = 0; n < N; ++n) prefetch(weights[n] + k * kSize + ahead);
    for (int i = 0; i < kLine; i += kLanes) add_step(k + i);
  }
  for (; k < inputs; k += kLanes) add_step(k);
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) sums[m * kFloatTileOutputs + n] += sum(totals[m][n]);
  }
}

template <Number type>
class FloatProduct {
 public:
  FloatProduct(const Product& product, const float* rows)
      : product_(product), weight_(product.weight), rows_(rows) {}

  static void run(const void* work, int64_t first, int64_t last) {
    static_cast<const FloatProduct*>(work)->multiply(first, last);
  }

 private:
  static constexpr int kSize = type == Number::float32 ? 4 : 2;
  static constexpr int64_t kStrip = 2048;  // The same for any number of rows, so that sums are too.

  void multiply(int64_t first, int64_t last) const {
    float* sums = static_cast<float*>(scratch(1, sizeof(float) * product_.rows * kFloatTileOutputs));
    const int64_t whole = weight_.inputs / kLanes * kLanes;
    for (int64_t n = first; n < last; n += kFloatTileOutputs) {
      const int64_t outputs = std::min<int64_t>(kFloatTileOutputs, last - n);
      std::memset(sums, 0, sizeof(float) * product_.rows * kFloatTileOutputs);
      for (int64_t k = 0; k < whole; k += kStrip) {
        add_strip(n, outputs, k, std::min(whole, k + kStrip), sums);
      }
      store_outputs(n, outputs, whole, sums);
    }
  }

  void add_strip(int64_t n, int64_t outputs, int64_t k, int64_t end, float* sums) const {
    const uint8_t* weights[kFloatTileOutputs];
    for (int64_t i = 0; i < outputs; ++i) {
      weights[i] = weight_.values + (n + i) * weight_.value_stride + k * kSize;
    }
    for (int64_t m = 0; m < product_.rows;) {
      const int64_t left = product_.rows - m;
      const int64_t count = left >= kTileRows ? kTileRows : left >= 2 ? 2 : 1;
      const float* rows[kTileRows];
      for (int64_t i = 0; i < count; ++i) rows[i] = rows_ + (m + i) * weight_.inputs + k;
      const int64_t ahead = m > 0 ? 0 : kFloatPrefetchBytes;
      add(weights, outputs, rows, count, end - k, ahead, sums + m * kFloatTileOutputs);
      m += count;
    }
  }

  static void add(const uint8_t* const* weights, int64_t outputs, const float* const* rows,
                  int64_t count, int64_t inputs, int64_t ahead, float* sums) {
    constexpr int M = kTileRows, N = kFloatTileOutputs;
    for (int64_t n = 0; n < outputs && outputs < N; ++n) {
      if (count == M) add_float_tile<type, M, 1>(weights + n, rows, inputs, ahead, sums + n);
      if (count == 2) add_float_tile<type, 2, 1>(weights + n, rows, inputs, ahead, sums + n);
      if (count == 1) add_float_tile<type, 1, 1>(weights + n, rows, inputs, ahead, sums + n);
    }
    if (outputs < N) return;
    if (count == M) return add_float_tile<type, M, N>(weights, rows, inputs, ahead, sums);
    if (count == 2) return add_float_tile<type, 2, N>(weights, rows, inputs, ahead, sums);
    add_float_tile<type, 1, N>(weights, rows, inputs, ahead, sums);
  }

  void store_outputs(int64_t n, int64_t outputs, int64_t whole, const float* sums) const {
    for (int64_t i = 0; i < outputs; ++i) {
      const int64_t output = n + i;
      const float bias = product_.bias.data == nullptr ? 0 : load_one(product_.bias, output);
      const Floats weights{weight_.values, type};
      for (int64_t m = 0; m < product_.rows; ++m) {
        float value = sums[m * kFloatTileOutputs + i];
        for (int64_t k = whole; k < weight_.inputs; ++k) {
          value += load_one(weights, output * weight_.inputs + k) * rows_[m * weight_.inputs + k];
        }
        store_one(product_.y, product_.x.type, m * weight_.outputs + output, value + bias);
      }
    }
  }

  const Product& product_;
  const Weight& weight_;
  const float* rows_;
};

template <Number type>
void multiply_floats_of(const Product& product) {
  const int64_t count = product.rows * product.weight.inputs;
  const float* rows = static_cast<const float*>(product.x.data);
  if (product.x.type != Number::float32) {
    float* wide = static_cast<float*>(scratch(0, count * sizeof(float)));
    load_row(product.x, 0, count, wide);
    rows = wide;
  }
  const FloatProduct<type> work(product, rows);
  const int64_t step = least_step(8 * kFloatTileOutputs, count);
  in_parallel(product.weight.outputs, step, work.run, &work);
}

static void multiply_floats(const Product& product) {
  switch (product.weight.type) {
    case Number::float32:
      return multiply_floats_of<Number::float32>(product);
    case Number::float16:
      return multiply_floats_of<Number::float16>(product);
    case Number::bfloat16:
      return multiply_floats_of<Number::bfloat16>(product);
  }
}

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
