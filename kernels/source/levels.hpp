// Which instructions the processor has, and which of them are used.
//
// Owns   the table of levels, and the choice: the best that the processor has, unless another was
//        asked for.
#pragma once

#include "product.hpp"

namespace minigpt4 {

struct Level {
  const char* name;
  bool (*is_supported)();
  const Kernels& kernels;
};

// From the plainest to the fastest: those that this library was compiled with.
const Level* first_level();
const Level* last_level();

const Level& level_in_use();

// False where there is no such level, or this processor lacks it.
bool use_level(const char* name);

}  // namespace minigpt4
