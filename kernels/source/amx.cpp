#define MINIGPT4_LEVEL amx
#define MINIGPT4_USE_AVX512
#define MINIGPT4_USE_VNNI
#define MINIGPT4_USE_BF16
#define MINIGPT4_USE_AMX
#include "level.hpp"

namespace minigpt4 {
extern const Kernels amx_kernels;
const Kernels amx_kernels = {amx::linear, amx::attention, amx::norm, amx::gate, amx::write};
}  // namespace minigpt4
