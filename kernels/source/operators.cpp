// The operators torch.ops.minigpt4_kernels.*: torch's tensors in, torch's tensors out.
//
// Owns   the checks. What passes them is read by the kernels without another.
// Takes  contiguous tensors on the CPU. Uses torch's stable interface alone, so that one build
//        serves later versions of torch.
#include <optional>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "levels.hpp"

namespace {

using minigpt4::Floats;
using minigpt4::Layout;
using minigpt4::Number;
using minigpt4::Product;
using minigpt4::Weight;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] void refuse(const std::string& what) {
  throw std::runtime_error("minigpt4_kernels: " + what);
}

std::string show_shape(const Tensor& tensor) {
  std::string shown = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    shown += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return shown + ")";
}

void require_plain(const Tensor& tensor, const char* name, int64_t dim) {
  if (!tensor.is_cpu()) refuse(std::string(name) + " is not on the CPU.");
  if (tensor.dim() != dim) {
    refuse(std::string(name) + " has the shape " + show_shape(tensor) + "; it should have " +
           std::to_string(dim) + " dimensions.");
  }
  if (!tensor.is_contiguous()) {
    refuse(std::string(name) + " is not contiguous: call .contiguous() first.");
  }
}

void require_shape(const Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
  require_plain(tensor, name, 2);
  if (tensor.size(0) != rows || tensor.size(1) != columns) {
    refuse(std::string(name) + " has the shape " + show_shape(tensor) + "; it should have (" +
           std::to_string(rows) + ", " + std::to_string(columns) + ").");
  }
}

// A tensor in order, of so many blocks of outputs.
void require_blocks(const Tensor& tensor, const char* name, int64_t blocks) {
  require_plain(tensor, name, 3);
  if (tensor.size(0) != blocks || tensor.size(2) != minigpt4::kOrderedOutputs) {
    refuse(std::string(name) + " has the shape " + show_shape(tensor) + "; it should have (" +
           std::to_string(blocks) + ", …, " + std::to_string(minigpt4::kOrderedOutputs) + ").");
  }
}

void require_type(const Tensor& tensor, const char* name, ScalarType type, const char* shown) {
  if (tensor.scalar_type() != type) refuse(std::string(name) + " is not of " + shown + ".");
}

Number number_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Number::float32;
    case ScalarType::Half:
      return Number::float16;
    case ScalarType::BFloat16:
      return Number::bfloat16;
    default:
      refuse(std::string(name) + " is not of float32, float16 or bfloat16.");
  }
}

Floats floats_of(const Tensor& tensor, const char* name) {
  return {tensor.const_data_ptr(), number_of(tensor, name)};
}

const uint8_t* bytes_of(const Tensor& tensor) {
  return static_cast<const uint8_t*>(tensor.const_data_ptr());
}

[[noreturn]] void refuse_scale(const Weight& weight, const Tensor& scale) {
  refuse("scale has the shape " + show_shape(scale) + ", which does not fit a weight of " +
         std::to_string(weight.outputs) + " outputs and " + std::to_string(weight.inputs) +
         " inputs.");
}

void take_groups(Weight& weight, const Tensor& scale) {
  const int64_t groups = scale.size(1);
  if (groups == 0 || weight.inputs % groups != 0) refuse_scale(weight, scale);
  weight.scale = floats_of(scale, "scale");
  weight.group = weight.inputs / groups;
  const bool is_fit = weight.group == 32 || weight.group == 64 || weight.group == 128;
  if (weight.is_grouped() && !is_fit) {
    refuse("groups of " + std::to_string(weight.group) +
           " inputs: only 32, 64 and 128 are computed.");
  }
}

// Fills in the scales, whose shape says how many inputs share one.
void take_scale(Weight& weight, const Tensor& scale) {
  require_plain(scale, "scale", 2);
  if (scale.size(0) != weight.outputs) refuse_scale(weight, scale);
  take_groups(weight, scale);
}

