#include "levels.hpp"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "processor.hpp"
#include "self_check.hpp"

namespace minigpt4 {

extern const Kernels portable_kernels;
#if defined(MINIGPT4_X86)
extern const Kernels avx2_kernels, avxvnni_kernels, avx512_kernels, avx512vnni_kernels;
#if defined(MINIGPT4_HAS_AVX512BF16)
extern const Kernels avx512bf16_kernels;
#endif
#if defined(MINIGPT4_HAS_AMX)
extern const Kernels amx_kernels;
#endif
#elif defined(MINIGPT4_ARM)
extern const Kernels neon_kernels;
#endif

namespace {

const Level compiled_levels[] = {
    {"portable", [] { return true; }, portable_kernels},
#if defined(MINIGPT4_X86)
    {"avx2", has_avx2, avx2_kernels},
    {"avxvnni", has_avxvnni, avxvnni_kernels},
    {"avx512", has_avx512, avx512_kernels},
    {"avx512vnni", has_avx512vnni, avx512vnni_kernels},
#if defined(MINIGPT4_HAS_AVX512BF16)
    {"avx512bf16", has_avx512bf16, avx512bf16_kernels, true},
#endif
#if defined(MINIGPT4_HAS_AMX)
    {"amx", has_amx, amx_kernels, true},
#endif
#elif defined(MINIGPT4_ARM)
    {"neon", has_neon_dotprod, neon_kernels},
#endif
};

const std::vector<Level>& levels() {
  static const std::vector<Level> usable = usable_levels(compiled_levels);
  return usable;
}

const Level* find(const char* name) {
  for (const Level& level : levels()) {
    if (std::strcmp(level.name, name) == 0) return &level;
  }
  return nullptr;
}

const Level* choose() {
  // A name that this processor lacks is reported by the Python side, which reads the level in use.
  const char* wanted = std::getenv("MINIGPT4_KERNELS_LEVEL");
  if (wanted != nullptr) {
    if (const Level* level = find(wanted)) return level;
  }
  return &levels().back();
}

std::atomic<const Level*>& chosen() {
  static std::atomic<const Level*> level{choose()};
  return level;
}

}  // namespace

std::vector<Level> usable_levels(std::span<const Level> levels) {
  std::vector<Level> usable;
  for (const Level& level : levels) {
    if (!level.is_supported()) continue;
    if (level.must_prove_itself && !agree(level.kernels, levels.front().kernels)) continue;
    usable.push_back(level);
  }
  return usable;
}

const Level* first_level() { return levels().data(); }
const Level* last_level() { return levels().data() + levels().size(); }
const Level& level_in_use() { return *chosen().load(std::memory_order_relaxed); }

bool use_level(const char* name) {
  const Level* level = find(name);
  if (level != nullptr) chosen().store(level);
  return level != nullptr;
}

}  // namespace minigpt4
