// Attention of one token of each sequence over keys and values in blocks.
//
// Owns   the softmax, in float32, and the division of a sequence's heads over threads.
//
// A token's keys of all heads lie side by side, so a thread takes neighbouring heads.
#pragma once

#include <algorithm>
#include <cmath>

#include "integer_rows.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

template <Number type>
MINIGPT4_INLINE Float load_cached(const void* cache, int64_t index) {
  if (type == Number::float32) return load(static_cast<const float*>(cache) + index);
  const uint16_t* bits = static_cast<const uint16_t*>(cache) + index;
  return type == Number::bfloat16 ? load_bfloat16(bits) : load_float16(bits);
}

template <Number type>
float dot_cached(const float* q, const void* keys, int64_t index, int64_t count) {
  Float first = zero(), second = zero();
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    first = multiply_add(load(q + i), load_cached<type>(keys, index + i), first);
    second = multiply_add(load(q + i + kLanes), load_cached<type>(keys, index + i + kLanes),
                          second);
  }
  float rest = 0;
  for (; i < count; ++i) rest += q[i] * load_one({keys, type}, index + i);
  return sum(add(first, second)) + rest;
}

template <Number type>
void add_cached(float* y, float weight, const void* values, int64_t index, int64_t count) {
  const Float weights = set(weight);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(y + i, multiply_add(weights, load_cached<type>(values, index + i), load(y + i)));
  }
  for (; i < count; ++i) y[i] += weight * load_one({values, type}, index + i);
}

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

template <Number type>
class AttendingHeads {
 public:
  explicit AttendingHeads(const Attention& attention) : a_(attention) {}

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
    float* q = static_cast<float*>(scratch(3, heads * (2 * dim + length) * sizeof(float)));
    float* y = q + heads * dim;
    float* scores = y + heads * dim;  // (heads, length)
    const int64_t start = (sequence * a_.heads + first) * dim;
    load_row(a_.q, start, heads * dim, q);
    for (int64_t i = 0; i < heads * dim; ++i) q[i] *= a_.scale;
    const int32_t* blocks = a_.table + a_.table_rows[sequence] * a_.table_width;
    const int64_t shares = a_.heads / a_.key_heads;
    for (int64_t t = 0; t < length; ++t) {
      const int64_t token = token_at(blocks, t);
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t index = (token * a_.key_heads + (first + h) / shares) * dim;
        scores[h * length + t] = dot_cached<type>(q + h * dim, a_.keys.data, index, dim);
      }
    }
    for (int64_t h = 0; h < heads; ++h) softmax(scores + h * length, length);
    std::memset(y, 0, heads * dim * sizeof(float));
    for (int64_t t = 0; t < length; ++t) {
      const int64_t token = token_at(blocks, t);
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t index = (token * a_.key_heads + (first + h) / shares) * dim;
        add_cached<type>(y + h * dim, scores[h * length + t], a_.values, index, dim);
      }
    }
    for (int64_t i = 0; i < heads * dim; ++i) store_one(a_.y, a_.q.type, start + i, y[i]);
  }

  int64_t token_at(const int32_t* blocks, int64_t t) const {
    return blocks[t / a_.block_size] * a_.block_size + t % a_.block_size;
  }

  const Attention& a_;
};

template <Number type>
void attend_of(const Attention& attention) {
  const AttendingHeads<type> work(attention);
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
  switch (attention.keys.type) {
    case Number::float32:
      return attend_of<Number::float32>(attention);
    case Number::float16:
      return attend_of<Number::float16>(attention);
    case Number::bfloat16:
      return attend_of<Number::bfloat16>(attention);
  }
}

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