// Checks the rows and multiplies.
Tensor multiply(Product& product, const Tensor& x, const std::optional<Tensor>& bias) {
  const Weight& weight = product.weight;
  require_plain(x, "x", 2);
  if (x.size(1) != weight.inputs) {
    refuse("x has the shape " + show_shape(x) + ", but the weight has " +
           std::to_string(weight.inputs) + " inputs.");
  }
  if (bias) {
    require_plain(*bias, "bias", 1);
    if (bias->size(0) != weight.outputs) {
      refuse("bias has the shape " + show_shape(*bias) + ", but the weight has " +
             std::to_string(weight.outputs) + " outputs.");
    }
    product.bias = floats_of(*bias, "bias");
  }
  product.x = floats_of(x, "x");
  product.rows = x.size(0);
  Tensor y = torch::stable::new_empty(x, {product.rows, weight.outputs});
  product.y = y.mutable_data_ptr();
  if (product.rows > 0 && weight.outputs > 0) minigpt4::level_in_use().kernels.linear(product);
  return y;
}

Tensor linear_int8(const Tensor& x, const Tensor& weight, const Tensor& scale,
                   std::optional<Tensor> zero_point, std::optional<Tensor> bias, bool integer) {
  require_plain(weight, "weight", 2);
  require_type(weight, "weight", ScalarType::Char, "int8");
  Product product;
  product.weight.layout = Layout::int8;
  product.weight.outputs = weight.size(0);
  product.weight.inputs = weight.size(1);
  product.weight.values = bytes_of(weight);
  product.weight.value_stride = weight.size(1);
  product.rounds_rows = integer;
  take_scale(product.weight, scale);
  if (zero_point) {
    require_shape(*zero_point, "zero_point", weight.size(0), scale.size(1));
    require_type(*zero_point, "zero_point", ScalarType::Char, "int8");
    product.weight.zero_points = bytes_of(*zero_point);
  }
  return multiply(product, x, bias);
}

// Words, scales and zero points in order: see product.hpp.
Tensor linear_int4(const Tensor& x, const Tensor& words, const Tensor& scale,
                   std::optional<Tensor> zero_point, std::optional<Tensor> bias, int64_t outputs,
                   bool integer) {
  const int64_t blocks = (outputs + minigpt4::kOrderedOutputs - 1) / minigpt4::kOrderedOutputs;
  require_blocks(words, "words", blocks);
  require_type(words, "words", ScalarType::Int, "int32");
  require_blocks(scale, "scale", blocks);
  Product product;
  product.weight.layout = Layout::int4;
  product.weight.outputs = outputs;
  product.weight.inputs = words.size(1) * 8;
  product.weight.values = bytes_of(words);
  product.rounds_rows = integer;
  take_groups(product.weight, scale);
  if (zero_point) {
    require_blocks(*zero_point, "zero_point", blocks);
    if (zero_point->size(1) != scale.size(1)) {
      refuse("zero_point has the shape " + show_shape(*zero_point) + ", unlike scale.");
    }
    product.weight.ordered_zero_points = floats_of(*zero_point, "zero_point");
  }
  return multiply(product, x, bias);
}

Tensor linear_sparse24_int8(const Tensor& x, const Tensor& values, const Tensor& positions,
                            const Tensor& scale, std::optional<Tensor> bias, bool integer) {
  require_plain(values, "values", 2);
  require_type(values, "values", ScalarType::Char, "int8");
  if (values.size(1) % 4 != 0) {
    refuse("values has the shape " + show_shape(values) + "; 4 should divide its second number.");
  }
  require_shape(positions, "positions", values.size(0), values.size(1) / 4);
  require_type(positions, "positions", ScalarType::Byte, "uint8");
  Product product;
  product.weight.layout = Layout::sparse24_int8;
  product.weight.outputs = values.size(0);
  product.weight.inputs = values.size(1) * 2;
  product.weight.values = bytes_of(values);
  product.weight.value_stride = values.size(1);
  product.weight.positions = bytes_of(positions);
  product.weight.position_stride = positions.size(1);
  product.rounds_rows = integer;
  take_scale(product.weight, scale);
  return multiply(product, x, bias);
}

Tensor linear_float(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias) {
  require_plain(weight, "weight", 2);
  Product product;
  product.weight.type = number_of(weight, "weight");
  product.weight.outputs = weight.size(0);
  product.weight.inputs = weight.size(1);
  product.weight.group = weight.size(1);
  product.weight.values = bytes_of(weight);
  product.weight.value_stride = weight.size(1) * static_cast<int64_t>(weight.element_size());
  return multiply(product, x, bias);
}

