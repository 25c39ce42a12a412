#include "levels.hpp"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "processor.hpp"

namespace minigpt4 {

extern const Kernels portable_kernels;
#if defined(MINIGPT4_X86)
extern const Kernels avx2_kernels, avxvnni_kernels, avx512_kernels, avx512vnni_kernels;
#elif defined(MINIGPT4_ARM)
extern const Kernels neon_kernels;
#endif

namespace {

const Level levels[] = {
    {"portable", [] { return true; }, portable_kernels},
#if defined(MINIGPT4_X86)
    {"avx2", has_avx2, avx2_kernels},
    {"avxvnni", has_avxvnni, avxvnni_kernels},
    {"avx512", has_avx512, avx512_kernels},
    {"avx512vnni", has_avx512vnni, avx512vnni_kernels},
#elif defined(MINIGPT4_ARM)
    {"neon", has_neon_dotprod, neon_kernels},
#endif
};
constexpr size_t num_levels = sizeof(levels) / sizeof(levels[0]);

const Level* find(const char* name) {
  for (const Level& level : levels) {
    if (std::strcmp(level.name, name) == 0) return level.is_supported() ? &level : nullptr;
  }
  return nullptr;
}

const Level* choose() {
  // A name that this processor lacks is reported by the Python side, which reads the level in use.
  const char* wanted = std::getenv("MINIGPT4_KERNELS_LEVEL");
  if (wanted != nullptr) {
    if (const Level* level = find(wanted)) return level;
  }
  const Level* best = levels;
  for (const Level& level : levels) {
    if (level.is_supported()) best = &level;
  }
  return best;
}

std::atomic<const Level*>& chosen() {
  static std::atomic<const Level*> level{choose()};
  return level;
}

}  // namespace

const Level* first_level() { return levels; }
const Level* last_level() { return levels + num_levels; }
const Level& level_in_use() { return *chosen().load(std::memory_order_relaxed); }

bool use_level(const char* name) {
  const Level* level = find(name);
  if (level != nullptr) chosen().store(level);
  return level != nullptr;
}

}  // namespace minigpt4
