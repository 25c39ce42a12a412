// Each level that this processor has, against plain loops in double precision, without torch.
//
// Owns   random products of odd sizes, whose memory ends where the tensors end: built with
//        sanitizers, it finds what reads or writes beyond. It also runs where torch does not, as
//        under an emulator of another processor.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../source/levels.hpp"
#include "../source/parallel.hpp"

namespace minigpt4 {

// One thread, several tasks.
int64_t num_threads() { return 1; }

void in_parallel(int64_t count, int64_t step, Task task, const void* work) {
  for (int64_t first = 0; first < count; first += 3 * step) {
    task(work, first, std::min(count, first + 3 * step));
  }
}

}  // namespace minigpt4

namespace {

using namespace minigpt4;

std::mt19937 random_bits(1);
int failures = 0;

int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }
float draw_float() { return std::normal_distribution<float>()(random_bits); }

// Memory of exactly this size, so that a sanitizer sees its end.
template <class T>
std::unique_ptr<T[]> exactly(size_t count) {
  return std::unique_ptr<T[]>(new T[count]());
}

void compare(const char* level, const char* what, const float* found,
             const std::vector<double>& truth, const std::vector<double>& sizes,
             double tolerance = 3e-4) {
  for (size_t i = 0; i < truth.size(); ++i) {
    if (!(std::fabs(found[i] - truth[i]) <= tolerance * sizes[i] + 1e-6)) {
      std::printf("%s: %s: %g is not %g\n", level, what, found[i], truth[i]);
      ++failures;
      return;
    }
  }
}

// A level that has to prove itself, and computes one kind of product wrongly.
template <Layout kLayout, int kRows>
Level lying_level() {
  static constexpr auto linear = [](const Product& product) {
    first_level()->kernels.linear(product);
    const bool is_wrong = product.weight.layout == kLayout && product.rows >= kRows;
    if (is_wrong) static_cast<uint8_t*>(product.y)[3] ^= 0x80;  // A number's sign.
  };
  static const Kernels kernels = {linear, nullptr, nullptr, nullptr, nullptr};
  return {"lying", [] { return true; }, kernels, true};
}

void check_choice() {
  const Level first = *first_level(), honest = {"honest", first.is_supported, first.kernels, true};
  const Level lying[] = {lying_level<Layout::floats, 1>(), lying_level<Layout::int8, 17>(),
                         lying_level<Layout::int4, 17>(), lying_level<Layout::sparse24_int8, 33>()};
  for (const Level& level : lying) {
    const std::vector<Level> usable = usable_levels(std::vector<Level>{first, honest, level});
    if (usable.size() != 2 || usable.back().name != honest.name) {
      std::printf("a level that computes wrongly is not left out, or a right one is\n");
      ++failures;
    }
  }
}

struct Case {
  int rows, outputs, inputs, group;
  bool rounds_rows, has_zero, has_bias;
  Number weight_type = Number::float32, row_type = Number::float32;  // Or bfloat16.

  // Of weights in order: the outputs with those that fill up the last block, and a scale's place.
  int ordered_outputs() const {
    return (outputs + kOrderedOutputs - 1) / kOrderedOutputs * kOrderedOutputs;
  }
  int ordered_scale(int n, int k) const {
    const int block = n / kOrderedOutputs, groups = inputs / group;
    return (block * groups + k / group) * kOrderedOutputs + n % kOrderedOutputs;
  }
};

Case draw_case(int step, bool is_grouped) {
  const int groups[] = {32, 64, 128};
  Case drawn;
  drawn.rows = draw(0, 2) > 0 ? draw(1, 9) : draw(17, 40);  // Many rows take another way.
  drawn.outputs = draw(1, 21);
  drawn.group = is_grouped ? groups[draw(0, 2)] : 0;
  drawn.inputs = is_grouped ? drawn.group * draw(1, 5) : step * draw(1, 700 / step);
  if (!is_grouped) drawn.group = drawn.inputs;
  drawn.rounds_rows = draw(0, 1) == 1;
  drawn.has_zero = draw(0, 1) == 1;
  drawn.has_bias = draw(0, 1) == 1;
  if (draw(0, 1) == 1) drawn.weight_type = Number::bfloat16;
  if (draw(0, 1) == 1) drawn.row_type = Number::bfloat16;
  return drawn;
}

