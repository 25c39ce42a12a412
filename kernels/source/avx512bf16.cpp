#define MINIGPT4_LEVEL avx512bf16
#define MINIGPT4_USE_AVX512
#define MINIGPT4_USE_VNNI
#define MINIGPT4_USE_BF16
#include "level.hpp"

namespace minigpt4 {
extern const Kernels avx512bf16_kernels;
const Kernels avx512bf16_kernels = {avx512bf16::linear, avx512bf16::attention, avx512bf16::norm, avx512bf16::gate, avx512bf16::write};
}  // namespace minigpt4
