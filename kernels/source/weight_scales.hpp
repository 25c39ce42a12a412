// The scales of a weight's row, one for each span of its inputs.
//
// Owns   their conversion to float32, and that of zero points.
#pragma once

#include <algorithm>

#include "integer_rows.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

// scales (spans) of one output, and if there are zero points those of the spans as offsets. `spans`
// may exceed those of the weight: zeros follow.
template <class Format>
void load_scales(const Weight& weight, int64_t output, int64_t span, int64_t spans, float* scales,
                 float* offsets) {
  const int64_t groups = weight.groups(), whole = weight.inputs / span, repeats = whole / groups;
  if (repeats == 1) {
    load_row(weight.scale, output * groups, groups, scales);
  } else {
    for (int64_t s = 0; s < whole; ++s) {
      scales[s] = load_one(weight.scale, output * groups + s / repeats);
    }
  }
  std::fill(scales + whole, scales + spans, 0.0f);
  if (weight.zero_points == nullptr) return;
  for (int64_t s = 0; s < whole; ++s) {
    offsets[s] = Format::offset(weight, output, s / repeats);
  }
  std::fill(offsets + whole, offsets + spans, 0.0f);
}

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
