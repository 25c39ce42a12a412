#define MINIGPT4_LEVEL amx
#define MINIGPT4_USE_AVX512
#define MINIGPT4_USE_VNNI
#include "level.hpp"

namespace minigpt4 {
extern const Kernels amx_kernels;
const Kernels amx_kernels = {amx::linear, amx::attention};
}  // namespace minigpt4
