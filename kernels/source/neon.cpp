#define MINIGPT4_LEVEL neon
#define MINIGPT4_USE_NEON
#include "level.hpp"

namespace minigpt4 {
extern const Kernels neon_kernels;
const Kernels neon_kernels = {neon::linear, neon::attention, neon::norm, neon::gate, neon::write};
}  // namespace minigpt4