// The row as it is multiplied: rounded to 8 bits, or as it is.
std::vector<double> rounded_row(const float* x, const Case& c) {
  std::vector<double> row(x, x + c.inputs);
  for (int k = 0; c.rounds_rows && k < c.inputs; k += c.group) {
    float most = 1e-30f;
    for (int i = k; i < k + c.group; ++i) most = std::max(most, std::fabs(x[i]));
    const float scale = most / 127;
    for (int i = k; i < k + c.group; ++i) row[i] = std::nearbyintf(x[i] / scale) * scale;
  }
  return row;
}

int size_of(Number type) { return type == Number::bfloat16 ? 2 : 4; }

// bfloat16 is the upper half of a float.
float read(const uint8_t* values, Number type, int i) {
  float value = 0;
  const int size = size_of(type);
  std::memcpy(reinterpret_cast<uint8_t*>(&value) + 4 - size, values + size * i, size);
  return value;
}

// Writes a float, cut off if need be, and gives what was written.
float write(uint8_t* values, Number type, int i, float value) {
  const int size = size_of(type);
  std::memcpy(values + size * i, reinterpret_cast<const uint8_t*>(&value) + 4 - size, size);
  return read(values, type, i);
}

struct Drawn {
  Product product;
  std::unique_ptr<uint8_t[]> values, positions, zero_points, rows, results;
  std::unique_ptr<float[]> x, y, bias, scale, ordered_zero_points;
  std::vector<double> weight;  // (outputs, inputs), as it is meant.
};

void draw_int8(Drawn& drawn, const Case& c) {
  drawn.values = exactly<uint8_t>(c.outputs * c.inputs);
  const int groups = c.inputs / c.group;
  if (c.has_zero) drawn.zero_points = exactly<uint8_t>(c.outputs * groups);
  for (int i = 0; c.has_zero && i < c.outputs * groups; ++i) drawn.zero_points[i] = draw(0, 255);
  for (int i = 0; i < c.outputs * c.inputs; ++i) {
    drawn.values[i] = draw(0, 255);
    const int zero = c.has_zero ? static_cast<int8_t>(drawn.zero_points[i / c.group]) : 0;
    drawn.weight.push_back(static_cast<int8_t>(drawn.values[i]) - zero);
  }
}

// What stands for the places behind the last output is drawn too: no result may depend on it.
void draw_int4(Drawn& drawn, const Case& c) {
  constexpr int kAtOnce = kOrderedOutputs;
  const int groups = c.inputs / c.group, padded = c.ordered_outputs();
  drawn.values = exactly<uint8_t>(padded * c.inputs / 2);
  if (c.has_zero) drawn.ordered_zero_points = exactly<float>(padded * groups);
  for (int i = 0; i < padded * c.inputs / 2; ++i) drawn.values[i] = draw(0, 255);
  for (int i = 0; c.has_zero && i < padded * groups; ++i) drawn.ordered_zero_points[i] = draw(0, 15);
  for (int n = 0; n < c.outputs; ++n) {
    for (int k = 0; k < c.inputs; ++k) {
      const int word = (n / kAtOnce * (c.inputs / 8) + k / 8) * kAtOnce + n % kAtOnce;
      const int nibble = drawn.values[4 * word + k % 8 / 2] >> 4 * (k % 2) & 15;
      const float zero = c.has_zero ? drawn.ordered_zero_points[c.ordered_scale(n, k)] : 8;
      drawn.weight.push_back(nibble - zero);
    }
  }
}

void draw_sparse(Drawn& drawn, const Case& c) {
  drawn.values = exactly<uint8_t>(c.outputs * c.inputs / 2);
  drawn.positions = exactly<uint8_t>(c.outputs * c.inputs / 8);
  drawn.weight.assign(c.outputs * c.inputs, 0);
  for (int four = 0; four < c.outputs * c.inputs / 4; ++four) {
    const int first = draw(0, 2), second = draw(first + 1, 3);
    drawn.positions[four / 2] |= (first | second << 2) << 4 * (four % 2);
    for (int i = 0; i < 2; ++i) {
      drawn.values[2 * four + i] = draw(0, 255);
      const int place = i == 0 ? first : second;
      drawn.weight[4 * four + place] = static_cast<int8_t>(drawn.values[2 * four + i]);
    }
  }
}

void draw_floats(Drawn& drawn, const Case& c) {
  drawn.values = exactly<uint8_t>(c.outputs * c.inputs * size_of(c.weight_type));
  for (int i = 0; i < c.outputs * c.inputs; ++i) {
    drawn.weight.push_back(write(drawn.values.get(), c.weight_type, i, draw_float()));
  }
}