// How many groups a head of nibbles has, by its scales: see `GroupScales`.
int64_t take_nibble_groups(const Tensor& scales, int64_t dim) {
  require_type(scales, "scales", ScalarType::Char, "int8");
  const int64_t groups = (scales.size(scales.dim() - 1) - 4) / 2;
  if (scales.size(scales.dim() - 1) != 4 + 2 * groups || groups < 2 || groups > 128 ||
      groups % 2 != 0 || dim % groups != 0) {
    refuse("scales of the shape " + show_shape(scales) + " do not divide a head of " +
           std::to_string(dim) + " numbers.");
  }
  return groups;
}

// The format of a layer's keys and values, and how many groups of a head have their own scale.
void choose_cache_format(minigpt4::Attention& attention, const Tensor& keys, const Tensor* scales) {
  using minigpt4::CacheFormat;
  const auto type = keys.scalar_type();
  attention.format = type == ScalarType::Char   ? CacheFormat::int8
                     : type == ScalarType::Byte ? CacheFormat::int4
                                                : CacheFormat::float32;
  if (attention.format == CacheFormat::float32) {
    if (scales != nullptr) refuse("keys of floats have no scales.");
    const Number number = floats_of(keys, "keys").type;
    if (number == Number::float16) attention.format = CacheFormat::float16;
    if (number == Number::bfloat16) attention.format = CacheFormat::bfloat16;
    return;
  }
  if (scales == nullptr) refuse("keys and values of integers should have scales.");
  const bool is_int8 = attention.format == CacheFormat::int8;
  require_plain(*scales, "scales", is_int8 ? 3 : 4);
  for (int64_t i = 0; i < 3; ++i) {
    if (scales->size(i) != keys.size(i)) {
      refuse("scales of the shape " + show_shape(*scales) + " do not fit keys of the shape " +
             show_shape(keys) + ".");
    }
  }
  if (is_int8) return require_type(*scales, "scales", ScalarType::Float, "float32");
  attention.groups = take_nibble_groups(*scales, 2 * keys.size(3));
}

// (B, H, D) queries, one token of each sequence, over (blocks, block_size, Hkv, D) keys and values,
// which are floats, or integers with scales. The caller answers for lengths and for the blocks in
// the table.
Tensor attend_one(const Tensor& q, const Tensor& keys, const Tensor& values,
                  std::optional<Tensor> key_scales, std::optional<Tensor> value_scales,
                  const Tensor& lengths, const Tensor& table_rows, const Tensor& table,
                  double scale) {
  require_plain(q, "q", 3);
  require_plain(keys, "keys", 4);
  require_plain(values, "values", 4);
  require_plain(lengths, "lengths", 1);
  require_plain(table_rows, "table_rows", 1);
  require_plain(table, "table", 2);
  require_type(lengths, "lengths", ScalarType::Long, "int64");
  require_type(table_rows, "table_rows", ScalarType::Long, "int64");
  require_type(table, "table", ScalarType::Int, "int32");
  if (lengths.size(0) != q.size(0) || table_rows.size(0) != q.size(0)) {
    refuse("lengths and table_rows should have a number for each of the " +
           std::to_string(q.size(0)) + " rows of q.");
  }
  const int64_t per_byte = keys.scalar_type() == ScalarType::Byte ? 2 : 1;
  if (per_byte * keys.size(3) != q.size(2) || keys.size(2) == 0 || q.size(1) % keys.size(2) != 0) {
    refuse("keys of the shape " + show_shape(keys) + " do not fit q of the shape " +
           show_shape(q) + ".");
  }
  const bool is_alike = show_shape(keys) == show_shape(values);
  if (!is_alike || keys.scalar_type() != values.scalar_type()) {
    refuse("keys and values should be of one shape and type.");
  }
  minigpt4::Attention attention;
  choose_cache_format(attention, keys, key_scales ? &*key_scales : nullptr);
  choose_cache_format(attention, values, value_scales ? &*value_scales : nullptr);
  if (key_scales) {
    attention.key_scales = key_scales->const_data_ptr();
    attention.value_scales = value_scales->const_data_ptr();
    if (show_shape(*key_scales) != show_shape(*value_scales)) {
      refuse("keys and values should have scales of one shape.");
    }
  }
  attention.q = floats_of(q, "q");
  attention.keys = keys.const_data_ptr();
  attention.values = values.const_data_ptr();
  attention.lengths = static_cast<const int64_t*>(lengths.const_data_ptr());
  attention.table_rows = static_cast<const int64_t*>(table_rows.const_data_ptr());
  attention.table = static_cast<const int32_t*>(table.const_data_ptr());
  attention.table_width = table.size(1);
  attention.sequences = q.size(0);
  attention.heads = q.size(1);
  attention.key_heads = keys.size(2);
  attention.head_dim = q.size(2);
  attention.block_size = keys.size(1);
  attention.scale = static_cast<float>(scale);
  Tensor y = torch::stable::empty_like(q);
  attention.y = y.mutable_data_ptr();
  if (q.numel() > 0) minigpt4::level_in_use().kernels.attention(attention);
  return y;
}

