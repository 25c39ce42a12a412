// Products with float weights for few rows: each weight is read once, widened in registers, and
// multiplied by all rows in float32. Where the level can, bfloat16 is multiplied by bfloat16 as it is.
//
// Owns   the rows widened to float32, and the tiles of sums, which are float32.
#pragma once

#include <algorithm>

#include "integer_product.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

constexpr int64_t kFloatPrefetchBytes = 2048;

// Weights of any type by rows of float32.
template <Number type>
struct Widened {
  using Row = float;
  using Vector = Float;
  static constexpr Number kType = type;
  static constexpr int kSize = type == Number::float32 ? 4 : 2, kNumbers = kLanes;

  MINIGPT4_INLINE Vector load_weight(const uint8_t* p) {
    if (type == Number::float32) return load(reinterpret_cast<const float*>(p));
    const auto* bits = reinterpret_cast<const uint16_t*>(p);
    return type == Number::bfloat16 ? load_bfloat16(bits) : load_float16(bits);
  }
  MINIGPT4_INLINE Vector load_row(const Row* p) { return load(p); }
  MINIGPT4_INLINE Float add(Float sums, Vector weights, Vector row) {
    return multiply_add(weights, row, sums);
  }
};

#if defined(MINIGPT4_USE_BF16)
// Weights of bfloat16 by rows of bfloat16.
struct Paired {
  using Row = uint16_t;
  using Vector = Pairs;
  static constexpr Number kType = Number::bfloat16;
  static constexpr int kSize = 2, kNumbers = 2 * kLanes;

  MINIGPT4_INLINE Vector load_weight(const uint8_t* p) {
    return load_pairs(reinterpret_cast<const uint16_t*>(p));
  }
  MINIGPT4_INLINE Vector load_row(const Row* p) { return load_pairs(p); }
  MINIGPT4_INLINE Float add(Float sums, Vector weights, Vector row) {
    return dot(sums, weights, row);
  }
};
#endif

// sums[m * kFloatTileOutputs + n] += the products of `inputs` numbers, which whole vectors divide.
template <class Way, int M, int N>
void add_float_tile(const uint8_t* const* weights, const typename Way::Row* const* rows,
                    int64_t inputs, int64_t ahead, float* sums) {
  constexpr int kSize = Way::kSize, kNumbers = Way::kNumbers;
  Float totals[M][N];
  for (auto& row : totals) {
    for (Float& total : row) total = zero();
  }
  const auto add_step = [&](int64_t k) MINIGPT4_LAMBDA {
    typename Way::Vector numbers[N];
    for (int n = 0; n < N; ++n) numbers[n] = Way::load_weight(weights[n] + k * kSize);
    for (int m = 0; m < M; ++m) {
      const typename Way::Vector row = Way::load_row(rows[m] + k);
      for (int n = 0; n < N; ++n) totals[m][n] = Way::add(totals[m][n], numbers[n], row);
    }
  };
  // A cache line at once, and one prefetch for it.
  constexpr int kLine = std::max(1, 64 / (kSize * kNumbers)) * kNumbers;
  int64_t k = 0;
  for (; k + kLine <= inputs; k += kLine) {
    for (int n = 0; n < N; ++n) prefetch(weights[n] + k * kSize + ahead);
    for (int i = 0; i < kLine; i += kNumbers) add_step(k + i);
  }
  for (; k < inputs; k += kNumbers) add_step(k);
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) sums[m * kFloatTileOutputs + n] += sum(totals[m][n]);
  }
}

template <class Way>
class FloatProduct {
 public:
  using Row = typename Way::Row;

  FloatProduct(const Product& product, const Row* rows)
      : product_(product), weight_(product.weight), rows_(rows) {}

  static void run(const void* work, int64_t first, int64_t last) {
    static_cast<const FloatProduct*>(work)->multiply(first, last);
  }

 private:
  static constexpr int kSize = Way::kSize;
  static constexpr int64_t kStrip = 2048;  // The same for any number of rows, so that sums are too.

  void multiply(int64_t first, int64_t last) const {
    float* sums = static_cast<float*>(scratch(1, sizeof(float) * product_.rows * kFloatTileOutputs));
    const int64_t whole = weight_.inputs / Way::kNumbers * Way::kNumbers;
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
      const Row* rows[kTileRows];
      for (int64_t i = 0; i < count; ++i) rows[i] = rows_ + (m + i) * weight_.inputs + k;
      const int64_t ahead = m > 0 ? 0 : kFloatPrefetchBytes;
      add(weights, outputs, rows, count, end - k, ahead, sums + m * kFloatTileOutputs);
      m += count;
    }
  }

  static void add(const uint8_t* const* weights, int64_t outputs, const Row* const* rows,
                  int64_t count, int64_t inputs, int64_t ahead, float* sums) {
    constexpr int M = kTileRows, N = kFloatTileOutputs;
    for (int64_t n = 0; n < outputs && outputs < N; ++n) {
      if (count == M) add_float_tile<Way, M, 1>(weights + n, rows, inputs, ahead, sums + n);
      if (count == 2) add_float_tile<Way, 2, 1>(weights + n, rows, inputs, ahead, sums + n);
      if (count == 1) add_float_tile<Way, 1, 1>(weights + n, rows, inputs, ahead, sums + n);
    }
    if (outputs < N) return;
    if (count == M) return add_float_tile<Way, M, N>(weights, rows, inputs, ahead, sums);
    if (count == 2) return add_float_tile<Way, 2, N>(weights, rows, inputs, ahead, sums);
    add_float_tile<Way, 1, N>(weights, rows, inputs, ahead, sums);
  }

  void store_outputs(int64_t n, int64_t outputs, int64_t whole, const float* sums) const {
    for (int64_t i = 0; i < outputs; ++i) {
      const int64_t output = n + i;
      const float bias = product_.bias.data == nullptr ? 0 : load_one(product_.bias, output);
      const Floats weights{weight_.values, Way::kType};
      for (int64_t m = 0; m < product_.rows; ++m) {
        float value = sums[m * kFloatTileOutputs + i];
        for (int64_t k = whole; k < weight_.inputs; ++k) {
          value += load_one(weights, output * weight_.inputs + k) *
                   load_one(product_.x, m * weight_.inputs + k);
        }
        store_one(product_.y, product_.x.type, m * weight_.outputs + output, value + bias);
      }
    }
  }

  const Product& product_;
  const Weight& weight_;
  const Row* rows_;
};

template <class Way>
void multiply_float_rows(const Product& product, const typename Way::Row* rows) {
  const FloatProduct<Way> work(product, rows);
  const int64_t cost = product.rows * product.weight.inputs;
  in_parallel(product.weight.outputs, least_step(8 * kFloatTileOutputs, cost), work.run, &work);
}

template <Number type>
void multiply_floats_of(const Product& product) {
#if defined(MINIGPT4_USE_BF16)
  if (type == Number::bfloat16 && product.x.type == Number::bfloat16) {
    return multiply_float_rows<Paired>(product, static_cast<const uint16_t*>(product.x.data));
  }
#endif
  const int64_t count = product.rows * product.weight.inputs;
  const float* rows = static_cast<const float*>(product.x.data);
  if (product.x.type != Number::float32) {
    float* wide = static_cast<float*>(scratch(0, count * sizeof(float)));
    load_row(product.x, 0, count, wide);
    rows = wide;
  }
  multiply_float_rows<Widened<type>>(product, rows);
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
