// Attention of one token of each sequence over keys and values in blocks.
//
// Owns   the softmax, in float32, the reading of each format of the cache, and the division of a
//        sequence's heads over threads.
//
// A token's keys of all heads lie side by side, so a thread takes neighbouring heads.
#pragma once

#include <algorithm>
#include <cmath>

#include "integer_rows.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

// How a format's keys and values are read. `head` counts heads through all tokens.
template <Number type>
struct CachedFloats {
  const void* numbers;
  int64_t dim;

  CachedFloats(const Attention& a, const void* numbers, const void*)
      : numbers(numbers), dim(a.head_dim) {}

  // What a dot product wants of q, which comes to it as `sums`.
  static int64_t sums_per_head(const Attention&) { return 0; }
  void sum_up(const float*, float*) const {}

  Float load_some(int64_t index) const {
    if (type == Number::float32) return load(static_cast<const float*>(numbers) + index);
    const uint16_t* bits = static_cast<const uint16_t*>(numbers) + index;
    return type == Number::bfloat16 ? load_bfloat16(bits) : load_float16(bits);
  }

  float dot(const float* q, const float*, int64_t head) const {
    const int64_t index = head * dim;
    Float first = zero(), second = zero();
    int64_t i = 0;
    for (; i + 2 * kLanes <= dim; i += 2 * kLanes) {
      first = multiply_add(load(q + i), load_some(index + i), first);
      second = multiply_add(load(q + i + kLanes), load_some(index + i + kLanes), second);
    }
    float rest = 0;
    for (; i < dim; ++i) rest += q[i] * load_one({numbers, type}, index + i);
    return sum(MINIGPT4_LEVEL::add(first, second)) + rest;
  }

  void add(float* y, float weight, int64_t head) const {
    const int64_t index = head * dim;
    const Float weights = set(weight);
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) {
      store(y + i, multiply_add(weights, load_some(index + i), load(y + i)));
    }
    for (; i < dim; ++i) y[i] += weight * load_one({numbers, type}, index + i);
  }
};

// Bytes with one float32 scale for each head.
struct CachedInt8 {
  const int8_t* numbers;
  const float* scales;
  int64_t dim;

  CachedInt8(const Attention& a, const void* numbers, const void* scales)
      : numbers(static_cast<const int8_t*>(numbers)),
        scales(static_cast<const float*>(scales)),
        dim(a.head_dim) {}

  static int64_t sums_per_head(const Attention&) { return 0; }
  void sum_up(const float*, float*) const {}

  float dot(const float* q, const float*, int64_t head) const {
    const int8_t* own = numbers + head * dim;
    Float first = zero(), second = zero();
    int64_t i = 0;
    for (; i + 2 * kLanes <= dim; i += 2 * kLanes) {
      first = multiply_add(load(q + i), load_int8(own + i), first);
      second = multiply_add(load(q + i + kLanes), load_int8(own + i + kLanes), second);
    }
    float rest = 0;
    for (; i < dim; ++i) rest += q[i] * own[i];
    return (sum(MINIGPT4_LEVEL::add(first, second)) + rest) * scales[head];
  }

  void add(float* y, float weight, int64_t head) const {
    const int8_t* own = numbers + head * dim;
    const float scaled = weight * scales[head];
    const Float weights = set(scaled);
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) {
      store(y + i, multiply_add(weights, load_int8(own + i), load(y + i)));
    }
    for (; i < dim; ++i) y[i] += scaled * own[i];
  }
};

// Nibbles, and a float16 step and lowest for each group of them. A byte has a number of a group's
// first half in its low bits, and that of the same place in the second half.
struct CachedInt4 {
  static constexpr int64_t kMostScales = 256;
  const uint8_t* numbers;
  const uint16_t* scales;
  int64_t dim, half, groups;

  CachedInt4(const Attention& a, const void* numbers, const void* scales)
      : numbers(static_cast<const uint8_t*>(numbers)),
        scales(static_cast<const uint16_t*>(scales)),
        dim(a.head_dim),
        half(a.head_dim / a.groups / 2),
        groups(a.groups) {}

