// Products with float weights. For few rows each weight is read once, widened in registers, and
// multiplied by all rows: the lanes of a vector are inputs, and nothing is put in order.
//
// Owns   the rows widened to float32, the tiles of sums, which are float32, and the choice between few
//        rows and many (wide_float_product.hpp).
#pragma once

#include <algorithm>

#include "wide_float_product.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

// More rows repay that a block is put in order (docs/performance.md).
constexpr int64_t kFewFloatRows = 32;

// What a tile fetches while it computes: what lies so many bytes behind a weight's numbers, and of it
// 1 / 2^shift of what the tile reads.
struct Ahead {
  int64_t bytes;
  int shift;
};

// A vector of each row by one of each weight. The fewer of both are kept in registers.
template <class Way, int M, int N>
MINIGPT4_INLINE void add_float_step(const uint8_t* const* weights,
                                    const typename Way::Row* const* rows, int64_t k,
                                    Float (&totals)[M][N]) {
  typename Way::Vector kept[std::min(M, N)];
  if constexpr (M < N) {
    for (int m = 0; m < M; ++m) kept[m] = Way::load_row(rows[m] + k);
    for (int n = 0; n < N; ++n) {
      const typename Way::Vector weight = Way::load_weight(weights[n] + k * Way::kSize);
      for (int m = 0; m < M; ++m) totals[m][n] = Way::add(totals[m][n], weight, kept[m]);
    }
  } else {
    for (int n = 0; n < N; ++n) kept[n] = Way::load_weight(weights[n] + k * Way::kSize);
    for (int m = 0; m < M; ++m) {
      const typename Way::Vector row = Way::load_row(rows[m] + k);
      for (int n = 0; n < N; ++n) totals[m][n] = Way::add(totals[m][n], kept[n], row);
    }
  }
}

// sums[m * stride + n] += the products of `inputs` numbers, which whole vectors divide.
template <class Way, int M, int N>
MINIGPT4_ALONE void add_float_tile(const uint8_t* const* weights,
                                   const typename Way::Row* const* rows, int64_t inputs,
                                   Ahead ahead, int64_t stride, float* sums) {
  constexpr int kSize = Way::kSize, kNumbers = Way::kNumbers;
  Float totals[M][N];
  for (auto& row : totals) {
    for (Float& total : row) total = zero();
  }
  // A cache line at once, and one prefetch for it.
  constexpr int kLine = std::max(1, 64 / (kSize * kNumbers)) * kNumbers;
  int64_t k = 0;
  for (; k + kLine <= inputs; k += kLine) {
    const int64_t fetched = ahead.bytes + (k * kSize >> ahead.shift);
    for (int n = 0; n < N; ++n) prefetch(weights[n] + fetched);
    MINIGPT4_UNROLL
    for (int i = 0; i < kLine; i += kNumbers) {
      add_float_step<Way, M, N>(weights, rows, k + i, totals);
    }
  }
  for (; k < inputs; k += kNumbers) add_float_step<Way, M, N>(weights, rows, k, totals);
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) sums[m * stride + n] += sum(totals[m][n]);
  }
}

// Tiles of M rows by N outputs.
template <class Way, int M, int N>
class FloatProduct {
 public:
  using Row = typename Way::Row;

  FloatProduct(const Product& product, const Row* rows)
      : product_(product), weight_(product.weight), rows_(rows) {
    // 2^shift of the tiles that read a strip fetch the next one, each its part.
    while (M << (shift_ + 1) <= product.rows) ++shift_;
  }

  static void run(const void* work, int64_t first, int64_t last) {
    static_cast<const FloatProduct*>(work)->multiply(first, last);
  }

 private:
  static constexpr int kSize = Way::kSize;
  static constexpr int64_t kStrip = 2048;  // The same for any number of rows, so that sums are too.

  void multiply(int64_t first, int64_t last) const {
    float* sums = static_cast<float*>(scratch(1, sizeof(float) * product_.rows * N));
    const int64_t whole = weight_.inputs / Way::kNumbers * Way::kNumbers;
    for (int64_t n = first; n < last; n += N) {
      const int64_t outputs = std::min<int64_t>(N, last - n);
      std::memset(sums, 0, sizeof(float) * product_.rows * N);
      for (int64_t k = 0; k < whole; k += kStrip) {
        add_strip(n, outputs, k, std::min(whole, k + kStrip), sums);
      }
      store_outputs(n, outputs, whole, sums);
    }
  }

