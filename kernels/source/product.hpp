// What a product of rows with a weight is, as plain data that all levels share.
//
// Owns   nothing: the pointers are those of torch's tensors, which outlive the call.
// Never  names a vector instruction.
#pragma once

#include <cstdint>

namespace minigpt4 {

enum class Number { float32, float16, bfloat16 };

// Floats of any of these types, as they lie in a tensor.
struct Floats {
  const void* data = nullptr;
  Number type = Number::float32;
};

enum class Layout { floats, int8, int4, sparse24_int8 };

// 4-bit weights lie in order: blocks of so many outputs, the last one filled up. Words of 8 numbers are
// (blocks, inputs / 8, kOrderedOutputs), scales and zero points (blocks, groups, kOrderedOutputs).
constexpr int kOrderedOutputs = 16;

// One weight (outputs, inputs). `group` is how many inputs of a row share a scale: all of them
// where it equals `inputs`.
struct Weight {
  Layout layout = Layout::floats;
  const uint8_t* values = nullptr;
  const uint8_t* positions = nullptr;  // Of 2:4 weights only.
  int64_t value_stride = 0;            // Bytes from one row to the next.
  int64_t position_stride = 0;
  Number type = Number::float32;  // Of float weights only.
  Floats scale;                   // (outputs, inputs / group); of 4-bit weights in order.
  const uint8_t* zero_points = nullptr;  // int8 (outputs, groups)
  Floats ordered_zero_points;            // Of 4-bit weights only. Without data: 8 everywhere.
  int64_t outputs = 0;
  int64_t inputs = 0;
  int64_t group = 0;

  int64_t groups() const { return inputs / group; }
  bool is_grouped() const { return group < inputs || layout == Layout::int4; }
};

// y (rows, outputs) = x (rows, inputs) · weightᵀ + bias. x and y are of one type.
struct Product {
  Weight weight;
  Floats x;
  void* y = nullptr;
  Floats bias;  // Without data: none.
  int64_t rows = 0;
  bool rounds_rows = false;  // Rows become 8-bit integers; otherwise they keep 16 bits.
};

// Floats; int8 with a float32 scale for each head of a token; nibbles with a step and a lowest for
// each group of a head (group_scales.hpp).
enum class CacheFormat { float32, float16, bfloat16, int8, int4 };

// One token of each sequence over keys and values in blocks: (B, H, D) → (B, H, D).
struct Attention {
  Floats q;
  void* y = nullptr;
  // Both (blocks, block_size, key_heads, head_dim), or head_dim / 2 bytes of nibbles.
  CacheFormat format = CacheFormat::float32;
  const void* keys = nullptr;
  const void* values = nullptr;
  const void* key_scales = nullptr;  // (blocks, block_size, key_heads, …), of integers only.
  const void* value_scales = nullptr;
  int64_t groups = 1;  // Of a head of nibbles: how many have their own step. An even number.
  const int64_t* lengths = nullptr;     // (B,)
  const int64_t* table_rows = nullptr;  // (B,)
  const int32_t* table = nullptr;       // (…, table_width)
  int64_t table_width = 0;
  int64_t sequences = 0, heads = 0, key_heads = 0, head_dim = 0, block_size = 0;
  float scale = 0;
};

// New keys and values (tokens, heads, head_dim) into a layer of a cache of int8 or nibbles, whose keys
// are kept as differences from a centre, if there is one.
struct CacheWrite {
  CacheFormat format = CacheFormat::int8;
  void* numbers = nullptr;  // (2, num_slots, heads, head_dim), or head_dim / 2 bytes of nibbles.
  void* scales = nullptr;   // (2, num_slots, heads), of nibbles as `GroupScales` reads them.
  const int64_t* slots = nullptr;  // (tokens), below num_slots.
  Floats keys, values;
  const float* centre = nullptr;  // (heads, head_dim)
  int64_t tokens = 0, num_slots = 0, heads = 0, head_dim = 0, groups = 1;
};

// Rows (rows, width) at unit root mean square, times a weight → y. With `added`, of hidden + added,
// which takes the place of `added`.
struct Norm {
  const void* hidden = nullptr;
  void* added = nullptr;
  Number type = Number::float32;  // Of hidden, added and y.
  Floats weight;                  // (width)
  void* y = nullptr;
  int64_t rows = 0, width = 0;
  float epsilon = 0;
};

// silu(gate) · up, in place of gate.
struct Gate {
  void* gate = nullptr;
  const void* up = nullptr;
  Number type = Number::float32;  // Of both.
  int64_t count = 0;
};

// What one level of instructions computes.
struct Kernels {
  void (*linear)(const Product&);
  void (*attention)(const Attention&);
  void (*norm)(const Norm&);
  void (*gate)(const Gate&);
  void (*write)(const CacheWrite&);
};

}  // namespace minigpt4