void check_product(const Level& level, const char* what, Layout layout, const Case& c) {
  Drawn drawn;
  Weight& weight = drawn.product.weight;
  weight.value_stride = c.inputs;
  switch (layout) {
    case Layout::int8:
      draw_int8(drawn, c);
      break;
    case Layout::int4:
      draw_int4(drawn, c);
      break;
    case Layout::sparse24_int8:
      draw_sparse(drawn, c);
      weight.value_stride = c.inputs / 2;
      weight.position_stride = c.inputs / 8;
      break;
    case Layout::floats:
      draw_floats(drawn, c);
      weight.value_stride = size_of(c.weight_type) * c.inputs;
      weight.type = c.weight_type;
  }
  const int groups = c.inputs / c.group;
  drawn.x = exactly<float>(c.rows * c.inputs);
  drawn.y = exactly<float>(c.rows * c.outputs);
  drawn.rows = exactly<uint8_t>(c.rows * c.inputs * size_of(c.row_type));
  drawn.results = exactly<uint8_t>(c.rows * c.outputs * size_of(c.row_type));
  const bool is_ordered = layout == Layout::int4;
  const int scales = (is_ordered ? c.ordered_outputs() : c.outputs) * groups;
  drawn.scale = exactly<float>(scales);
  if (c.has_bias) drawn.bias = exactly<float>(c.outputs);
  for (int i = 0; i < c.rows * c.inputs; ++i) {
    drawn.x[i] = write(drawn.rows.get(), c.row_type, i, draw_float());
  }
  for (int i = 0; i < scales; ++i) drawn.scale[i] = 0.1f * draw_float();
  for (int n = 0; c.has_bias && n < c.outputs; ++n) drawn.bias[n] = draw_float();

  weight.layout = layout;
  weight.values = drawn.values.get();
  weight.positions = drawn.positions.get();
  weight.scale = {drawn.scale.get(), Number::float32};
  weight.zero_points = drawn.zero_points.get();
  weight.ordered_zero_points = {drawn.ordered_zero_points.get(), Number::float32};
  weight.outputs = c.outputs;
  weight.inputs = c.inputs;
  weight.group = c.group;
  drawn.product.x = {drawn.rows.get(), c.row_type};
  drawn.product.y = drawn.results.get();
  drawn.product.bias = {drawn.bias.get(), Number::float32};
  drawn.product.rows = c.rows;
  drawn.product.rounds_rows = c.rounds_rows;
  level.kernels.linear(drawn.product);
  for (int i = 0; i < c.rows * c.outputs; ++i) {
    drawn.y[i] = read(drawn.results.get(), c.row_type, i);
  }

  std::vector<double> truth, sizes;
  for (int m = 0; m < c.rows; ++m) {
    const std::vector<double> row = rounded_row(drawn.x.get() + m * c.inputs, c);
    for (int n = 0; n < c.outputs; ++n) {
      double total = 0, size = 0;
      for (int k = 0; k < c.inputs; ++k) {
        const bool is_float = layout == Layout::floats;
        const int place = is_ordered ? c.ordered_scale(n, k) : n * groups + k / c.group;
        const double scale = is_float ? 1 : drawn.scale[place];
        const double term = row[k] * scale * drawn.weight[n * c.inputs + k];
        total += term;
        size += term * term;
      }
      const double bias = c.has_bias ? drawn.bias[n] : 0;
      truth.push_back(total + bias);
      sizes.push_back(std::sqrt(size) + std::fabs(total) + std::fabs(bias));
    }
  }
  const double tolerance = c.row_type == Number::bfloat16 ? 5e-3 : 3e-4;
  compare(level.name, what, drawn.y.get(), truth, sizes, tolerance);
}

// Keys or values of the cache, as they lie there and as they are meant.
struct CacheSide {
  std::unique_ptr<uint8_t[]> numbers, scales;
  std::vector<double> meant;
};

// Normal numbers of float16.
double widened(uint16_t bits) {
  const double size = std::ldexp(1024 + (bits & 1023), (bits >> 10 & 31) - 25);
  return bits & 0x8000 ? -size : size;
}

double group_step(const uint8_t* scales, int group) {
  uint16_t largest;
  std::memcpy(&largest, scales, 2);
  return widened(largest) / 128 * scales[4 + group];
}

double group_lowest(const uint8_t* scales, int groups, int group) {
  uint16_t largest;
  std::memcpy(&largest, scales + 2, 2);
  return widened(largest) / 128 * static_cast<int8_t>(scales[4 + groups + group]);
}

// What the number `at` of a head is read as.
double int4_meant(const uint8_t* numbers, const uint8_t* scales, int64_t head, int dim, int groups,
                  int at) {
  const int size = dim / groups, group = at / size, place = at % size * groups + group;
  const uint8_t byte = numbers[head * dim / 2 + place % (dim / 2)];
  return group_lowest(scales, groups, group) +
         group_step(scales, group) * (byte >> (place < dim / 2 ? 0 : 4) & 15);
}