  static int64_t sums_per_head(const Attention& a) { return a.groups; }
  void sum_up(const float* q, float* sums) const {
    for (int64_t g = 0; g < groups; ++g) {
      sums[g] = 0;
      for (int64_t i = 0; i < 2 * half; ++i) sums[g] += q[2 * half * g + i];
    }
  }

  float dot(const float* q, const float* sums, int64_t head) const {
    float own_scales[kMostScales];
    load_row({scales, Number::float16}, 2 * groups * head, 2 * groups, own_scales);
    const uint8_t* own = numbers + head * dim / 2;
    Float total = zero();
    float rest = 0;
    for (int64_t g = 0; g < groups; ++g, own += half, q += 2 * half) {
      Float low_sum = zero(), high_sum = zero(), low, high;
      int64_t i = 0;
      for (; i + kLanes <= half; i += kLanes) {
        load_nibbles(own + i, low, high);
        low_sum = multiply_add(load(q + i), low, low_sum);
        high_sum = multiply_add(load(q + half + i), high, high_sum);
      }
      float few = 0;
      for (; i < half; ++i) few += q[i] * (own[i] & 15) + q[half + i] * (own[i] >> 4);
      const Float both = MINIGPT4_LEVEL::add(low_sum, high_sum);
      total = multiply_add(set(own_scales[2 * g]), both, total);
      rest += own_scales[2 * g] * few + own_scales[2 * g + 1] * sums[g];
    }
    return sum(total) + rest;
  }

  void add(float* y, float weight, int64_t head) const {
    float own_scales[kMostScales];
    load_row({scales, Number::float16}, 2 * groups * head, 2 * groups, own_scales);
    const uint8_t* own = numbers + head * dim / 2;
    for (int64_t g = 0; g < groups; ++g, own += half, y += 2 * half) {
      const float step = weight * own_scales[2 * g], lowest = weight * own_scales[2 * g + 1];
      const Float steps = set(step), lowests = set(lowest);
      Float low, high;
      int64_t i = 0;
      for (; i + kLanes <= half; i += kLanes) {
        load_nibbles(own + i, low, high);
        const Float first = MINIGPT4_LEVEL::add(load(y + i), lowests);
        const Float second = MINIGPT4_LEVEL::add(load(y + half + i), lowests);
        store(y + i, multiply_add(steps, low, first));
        store(y + half + i, multiply_add(steps, high, second));
      }
      for (; i < half; ++i) {
        y[i] += step * (own[i] & 15) + lowest;
        y[half + i] += step * (own[i] >> 4) + lowest;
      }
    }
  }
};

// e^x for x ≤ 0 to 2e-7 of itself, without a branch, so that compilers make vectors of a loop.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  // Added to this number, another loses its fraction, and its whole part is the lowest bits.
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float whole = shifted - 12582912.0f;
  const float rest = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;
  float power = 1.0f / 720;
  power = power * rest + 1.0f / 120;
  power = power * rest + 1.0f / 24;
  power = power * rest + 1.0f / 6;
  power = power * rest + 0.5f;
  power = power * rest + 1.0f;
  power = power * rest + 1.0f;
  return power * from_bits((to_bits(shifted) << 23) + 0x3f800000);
}

// Scores → weights that add up to one.
inline void softmax(float* scores, int64_t count) {
  Float largest = set(scores[0]), total = zero();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) largest = max(load(scores + i), largest);
  float most = max_lane(largest);
  for (; i < count; ++i) most = std::max(most, scores[i]);
  for (i = 0; i < count; ++i) scores[i] = exponential(scores[i] - most);
  for (i = 0; i + kLanes <= count; i += kLanes) total = add(total, load(scores + i));
  float all = sum(total);
  for (; i < count; ++i) all += scores[i];
  for (i = 0; i < count; ++i) scores[i] /= all;
}