  void add_strip(int64_t n, int64_t outputs, int64_t k, int64_t end, float* sums) const {
    const uint8_t* weights[N];
    for (int64_t i = 0; i < outputs; ++i) {
      weights[i] = weight_.values + (n + i) * weight_.value_stride + k * kSize;
    }
    // The next strip of these outputs, or the first one of the next.
    const int64_t bytes = (end - k) * kSize;
    const int64_t next = end < weight_.inputs ? bytes : N * weight_.value_stride - k * kSize;
    int64_t tile = 0;
    for (int64_t m = 0; m < product_.rows; ++tile) {
      const int64_t left = product_.rows - m;
      const int64_t count = left >= M ? M : left >= 2 ? 2 : 1;
      const Row* rows[M];
      for (int64_t i = 0; i < count; ++i) rows[i] = rows_ + (m + i) * weight_.inputs + k;
      // A tile alone fetches what its level says.
      const int64_t part = tile % (int64_t{1} << shift_);
      const Ahead ahead = {product_.rows > M ? next + (part * bytes >> shift_) : kFloatAhead, shift_};
      add(weights, outputs, rows, count, end - k, ahead, sums + m * N);
      m += count;
    }
  }

  static void add(const uint8_t* const* weights, int64_t outputs, const Row* const* rows,
                  int64_t count, int64_t inputs, Ahead ahead, float* sums) {
    for (int64_t n = 0; n < outputs && outputs < N; ++n) {
      add_rows<1>(weights + n, rows, count, inputs, ahead, sums + n);
    }
    if (outputs == N) add_rows<N>(weights, rows, count, inputs, ahead, sums);
  }

  template <int Outputs>
  static void add_rows(const uint8_t* const* weights, const Row* const* rows, int64_t count,
                       int64_t inputs, Ahead ahead, float* sums) {
    if constexpr (M > 2) {
      if (count == M) return add_float_tile<Way, M, Outputs>(weights, rows, inputs, ahead, N, sums);
    }
    if constexpr (M > 1) {
      if (count == 2) return add_float_tile<Way, 2, Outputs>(weights, rows, inputs, ahead, N, sums);
    }
    add_float_tile<Way, 1, Outputs>(weights, rows, inputs, ahead, N, sums);
  }

  void store_outputs(int64_t n, int64_t outputs, int64_t whole, const float* sums) const {
    for (int64_t i = 0; i < outputs; ++i) {
      const int64_t output = n + i;
      const float bias = product_.bias.data == nullptr ? 0 : load_one(product_.bias, output);
      const Floats weights{weight_.values, Way::kType};
      for (int64_t m = 0; m < product_.rows; ++m) {
        float value = sums[m * N + i];
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
  int shift_ = 0;
};

template <class Way, int M, int N>
void multiply_by_float_tiles(const Product& product, const typename Way::Row* rows) {
  const FloatProduct<Way, M, N> work(product, rows);
  const int64_t cost = product.rows * product.weight.inputs;
  in_parallel(product.weight.outputs, least_step(8 * N, cost), work.run, &work);
}

template <class Way>
void multiply_float_rows(const Product& product, const typename Way::Row* rows) {
  if (product.rows == 1) return multiply_by_float_tiles<Way, 1, kOneRowOutputs>(product, rows);
  if (product.rows <= kTileRows) {
    return multiply_by_float_tiles<Way, 2, kTwoRowOutputs>(product, rows);
  }
  multiply_by_float_tiles<Way, kTileRows, kFloatTileOutputs>(product, rows);
}

// The rows as float32, in memory of the calling thread where they are not so already.
static const float* widen_rows(const Product& product) {
  const int64_t inputs = product.weight.inputs;
  if (product.x.type == Number::float32) return static_cast<const float*>(product.x.data);
  struct Widening {
    const Floats& x;
    int64_t inputs;
    float* out;
  } const widening{product.x, inputs,
                   static_cast<float*>(scratch(0, product.rows * inputs * sizeof(float)))};
  const auto widen = [](const void* work, int64_t first, int64_t last) {
    const auto* mine = static_cast<const Widening*>(work);
    const int64_t start = first * mine->inputs;
    load_row(mine->x, start, (last - first) * mine->inputs, mine->out + start);
  };
  in_parallel(product.rows, least_step(1, inputs), widen, &widening);
  return widening.out;
}

template <Number type>
void multiply_floats_of(const Product& product) {
#if defined(MINIGPT4_USE_BF16)
  if (type == Number::bfloat16 && product.x.type == Number::bfloat16) {
    return multiply_float_rows<Paired>(product, static_cast<const uint16_t*>(product.x.data));
  }
#endif
  const float* rows = widen_rows(product);
  if (product.rows > kFewFloatRows) return multiply_wide_floats<type>(product, rows);
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