// As heads of 64 and 128 have, or others.
int draw_groups() { return draw(0, 1) == 0 ? 8 * draw(1, 2) : 2 * draw(1, 10); }

CacheSide draw_side(CacheFormat format, int heads, int dim, int groups) {
  CacheSide side;
  const int count = heads * dim;
  if (format == CacheFormat::float32) {
    side.numbers = exactly<uint8_t>(count * sizeof(float));
    auto* floats = reinterpret_cast<float*>(side.numbers.get());
    for (int i = 0; i < count; ++i) side.meant.push_back(floats[i] = draw_float());
  } else if (format == CacheFormat::int8) {
    side.numbers = exactly<uint8_t>(count);
    side.scales = exactly<uint8_t>(heads * sizeof(float));
    auto* scales = reinterpret_cast<float*>(side.scales.get());
    for (int head = 0; head < heads; ++head) scales[head] = 0.01f * draw_float();
    for (int i = 0; i < count; ++i) {
      side.numbers[i] = draw(0, 255);
      side.meant.push_back(scales[i / dim] * static_cast<int8_t>(side.numbers[i]));
    }
  } else {
    // As float16: 0.125 and 0.25.
    const uint16_t largest[] = {0x3000, 0x3400};
    side.numbers = exactly<uint8_t>(count / 2);
    side.scales = exactly<uint8_t>(heads * (4 + 2 * groups));
    for (int i = 0; i < count / 2; ++i) side.numbers[i] = draw(0, 255);
    for (int head = 0; head < heads; ++head) {
      uint8_t* own = side.scales.get() + head * (4 + 2 * groups);
      const uint16_t both[] = {largest[draw(0, 1)], largest[draw(0, 1)]};
      std::memcpy(own, both, 4);
      for (int g = 0; g < groups; ++g) own[4 + g] = draw(0, 127), own[4 + groups + g] = draw(0, 255);
      for (int i = 0; i < dim; ++i) {
        side.meant.push_back(int4_meant(side.numbers.get(), own, head, dim, groups, i));
      }
    }
  }
  return side;
}

void check_attention(const Level& level, const char* what, CacheFormat format) {
  const int sequences = draw(1, 3), key_heads = draw(1, 3), shares = draw(1, 3);
  const int groups = format == CacheFormat::int4 ? draw_groups() : 1;
  const int dim = format == CacheFormat::int4 ? groups * draw(1, 20) : draw(1, 70);
  const int block_size = draw(1, 8), blocks = 12, heads = key_heads * shares;
  const int longest = 300, width = longest / block_size + 1;  // Several parts of a context.
  auto q = exactly<float>(sequences * heads * dim), y = exactly<float>(sequences * heads * dim);
  const int cached_heads = blocks * block_size * key_heads;
  const CacheSide keys = draw_side(format, cached_heads, dim, groups);
  const CacheSide values = draw_side(format, cached_heads, dim, groups);
  auto lengths = exactly<int64_t>(sequences), rows = exactly<int64_t>(sequences);
  auto table = exactly<int32_t>(sequences * width);
  for (int i = 0; i < sequences * heads * dim; ++i) q[i] = draw_float();
  for (int b = 0; b < sequences; ++b) {
    lengths[b] = draw(1, longest);
    rows[b] = sequences - 1 - b;
  }
  for (int i = 0; i < sequences * width; ++i) table[i] = draw(0, blocks - 1);
  Attention attention;
  attention.q = {q.get(), Number::float32};
  attention.y = y.get();
  attention.format = format;
  attention.keys = keys.numbers.get();
  attention.values = values.numbers.get();
  attention.key_scales = keys.scales.get();
  attention.value_scales = values.scales.get();
  attention.groups = groups;
  attention.lengths = lengths.get();
  attention.table_rows = rows.get();
  attention.table = table.get();
  attention.table_width = width;
  attention.sequences = sequences;
  attention.heads = heads;
  attention.key_heads = key_heads;
  attention.head_dim = dim;
  attention.block_size = block_size;
  attention.scale = 0.3f;
  level.kernels.attention(attention);

  std::vector<double> truth;
  for (int b = 0; b < sequences; ++b) {
    for (int h = 0; h < heads; ++h) {
      std::vector<double> weights, mixed(dim, 0);
      double total = 0;
      const auto at = [&](int t, int i) {
        const int slot = table[rows[b] * width + t / block_size] * block_size + t % block_size;
        return (slot * key_heads + h / shares) * dim + i;
      };
      for (int t = 0; t < lengths[b]; ++t) {
        double score = 0;
        for (int i = 0; i < dim; ++i) score += q[(b * heads + h) * dim + i] * keys.meant[at(t, i)];
        weights.push_back(std::exp(score * 0.3));
        total += weights.back();
      }
      for (int t = 0; t < lengths[b]; ++t) {
        for (int i = 0; i < dim; ++i) mixed[i] += weights[t] / total * values.meant[at(t, i)];
      }
      truth.insert(truth.end(), mixed.begin(), mixed.end());
    }
  }
  compare(level.name, what, y.get(), truth, std::vector<double>(truth.size(), 1));
}