template <class Cached>
class AttendingHeads {
 public:
  explicit AttendingHeads(const Attention& attention)
      : a_(attention),
        keys_(attention, attention.keys, attention.key_scales),
        values_(attention, attention.values, attention.value_scales) {}

  // Heads are counted through all sequences.
  static void run(const void* work, int64_t first, int64_t last) {
    const auto* mine = static_cast<const AttendingHeads*>(work);
    while (first < last) {
      const int64_t sequence = first / mine->a_.heads;
      const int64_t end = std::min(last, (sequence + 1) * mine->a_.heads);
      const int64_t head = first - sequence * mine->a_.heads;
      mine->attend(sequence, head, end - first + head);
      first = end;
    }
  }

 private:
  void attend(int64_t sequence, int64_t first, int64_t last) const {
    const int64_t length = a_.lengths[sequence], heads = last - first, dim = a_.head_dim;
    const int64_t num_sums = Cached::sums_per_head(a_);
    const int64_t size = heads * (2 * dim + length + num_sums);
    float* q = static_cast<float*>(scratch(3, size * sizeof(float)));
    float* y = q + heads * dim;
    float* scores = y + heads * dim;  // (heads, length)
    float* sums = scores + heads * length;
    const int64_t start = (sequence * a_.heads + first) * dim;
    load_row(a_.q, start, heads * dim, q);
    for (int64_t i = 0; i < heads * dim; ++i) q[i] *= a_.scale;
    for (int64_t h = 0; h < heads; ++h) keys_.sum_up(q + h * dim, sums + h * num_sums);
    const int32_t* blocks = a_.table + a_.table_rows[sequence] * a_.table_width;
    const int64_t shares = a_.heads / a_.key_heads;
    for (int64_t t = 0; t < length; ++t) {
      const int64_t token = token_at(blocks, t);
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t head = token * a_.key_heads + (first + h) / shares;
        scores[h * length + t] = keys_.dot(q + h * dim, sums + h * num_sums, head);
      }
    }
    for (int64_t h = 0; h < heads; ++h) softmax(scores + h * length, length);
    std::memset(y, 0, heads * dim * sizeof(float));
    for (int64_t t = 0; t < length; ++t) {
      const int64_t token = token_at(blocks, t);
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t head = token * a_.key_heads + (first + h) / shares;
        values_.add(y + h * dim, scores[h * length + t], head);
      }
    }
    for (int64_t i = 0; i < heads * dim; ++i) store_one(a_.y, a_.q.type, start + i, y[i]);
  }

  int64_t token_at(const int32_t* blocks, int64_t t) const {
    return blocks[t / a_.block_size] * a_.block_size + t % a_.block_size;
  }

  const Attention& a_;
  const Cached keys_, values_;
};

template <class Cached>
void attend_of(const Attention& attention) {
  const AttendingHeads<Cached> work(attention);
  // A thread's heads are those that lie side by side, and all that share a key.
  const int64_t shares = attention.heads / attention.key_heads;
  const int64_t step = round_up(std::max<int64_t>(1, attention.heads / 8), shares);
  int64_t tokens = 0;
  for (int64_t i = 0; i < attention.sequences; ++i) tokens += attention.lengths[i];
  const int64_t cost = 2 * attention.head_dim * tokens / attention.sequences;
  const int64_t heads = attention.sequences * attention.heads;
  in_parallel(heads, least_step(step, cost), work.run, &work);
}

static void attention(const Attention& attention) {
  switch (attention.format) {
    case CacheFormat::float32:
      return attend_of<CachedFloats<Number::float32>>(attention);
    case CacheFormat::float16:
      return attend_of<CachedFloats<Number::float16>>(attention);
    case CacheFormat::bfloat16:
      return attend_of<CachedFloats<Number::bfloat16>>(attention);
    case CacheFormat::int8:
      return attend_of<CachedInt8>(attention);
    case CacheFormat::int4:
      return attend_of<CachedInt4>(attention);
  }
}

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
