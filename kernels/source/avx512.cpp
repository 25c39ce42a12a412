#define MINIGPT4_LEVEL avx512
#define MINIGPT4_USE_AVX512
#include "level.hpp"

namespace minigpt4 {
extern const Kernels avx512_kernels;
const Kernels avx512_kernels = {avx512::linear, avx512::attention, avx512::norm, avx512::gate, avx512::write};
}  // namespace minigpt4
