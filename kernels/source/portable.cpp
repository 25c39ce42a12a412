#define MINIGPT4_LEVEL portable
#define MINIGPT4_IS_PORTABLE
#include "level.hpp"

namespace minigpt4 {
extern const Kernels portable_kernels;
const Kernels portable_kernels = {portable::linear, portable::attention, portable::norm, portable::gate, portable::write};
}  // namespace minigpt4
