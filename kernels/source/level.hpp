// All kernels of one level. A file defines MINIGPT4_LEVEL and what it may use, and includes this.
#pragma once

#include "attention.hpp"
#include "cache_write.hpp"
#include "float_product.hpp"
#include "formats.hpp"
#include "integer_product.hpp"
#include "row_operations.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

template <class Format>
void multiply_by(const Product& product) {
  if (Format::kHolds16Bits || product.rounds_rows) return multiply_integers<Format, 1>(product);
  multiply_integers<Format, Format::kHolds16Bits ? 1 : 2>(product);
}

static void multiply_by_int8(const Product& product) {
  const bool is_plain = product.rounds_rows && product.weight.zero_points == nullptr;
  if constexpr (Int8::kHolds16Bits) {
    if (is_plain && product.rows < kTileRows) return multiply_integers<Int8Magnitudes, 1>(product);
  }
  multiply_by<Int8>(product);
}

static void multiply_by_sparse24(const Product& product) {
  using InOrder = Sparse24InOrder;
  if (product.rows < InOrder::kWideFrom) return multiply_by<Sparse24>(product);
  if (InOrder::kHolds16Bits || product.rounds_rows) {
    return multiply_by_way<WideProduct, InOrder, 1>(product);
  }
  multiply_by_way<WideProduct, InOrder, InOrder::kHolds16Bits ? 1 : 2>(product);
}

static void linear(const Product& product) {
  switch (product.weight.layout) {
    case Layout::floats:
      return multiply_floats(product);
    case Layout::int8:
      return multiply_by_int8(product);
    case Layout::int4:
      return multiply_by<Int4>(product);
    case Layout::sparse24_int8:
      return multiply_by_sparse24(product);
  }
}

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