void require_like(const Tensor& tensor, const char* name, const Tensor& other, const char* like) {
  if (show_shape(tensor) != show_shape(other) || tensor.scalar_type() != other.scalar_type()) {
    refuse(std::string(name) + " of the shape " + show_shape(tensor) + " should be like " + like +
           ", of the shape " + show_shape(other) + ", and of its type.");
  }
}

// (R, C) rows → their norm, by the weight (C). `added` becomes the sum of both.
Tensor add_rms_norm_(const Tensor& hidden, std::optional<Tensor> added, const Tensor& weight,
                     double epsilon) {
  require_plain(hidden, "hidden", 2);
  require_plain(weight, "weight", 1);
  if (weight.size(0) != hidden.size(1)) {
    refuse("weight has the shape " + show_shape(weight) + ", but hidden has " +
           std::to_string(hidden.size(1)) + " columns.");
  }
  minigpt4::Norm norm;
  if (added) {
    require_plain(*added, "added", 2);
    require_like(*added, "added", hidden, "hidden");
    norm.added = added->mutable_data_ptr();
  }
  norm.hidden = hidden.const_data_ptr();
  norm.type = number_of(hidden, "hidden");
  norm.weight = floats_of(weight, "weight");
  norm.rows = hidden.size(0);
  norm.width = hidden.size(1);
  norm.epsilon = static_cast<float>(epsilon);
  Tensor y = torch::stable::empty_like(hidden);
  norm.y = y.mutable_data_ptr();
  if (hidden.numel() > 0) minigpt4::level_in_use().kernels.norm(norm);
  return y;
}

Tensor gate_(const Tensor& gate, const Tensor& up) {
  require_plain(gate, "gate", 2);
  require_plain(up, "up", 2);
  require_like(up, "up", gate, "gate");
  minigpt4::Gate work;
  work.gate = gate.mutable_data_ptr();
  work.up = up.const_data_ptr();
  work.type = number_of(gate, "gate");
  work.count = gate.numel();
  if (work.count > 0) minigpt4::level_in_use().kernels.gate(work);
  return gate;
}

// The head and its groups that a layer's scales (2, blocks, block_size, Hkv, …) are for.
void choose_written_format(minigpt4::CacheWrite& write, const Tensor& numbers,
                           const Tensor& scales) {
  const bool is_int8 = numbers.scalar_type() == ScalarType::Char;
  if (!is_int8) require_type(numbers, "numbers", ScalarType::Byte, "int8 or uint8");
  require_plain(scales, "scales", is_int8 ? 4 : 5);
  bool fits = true;
  for (int64_t i = 0; i < 4; ++i) fits = fits && scales.size(i) == numbers.size(i);
  if (!fits) {
    refuse("scales of the shape " + show_shape(scales) + " do not fit numbers of the shape " +
           show_shape(numbers) + ".");
  }
  if (is_int8) require_type(scales, "scales", ScalarType::Float, "float32");
  write.format = is_int8 ? minigpt4::CacheFormat::int8 : minigpt4::CacheFormat::int4;
  write.head_dim = numbers.size(4) * (is_int8 ? 1 : 2);
  write.groups = is_int8 ? 1 : take_nibble_groups(scales, write.head_dim);
}

