// Which instructions the processor has, and which of them are used.
//
// Owns   the table of levels, and the choice: the best that the processor has, unless another was
//        asked for.
#pragma once

#include <span>
#include <vector>

#include "product.hpp"

namespace minigpt4 {

struct Level {
  const char* name;
  bool (*is_supported)();
  const Kernels& kernels;
  // It was written without a processor that has it: it must agree with the first level to be used.
  bool must_prove_itself = false;
};

// Of levels from the plainest to the fastest, those that can be used.
std::vector<Level> usable_levels(std::span<const Level> levels);

// Those of this library that can be used.
const Level* first_level();
const Level* last_level();

const Level& level_in_use();

// False where there is no such level, or it cannot be used.
bool use_level(const char* name);

}  // namespace minigpt4
