#define MINIGPT4_LEVEL avx512vnni
#define MINIGPT4_USE_AVX512
#define MINIGPT4_USE_VNNI
#include "level.hpp"

namespace minigpt4 {
extern const Kernels avx512vnni_kernels;
const Kernels avx512vnni_kernels = {avx512vnni::linear, avx512vnni::attention, avx512vnni::norm, avx512vnni::gate, avx512vnni::write};
}  // namespace minigpt4