// What is read of a written head is within half a step of what was given.
void check_write(const Level& level, const char* what, CacheFormat format) {
  const bool is_int8 = format == CacheFormat::int8;
  const int heads = draw(1, 3), slots = draw(3, 9), tokens = draw(1, 3);
  const int groups = is_int8 ? 1 : draw_groups(), dim = groups * draw(1, 20);
  const int count = tokens * heads * dim, cached = 2 * slots * heads;
  auto keys = exactly<float>(count), values = exactly<float>(count);
  auto centre = exactly<float>(heads * dim);
  auto there = exactly<int64_t>(tokens);
  for (int i = 0; i < count; ++i) keys[i] = draw_float(), values[i] = draw_float();
  for (int i = 0; i < heads * dim; ++i) centre[i] = 10 * draw_float();
  for (int t = 0; t < tokens; ++t) there[t] = slots - 1 - t;
  auto numbers = exactly<uint8_t>(cached * dim / (is_int8 ? 1 : 2));
  const int scale_bytes = 4 + (is_int8 ? 0 : 2 * groups);
  auto scales = exactly<uint8_t>(cached * scale_bytes);
  const CacheWrite write = {format, numbers.get(), scales.get(), there.get(),
                            {keys.get(), Number::float32}, {values.get(), Number::float32},
                            centre.get(), tokens, slots, heads, dim, groups};
  level.kernels.write(write);
  for (int i = 0; i < 2 * count; ++i) {
    const bool is_key = i < count;
    const int token = i % count / (heads * dim), place = i % (heads * dim), at = place % dim;
    const double given = is_key ? keys[i] - centre[place] : values[i - count];
    const int64_t head = ((is_key ? 0 : slots) + there[token]) * heads + place / dim;
    double found, bound;
    if (is_int8) {
      const double scale = reinterpret_cast<const float*>(scales.get())[head];
      found = scale * static_cast<int8_t>(numbers[head * dim + at]);
      bound = scale * 0.5001;
    } else {
      const uint8_t* own = scales.get() + head * scale_bytes;
      found = int4_meant(numbers.get(), own, head, dim, groups, at);
      // Half a step, and what the 127ths of both scales lose.
      uint16_t largest[2];
      std::memcpy(largest, own, 4);
      bound = group_step(own, at / (dim / groups)) * 0.51 +
              (15 * widened(largest[0]) + widened(largest[1])) / 250;
    }
    if (!(std::fabs(found - given) <= bound + 1e-3)) {
      std::printf("%s: %s: %g is not %g\n", level.name, what, found, given);
      ++failures;
      return;
    }
  }
}

}  // namespace

// The number of rounds may be given.
int main(int count, char** words) {
  const int rounds = count > 1 ? std::atoi(words[1]) : 60;
  for (const Level* level = first_level(); level != last_level(); ++level) {
    for (int i = 0; i < rounds; ++i) {
      const bool is_grouped = draw(0, 1) == 1;
      check_product(*level, "int8", Layout::int8, draw_case(1, is_grouped));
      check_product(*level, "int4", Layout::int4, draw_case(32, true));
      check_product(*level, "sparse", Layout::sparse24_int8, draw_case(8, is_grouped));
      Case floats = draw_case(1, false);
      floats.rounds_rows = false;
      if (draw(0, 3) == 0) floats.outputs = draw(22, 260);  // Several blocks of many rows.
      check_product(*level, "floats", Layout::floats, floats);
      check_attention(*level, "attention", CacheFormat::float32);
      check_attention(*level, "attention over int8", CacheFormat::int8);
      check_attention(*level, "attention over int4", CacheFormat::int4);
      check_write(*level, "writing int8", CacheFormat::int8);
      check_write(*level, "writing int4", CacheFormat::int4);
    }
    std::printf("%s: %d rounds\n", level->name, rounds);
  }
  check_choice();
  return failures == 0 ? 0 : 1;
}
