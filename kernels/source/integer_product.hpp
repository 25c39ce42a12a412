// Products with integer weights: the rows are rounded once, and multiplied in one of two ways.
//
// Owns   the choice by the number of rows, and the layout of the rounded rows.
#pragma once

#include "narrow_product.hpp"
#include "wide_product.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

template <class Order, int Planes>
RowLayout lay_out(const Product& product) {
  const Weight& weight = product.weight;
  RowLayout layout;
  layout.is_grouped = weight.is_grouped();
  layout.inputs = weight.inputs;
  layout.rows = product.rows;
  layout.is_8_bit = product.rounds_rows;
  layout.span = layout.is_grouped     ? weight.group
                : product.rounds_rows ? weight.inputs
                                      : kFreeSpan;
  layout.steps = round_up(weight.inputs, Order::kNumbers) / Order::kNumbers;
  layout.row_bytes = layout.steps * Planes * Order::kPlaneBytes;
  const int64_t numbers = layout.steps * Order::kNumbers;
  // Whole vectors of them, zeros behind those of the row.
  const bool is_one = layout.span == weight.inputs;
  layout.scales = is_one ? 1 : round_up(round_up(numbers, layout.span) / layout.span, kLanes);
  layout.sums = layout.is_grouped ? layout.scales : 1;
  return layout;
}

// Rounds the rows and multiplies.
template <template <class, int> class Way, class Format, int Planes>
void multiply_by_way(const Product& product) {
  using Work = Way<Format, Planes>;
  using Order = typename Work::Order;
  RoundedRows rounded;
  rounded.layout = lay_out<Order, Planes>(product);
  const RowLayout& layout = rounded.layout;
  // AMX reads whole sixteens of rows, and no sum depends on what follows the last one.
  const size_t value_bytes = round_up(layout.rows, std::max(1, kMatrixRows)) * layout.row_bytes;
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
    round_rows<Order, Planes>(mine->product.x, mine->rounded, first, last);
  };
  // Waking the threads costs more than the rounding of a few rows.
  constexpr int64_t kNumbersAtOnce = 1 << 14;
  const int64_t rows_at_once = std::max<int64_t>(1, kNumbersAtOnce / layout.inputs);
  if (layout.rows <= rows_at_once) {
    round(&rounding, 0, layout.rows);
  } else {
    in_parallel(layout.rows, rows_at_once, round, &rounding);
  }
  const Work work(product, rounded);
  const int64_t step = least_step(Work::kOutputsAtOnce, layout.rows * layout.inputs);
  in_parallel(product.weight.outputs, step, work.run, &work);
}

template <class Format, int Planes>
void multiply_integers(const Product& product) {
  if constexpr (Format::kIsWide) {
    if (product.rows >= Format::kWideFrom) return multiply_by_way<WideProduct, Format, Planes>(product);
  }
  if constexpr (!Format::kIsOrdered) multiply_by_way<NarrowProduct, Format, Planes>(product);
}

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
