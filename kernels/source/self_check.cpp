#include "self_check.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace minigpt4 {
namespace {

struct Case {
  Layout layout;
  int64_t rows, outputs, inputs, group;
  bool rounds_rows, has_zero;
};

// Few rows and many of each kind, groups and none, and sizes that fill no whole tile.
constexpr Case kCases[] = {
    {Layout::floats, 7, 6, 107, 107, false, false},
    {Layout::int8, 3, 6, 192, 192, true, false},
    {Layout::int8, 21, 40, 192, 192, true, false},
    {Layout::int8, 21, 20, 96, 32, true, true},
    {Layout::int8, 21, 20, 300, 300, false, false},
    {Layout::int4, 1, 20, 256, 128, false, true},
    {Layout::int4, 37, 20, 256, 128, true, true},
    {Layout::int4, 21, 20, 128, 32, false, false},
    {Layout::sparse24_int8, 3, 9, 160, 32, true, false},
    {Layout::sparse24_int8, 37, 9, 136, 136, true, false},
};

// The same numbers on each machine.
class Draw {
 public:
  uint8_t byte() {
    state_ = state_ * 1664525 + 1013904223;
    return static_cast<uint8_t>(state_ >> 24);
  }
  float number() { return (byte() - 128) / 64.0f; }  // Exact in bfloat16.
  std::vector<float> numbers(int64_t count) {
    std::vector<float> drawn(count);
    for (float& each : drawn) each = number();
    return drawn;
  }

 private:
  uint32_t state_ = 1;
};

std::vector<uint16_t> to_bfloat16(const std::vector<float>& exact) {
  std::vector<uint16_t> narrow;
  for (const float each : exact) {
    uint32_t bits;
    std::memcpy(&bits, &each, sizeof bits);
    narrow.push_back(static_cast<uint16_t>(bits >> 16));
  }
  return narrow;
}

std::vector<float> from_bfloat16(const std::vector<uint16_t>& narrow) {
  std::vector<float> wide(narrow.size());
  for (size_t i = 0; i < narrow.size(); ++i) {
    const uint32_t bits = static_cast<uint32_t>(narrow[i]) << 16;
    std::memcpy(&wide[i], &bits, sizeof bits);
  }
  return wide;
}

// Rows and weights of bfloat16.
std::vector<float> multiply_floats(const Kernels& kernels, const Case& c) {
  Draw draw;
  const auto values = to_bfloat16(draw.numbers(c.outputs * c.inputs));
  const auto x = to_bfloat16(draw.numbers(c.rows * c.inputs));
  std::vector<uint16_t> y(c.rows * c.outputs);
  Product product;
  Weight& weight = product.weight;
  weight.values = reinterpret_cast<const uint8_t*>(values.data());
  weight.value_stride = 2 * c.inputs;
  weight.type = Number::bfloat16;
  weight.outputs = c.outputs;
  weight.inputs = weight.group = c.inputs;
  product.x = {x.data(), Number::bfloat16};
  product.y = y.data();
  product.rows = c.rows;
  kernels.linear(product);
  return from_bfloat16(y);
}

std::vector<float> multiply_integers(const Kernels& kernels, const Case& c) {
  Draw draw;
  const bool is_sparse = c.layout == Layout::sparse24_int8, is_ordered = c.layout == Layout::int4;
  const int64_t outputs = (c.outputs + kOrderedOutputs - 1) / kOrderedOutputs * kOrderedOutputs;
  const int64_t scales = outputs * (c.inputs / c.group);
  constexpr uint8_t kPlaces[] = {4, 8, 12, 9, 13, 14};  // Each two of four.
  std::vector<uint8_t> values(outputs * c.inputs), positions(outputs * c.inputs / 8), zeros(scales);
  for (uint8_t& each : values) each = draw.byte();
  for (uint8_t& each : zeros) each = draw.byte();
  for (uint8_t& each : positions) {
    each = static_cast<uint8_t>(kPlaces[draw.byte() % 6] | kPlaces[draw.byte() % 6] << 4);
  }
  const std::vector<float> scale = draw.numbers(scales), ordered_zeros = draw.numbers(scales);
  const std::vector<float> x = draw.numbers(c.rows * c.inputs);
  std::vector<float> y(c.rows * c.outputs);
  Product product;
  Weight& weight = product.weight;
  weight.layout = c.layout;
  weight.values = values.data();
  weight.positions = positions.data();
  weight.value_stride = is_sparse ? c.inputs / 2 : c.inputs;
  weight.position_stride = c.inputs / 8;
  weight.scale = {scale.data(), Number::float32};
  if (c.has_zero && !is_ordered) weight.zero_points = zeros.data();
  if (c.has_zero && is_ordered) weight.ordered_zero_points = {ordered_zeros.data(), Number::float32};
  weight.outputs = c.outputs;
  weight.inputs = c.inputs;
  weight.group = c.group;
  product.x = {x.data(), Number::float32};
  product.y = y.data();
  product.rows = c.rows;
  product.rounds_rows = c.rounds_rows;
  kernels.linear(product);
  return y;
}

}  // namespace

bool agree(const Kernels& kernels, const Kernels& reference) {
  for (const Case& c : kCases) {
    const bool is_float = c.layout == Layout::floats;
    const auto multiply = is_float ? multiply_floats : multiply_integers;
    const std::vector<float> found = multiply(kernels, c), expected = multiply(reference, c);
    float largest = 0;
    for (const float each : expected) largest = std::max(largest, std::fabs(each));
    // Results of bfloat16 are rounded; elsewhere the sums' order alone may differ.
    const float limit = (is_float ? 1e-2f : 1e-3f) * largest;
    for (size_t i = 0; i < expected.size(); ++i) {
      if (!(std::fabs(found[i] - expected[i]) <= limit)) return false;
    }
  }
  return true;
}

}  // namespace minigpt4
