#define MINIGPT4_LEVEL avxvnni
#define MINIGPT4_USE_AVX2
#define MINIGPT4_USE_VNNI
#include "level.hpp"

namespace minigpt4 {
extern const Kernels avxvnni_kernels;
const Kernels avxvnni_kernels = {avxvnni::linear, avxvnni::attention, avxvnni::norm, avxvnni::gate, avxvnni::write};
}  // namespace minigpt4
