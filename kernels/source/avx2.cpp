#define MINIGPT4_LEVEL avx2
#define MINIGPT4_USE_AVX2
#include "level.hpp"

namespace minigpt4 {
extern const Kernels avx2_kernels;
const Kernels avx2_kernels = {avx2::linear, avx2::attention, avx2::norm, avx2::gate, avx2::write};
}  // namespace minigpt4
