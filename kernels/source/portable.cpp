#define MINIGPT4_LEVEL portable
#include "level.hpp"

namespace minigpt4 {
extern const Kernels portable_kernels;
const Kernels portable_kernels = {portable::linear, portable::attention};
}  // namespace minigpt4
