// The scales of a weight's row, one for each span of its inputs.
//
// Owns   their conversion to float32, and that of zero points.
#pragma once

#include <algorithm>

#include "integer_rows.hpp"

namespace minigpt4 {
namespace MINIGPT4_LEVEL {

// The scales of one output, and if there are zero points those as offsets. `spans` may exceed the
// weight's groups: zeros follow.
template <class Format>
void load_scales(const Weight& weight, int64_t output, int64_t spans, float* scales,
                 float* offsets) {
  const int64_t groups = weight.groups();
  load_row(weight.scale, output * groups, groups, scales);
  std::fill(scales + groups, scales + spans, 0.0f);
  if (weight.zero_points == nullptr) return;
  for (int64_t s = 0; s < groups; ++s) offsets[s] = Format::offset(weight, output, s);
  std::fill(offsets + groups, offsets + spans, 0.0f);
}

}  // namespace MINIGPT4_LEVEL
}  // namespace minigpt4