// (T, Hkv, D) keys and values into slots (T) of a layer's numbers (2, blocks, block_size, Hkv, …),
// keys as differences from the centre (Hkv, D).
Tensor write_rounded_(const Tensor& numbers, const Tensor& scales, const Tensor& slots,
                      const Tensor& keys, const Tensor& values, std::optional<Tensor> centre) {
  require_plain(numbers, "numbers", 5);
  require_plain(slots, "slots", 1);
  require_plain(keys, "keys", 3);
  require_plain(values, "values", 3);
  require_like(values, "values", keys, "keys");
  require_type(slots, "slots", ScalarType::Long, "int64");
  minigpt4::CacheWrite write;
  choose_written_format(write, numbers, scales);
  write.heads = numbers.size(3);
  if (numbers.size(0) != 2 || keys.size(0) != slots.size(0) || keys.size(1) != write.heads ||
      keys.size(2) != write.head_dim) {
    refuse("keys of the shape " + show_shape(keys) + " do not fit slots of the shape " +
           show_shape(slots) + " and numbers of the shape " + show_shape(numbers) + ".");
  }
  if (centre) {
    require_shape(*centre, "centre", write.heads, write.head_dim);
    require_type(*centre, "centre", ScalarType::Float, "float32");
    write.centre = static_cast<const float*>(centre->const_data_ptr());
  }
  write.tokens = slots.size(0);
  write.num_slots = numbers.size(1) * numbers.size(2);
  write.slots = static_cast<const int64_t*>(slots.const_data_ptr());
  for (int64_t i = 0; i < write.tokens; ++i) {
    if (write.slots[i] < 0 || write.slots[i] >= write.num_slots) {
      refuse("slot " + std::to_string(write.slots[i]) + " is none of the cache's " +
             std::to_string(write.num_slots) + ".");
    }
  }
  write.keys = floats_of(keys, "keys");
  write.values = floats_of(values, "values");
  write.numbers = numbers.mutable_data_ptr();
  write.scales = scales.mutable_data_ptr();
  if (keys.numel() > 0) minigpt4::level_in_use().kernels.write(write);
  return numbers;
}

}  // namespace

STABLE_TORCH_LIBRARY(minigpt4_kernels, library) {
  library.def(
      "linear_int8(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, "
      "bool integer) -> Tensor");
  library.def(
      "linear_int4(Tensor x, Tensor words, Tensor scale, Tensor? zero_point, Tensor? bias, "
      "int outputs, bool integer) -> Tensor");
  library.def(
      "linear_sparse24_int8(Tensor x, Tensor values, Tensor positions, Tensor scale, "
      "Tensor? bias, bool integer) -> Tensor");
  library.def("linear_float(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  library.def(
      "attend_one(Tensor q, Tensor keys, Tensor values, Tensor? key_scales, Tensor? value_scales, "
      "Tensor lengths, Tensor table_rows, Tensor table, float scale) -> Tensor");
  library.def(
      "add_rms_norm_(Tensor hidden, Tensor(a!)? added, Tensor weight, float epsilon) -> Tensor");
  library.def("gate_(Tensor(a!) gate, Tensor up) -> Tensor(a!)");
  library.def(
      "write_rounded_(Tensor(a!) numbers, Tensor(b!) scales, Tensor slots, Tensor keys, "
      "Tensor values, Tensor? centre) -> Tensor(a!)");
}

STABLE_TORCH_LIBRARY_IMPL(minigpt4_kernels, CPU, library) {
  library.impl("linear_int8", TORCH_BOX(&linear_int8));
  library.impl("linear_int4", TORCH_BOX(&linear_int4));
  library.impl("linear_sparse24_int8", TORCH_BOX(&linear_sparse24_int8));
  library.impl("linear_float", TORCH_BOX(&linear_float));
  library.impl("attend_one", TORCH_BOX(&attend_one));
  library.impl("add_rms_norm_", TORCH_BOX(&add_rms_norm_));
  library.impl("gate_", TORCH_BOX(&gate_));
  library.impl("write_rounded_", TORCH_BOX(&write_rounded_));
}

// The levels, for Python's ctypes.
#if defined(_WIN32)
#define MINIGPT4_EXPORT extern "C" __declspec(dllexport)
#else
#define MINIGPT4_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// The name of a level that can be used, or null behind the last.
MINIGPT4_EXPORT const char* minigpt4_kernels_level(int number) {
  for (const auto* level = minigpt4::first_level(); level != minigpt4::last_level(); ++level) {
    if (number-- == 0) return level->name;
  }
  return nullptr;
}

MINIGPT4_EXPORT const char* minigpt4_kernels_level_in_use() {
  return minigpt4::level_in_use().name;
}

MINIGPT4_EXPORT int minigpt4_kernels_use_level(const char* name) {
  return minigpt4::use_level(name) ? 1 : 0;
}
