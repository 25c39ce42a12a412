// Attention of one token of each sequence over keys and values in blocks.
//
// Owns   the softmax, in float32, the reading of each format of the cache, and the division of
//        contexts over threads.
//
// A token's keys of all heads lie side by side, so a thread takes some tokens with all their heads:
// it reads memory in long runs. What the parts of a context give is joined as in Flash-Decoding
// (Dao et al., 2023). Their size does not depend on threads, and neither do answers.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>
#include <utility>

#include "group_scales.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

// y += the weighted sum of `count` tokens' vectors, whose lanes from i on `load_some(t, i)` gives.
template <class LoadSome>
void add_some(float* y, const float* weights, int64_t count, int64_t dim, LoadSome load_some) {
  constexpr int kVectors = 4;
  int64_t i = 0;
  for (; i + kVectors * kLanes <= dim; i += kVectors * kLanes) {
    Float sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = load(y + i + v * kLanes);
    for (int64_t t = 0; t < count; ++t) {
      const Float weight = set(weights[t]);
      for (int v = 0; v < kVectors; ++v) {
        sums[v] = multiply_add(weight, load_some(t, i + v * kLanes), sums[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) store(y + i + v * kLanes, sums[v]);
  }
  for (; i + kLanes <= dim; i += kLanes) {
    Float sum = load(y + i);
    for (int64_t t = 0; t < count; ++t) sum = multiply_add(set(weights[t]), load_some(t, i), sum);
    store(y + i, sum);
  }
}

// How a format's keys and values are read. `head` counts heads through all tokens, and `stride` of
// them lie between a head and the same of the next token. `add` may change the weights.
template <Number type>
struct CachedFloats {
  static constexpr int64_t kTokensAtOnce = 4;
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

  const void* scales = nullptr;
  int64_t bytes_per_head() const { return dim * (type == Number::float32 ? 4 : 2); }
  int64_t scale_bytes_per_head() const { return 0; }

  void add(float* y, float* weights, int64_t count, int64_t head, int64_t stride) const {
    add_some(y, weights, count, dim, [&](int64_t t, int64_t i) MINIGPT4_LAMBDA {
      return load_some((head + t * stride) * dim + i);
    });
    for (int64_t i = dim / kLanes * kLanes; i < dim; ++i) {
      for (int64_t t = 0; t < count; ++t) {
        y[i] += weights[t] * load_one({numbers, type}, (head + t * stride) * dim + i);
      }
    }
  }
};

// Bytes with one float32 scale for each head.
struct CachedInt8 {
  static constexpr int64_t kTokensAtOnce = 8;
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

  int64_t bytes_per_head() const { return dim; }
  int64_t scale_bytes_per_head() const { return sizeof(float); }

  void add(float* y, float* weights, int64_t count, int64_t head, int64_t stride) const {
    const int8_t* own = numbers + head * dim;
    for (int64_t t = 0; t < count; ++t) weights[t] *= scales[head + t * stride];
    add_some(y, weights, count, dim, [&](int64_t t, int64_t i) MINIGPT4_LAMBDA {
      return load_int8(own + t * stride * dim + i);
    });
    for (int64_t i = dim / kLanes * kLanes; i < dim; ++i) {
      for (int64_t t = 0; t < count; ++t) y[i] += weights[t] * own[t * stride * dim + i];
    }
  }
};

// Nibbles in groups, each with a step and a lowest. In memory come the first numbers of all groups,
// then the second ones, and so on; a byte has one of the first half of these in its low bits, and that
// of the same place in the second half. So a lane of a vector has the same group again and again, and
// sums of a lane are multiplied by its step once.
struct CachedInt4 {
  static constexpr int64_t kTokensAtOnce = 16;
  const uint8_t* numbers;
  const uint8_t* scales;
  // Number i has the scales i % period, which are those of all groups, several times where there are
  // more lanes. Vectors take the first `wide` of these: all, or none where lanes do not divide them.
  int64_t half, groups, period, wide;

  CachedInt4(const Attention& a, const void* numbers, const void* scales)
      : numbers(static_cast<const uint8_t*>(numbers)),
        scales(static_cast<const uint8_t*>(scales)),
        half(a.head_dim / 2),
        groups(a.groups),
        period(kLanes % a.groups == 0 && half % kLanes == 0 ? kLanes : a.groups),
        wide(period % kLanes == 0 && half % period == 0 ? period : 0) {}

  static int64_t sums_per_head(const Attention& a) { return std::max<int64_t>(a.groups, kLanes); }
  void sum_up(const float* q, float* sums) const {
    std::fill_n(sums, period, 0.0f);
    for (int64_t i = 0; i < 2 * half; i += period) {
      for (int64_t g = 0; g < period; ++g) sums[g] += q[i + g];
    }
  }

  float dot(const float* q, const float* sums, int64_t head) const {
    float steps[2 * kMostGroups];
    const GroupUnits units = load_group_scales(scales, groups, period, head, steps);
    const float* lowests = steps + period;
    const uint8_t* own = numbers + head * half;
    Float stepped = zero(), lowest = zero(), low, high;
    for (int64_t g = 0; g < wide; g += kLanes) {
      Float first = zero(), second = zero();
      for (int64_t i = g; i < half; i += period) {
        load_nibbles(own + i, low, high);
        first = multiply_add(load(q + i), low, first);
        second = multiply_add(load(q + half + i), high, second);
      }
      stepped = multiply_add(MINIGPT4_LEVEL::add(first, second), load(steps + g), stepped);
      lowest = multiply_add(load(sums + g), load(lowests + g), lowest);
    }
    if (wide > 0) {
      return sum(multiply_add(set(units.step), stepped, multiply(set(units.lowest), lowest)));
    }
    float rest = 0, rest_lowest = 0;
    for (int64_t i = 0; i < half; ++i) {
      rest += steps[i % period] * q[i] * (own[i] & 15);
      rest += steps[(half + i) % period] * q[half + i] * (own[i] >> 4);
    }
    for (int64_t g = 0; g < period; ++g) rest_lowest += lowests[g] * sums[g];
    return units.step * rest + units.lowest * rest_lowest;
  }

  int64_t bytes_per_head() const { return half; }
  int64_t scale_bytes_per_head() const { return group_scale_bytes(groups); }

  void add(float* y, float* weights, int64_t count, int64_t head, int64_t stride) const {
    float shares[kTokensAtOnce * 2 * kMostGroups], lowests[kMostGroups];
    std::fill_n(lowests, period, 0.0f);
    for (int64_t t = 0; t < count; ++t) {
      float* own = shares + t * 2 * period;
      const GroupUnits units = load_group_scales(scales, groups, period, head + t * stride, own);
      const float step = weights[t] * units.step, lowest = weights[t] * units.lowest;
      for (int64_t g = 0; g < wide; g += kLanes) {
        store(own + g, multiply(load(own + g), set(step)));
        const Float sums = multiply_add(set(lowest), load(own + period + g), load(lowests + g));
        store(lowests + g, sums);
      }
      for (int64_t g = wide; g < period; ++g) {
        own[g] *= step;
        lowests[g] += lowest * own[period + g];
      }
    }
    const uint8_t* bytes = numbers + head * half;
    const int64_t next = stride * half;
    for (int64_t g = 0; g < wide; g += kLanes) {
      for (int64_t i = g; i < half; i += period) {
        Float first = MINIGPT4_LEVEL::add(load(y + i), load(lowests + g)), low;
        Float second = MINIGPT4_LEVEL::add(load(y + half + i), load(lowests + g)), high;
        for (int64_t t = 0; t < count; ++t) {
          const Float step = load(shares + t * 2 * period + g);
          load_nibbles(bytes + t * next + i, low, high);
          first = multiply_add(step, low, first);
          second = multiply_add(step, high, second);
        }
        store(y + i, first);
        store(y + half + i, second);
      }
    }
    for (int64_t i = 0; wide == 0 && i < half; ++i) {
      const int64_t low = i % period, high = (half + i) % period;
      y[i] += lowests[low];
      y[half + i] += lowests[high];
      for (int64_t t = 0; t < count; ++t) {
        const uint8_t byte = bytes[t * next + i];
        y[i] += shares[t * 2 * period + low] * (byte & 15);
        y[half + i] += shares[t * 2 * period + high] * (byte >> 4);
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

// Scores → e^(score − their largest); gives the largest, and the sum of what they become.
inline std::pair<float, float> exponentials(float* scores, int64_t count) {
  Float largest = set(scores[0]), total = zero();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) largest = max(load(scores + i), largest);
  float most = max_lane(largest);
  for (; i < count; ++i) most = std::max(most, scores[i]);
  for (i = 0; i < count; ++i) scores[i] = exponential(scores[i] - most);
  for (i = 0; i + kLanes <= count; i += kLanes) total = add(total, load(scores + i));
  float all = sum(total);
  for (; i < count; ++i) all += scores[i];
  return {most, all};
}

// A head's numbers: visit(where a cached head has one, where it is in q).
template <class Visit>
void in_order(const Attention& a, Visit visit) {
  const int64_t size = a.head_dim / a.groups;
  for (int64_t g = 0; g < a.groups; ++g) {
    for (int64_t i = 0; i < size; ++i) visit(i * a.groups + g, g * size + i);
  }
}

constexpr int64_t kPartTokens = 128;

// The parts of all contexts, one after the other, and what each gives for each head: the sum of
// its values by their weights, and the largest score and the sum of weights that go with it.
struct Parts {
  int64_t tokens = 0;              // Of a part, but for a context's last: whole blocks.
  const int64_t* firsts = nullptr; // (sequences + 1): the number of each sequence's first part.
  float* values = nullptr;         // (parts, heads, head_dim), each head in the order of the cache.
  float* largest = nullptr;        // (parts, heads)
  float* totals = nullptr;
};

template <class Cached>
class AttendingParts {
 public:
  AttendingParts(const Attention& attention, const Parts& parts)
      : a_(attention),
        parts_(parts),
        keys_(attention, attention.keys, attention.key_scales),
        values_(attention, attention.values, attention.value_scales) {}

  static void run(const void* work, int64_t first, int64_t last) {
    const auto* mine = static_cast<const AttendingParts*>(work);
    const int64_t* firsts = mine->parts_.firsts;
    for (int64_t part = first; part < last; ++part) {
      const int64_t* own = std::upper_bound(firsts, firsts + mine->a_.sequences + 1, part) - 1;
      mine->attend(part, own - firsts, (part - *own) * mine->parts_.tokens);
    }
  }

 private:
  void attend(int64_t part, int64_t sequence, int64_t first) const {
    const int64_t heads = a_.heads, dim = a_.head_dim, num_sums = Cached::sums_per_head(a_);
    const int64_t count = std::min(parts_.tokens, a_.lengths[sequence] - first);
    const int64_t size = heads * (dim + count + num_sums);
    float* q = static_cast<float*>(scratch(3, size * sizeof(float)));
    float* scores = q + heads * dim;  // (heads, count)
    float* sums = scores + heads * count;
    float* y = parts_.values + part * heads * dim;
    load_row(a_.q, sequence * heads * dim, heads * dim, y);
    for (int64_t h = 0; h < heads; ++h) {
      in_order(a_, [&](int64_t cached, int64_t i) {
        q[h * dim + cached] = y[h * dim + i] * a_.scale;
      });
      keys_.sum_up(q + h * dim, sums + h * num_sums);
    }
    score(q, sums, scores, sequence, first, count);
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t place = part * heads + h;
      std::tie(parts_.largest[place], parts_.totals[place]) =
          exponentials(scores + h * count, count);
    }
    std::memset(y, 0, heads * dim * sizeof(float));
    mix(y, scores, sequence, first, count);
  }

  // Token by token with all heads, since a token's keys lie side by side.
  void score(const float* q, const float* sums, float* scores, int64_t sequence, int64_t first,
             int64_t count) const {
    const int64_t shares = a_.heads / a_.key_heads, num_sums = Cached::sums_per_head(a_);
    const int32_t* table = a_.table + a_.table_rows[sequence] * a_.table_width;
    const int32_t* block = table + first / a_.block_size;
    for (int64_t t = 0; t < count; t += a_.block_size, ++block) {
      const int64_t some = std::min(a_.block_size, count - t);
      for (int64_t i = 0; i < some; ++i) {
        const int64_t head = (block[0] * a_.block_size + i) * a_.key_heads;
        if (t + some < count) fetch(keys_, (block[1] * a_.block_size + i) * a_.key_heads, a_.key_heads);
        for (int64_t h = 0; h < a_.heads; ++h) {
          scores[h * count + t + i] =
              keys_.dot(q + h * a_.head_dim, sums + h * num_sums, head + h / shares);
        }
      }
    }
  }

  // A few tokens at once, so that sums are in registers for as long.
  void mix(float* y, float* scores, int64_t sequence, int64_t first, int64_t count) const {
    const int64_t shares = a_.heads / a_.key_heads;
    const int32_t* table = a_.table + a_.table_rows[sequence] * a_.table_width;
    for (int64_t t = 0, some = 0; t < count; t += some) {
      const int64_t in_block = (first + t) % a_.block_size;
      some = std::min({Cached::kTokensAtOnce, a_.block_size - in_block, count - t});
      const int64_t head = slot_of(table, first + t) * a_.key_heads;
      const int64_t next = t + some < count ? slot_of(table, first + t + some) * a_.key_heads : -1;
      for (int64_t h = 0; h < a_.heads; ++h) {
        if (next >= 0 && h % shares == 0) fetch(values_, next + h / shares * some, some);
        values_.add(y + h * a_.head_dim, scores + h * count + t, some, head + h / shares,
                    a_.key_heads);
      }
    }
  }

  int64_t slot_of(const int32_t* table, int64_t token) const {
    return int64_t{table[token / a_.block_size]} * a_.block_size + token % a_.block_size;
  }

  // Processors do not see which block comes next.
  void fetch(const Cached& side, int64_t head, int64_t count) const {
    fetch(side.numbers, side.bytes_per_head(), head, count);
    fetch(side.scales, side.scale_bytes_per_head(), head, count);
  }

  static void fetch(const void* start, int64_t head_bytes, int64_t head, int64_t count) {
    const auto* own = static_cast<const uint8_t*>(start) + head * head_bytes;
    for (int64_t i = 0; i < count * head_bytes; i += 64) prefetch(own + i);
  }

  const Attention& a_;
  const Parts& parts_;
  const Cached keys_, values_;
};

// The parts of each context, joined: each counts by e^(its largest score − the largest of all).
class JoiningParts {
 public:
  JoiningParts(const Attention& attention, const Parts& parts) : a_(attention), parts_(parts) {}

  // Heads are counted through all sequences.
  static void run(const void* work, int64_t first, int64_t last) {
    for (; first < last; ++first) static_cast<const JoiningParts*>(work)->join(first);
  }

 private:
  void join(int64_t number) const {
    const int64_t sequence = number / a_.heads, head = number % a_.heads, dim = a_.head_dim;
    const int64_t first = parts_.firsts[sequence] * a_.heads + head;
    const int64_t last = parts_.firsts[sequence + 1] * a_.heads + head;
    float* y = static_cast<float*>(scratch(3, dim * sizeof(float)));
    float most = parts_.largest[first], total = 0;
    for (int64_t i = first; i < last; i += a_.heads) most = std::max(most, parts_.largest[i]);
    std::memset(y, 0, dim * sizeof(float));
    for (int64_t i = first; i < last; i += a_.heads) {
      const float weight = exponential(parts_.largest[i] - most);
      const float* values = parts_.values + i * dim;
      total += weight * parts_.totals[i];
      for (int64_t d = 0; d < dim; ++d) y[d] += weight * values[d];
    }
    in_order(a_, [&](int64_t cached, int64_t i) {
      store_one(a_.y, a_.q.type, number * dim + i, y[cached] / total);
    });
  }

  const Attention& a_;
  const Parts& parts_;
};

template <class Cached>
void attend_of(const Attention& a) {
  Parts parts;
  parts.tokens = a.block_size * std::max<int64_t>(1, kPartTokens / a.block_size);
  const auto count_of = [&](int64_t i) { return round_up(a.lengths[i], parts.tokens) / parts.tokens; };
  int64_t count = 0;
  for (int64_t i = 0; i < a.sequences; ++i) count += count_of(i);
  const int64_t size = count * a.heads * (a.head_dim + 2) * sizeof(float);
  auto* firsts = static_cast<int64_t*>(scratch(4, size + (a.sequences + 1) * sizeof(int64_t)));
  firsts[0] = 0;
  for (int64_t i = 0; i < a.sequences; ++i) firsts[i + 1] = firsts[i] + count_of(i);
  parts.firsts = firsts;
  parts.values = reinterpret_cast<float*>(firsts + a.sequences + 1);
  parts.largest = parts.values + count * a.heads * a.head_dim;
  parts.totals = parts.largest + count * a.heads;
  const AttendingParts<Cached> attending(a, parts);
  const int64_t tokens = std::accumulate(a.lengths, a.lengths + a.sequences, int64_t{0});
  const int64_t cost = 2 * a.head_dim * a.heads * tokens / std::max<int64_t>(1, count);
  in_parallel(count, least_step(1, cost), attending.run, &attending);
  const JoiningParts joining(a, parts);
  const int64_t heads = a.sequences * a.heads;
  in_parallel(heads, least_step(1, a.head_dim * count / std::max<int64_t>(1, a.sequences)),
              joining.run, &joining);
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
