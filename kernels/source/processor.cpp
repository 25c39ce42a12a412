#include "processor.hpp"

#include <cstdint>

#if defined(MINIGPT4_X86)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif
#if defined(__linux__) && defined(MINIGPT4_X86)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__linux__) && defined(MINIGPT4_ARM)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace minigpt4 {

#if defined(MINIGPT4_X86)
namespace {

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers out;
#if defined(_MSC_VER)
  int values[4];
  __cpuidex(values, static_cast<int>(leaf), static_cast<int>(subleaf));
  out = {static_cast<uint32_t>(values[0]), static_cast<uint32_t>(values[1]),
         static_cast<uint32_t>(values[2]), static_cast<uint32_t>(values[3])};
#else
  __get_cpuid_count(leaf, subleaf, &out.eax, &out.ebx, &out.ecx, &out.edx);
#endif
  return out;
}

// Which registers the system saves when it changes between threads.
uint64_t saved_state() {
  if ((cpuid(1, 0).ecx >> 27 & 1) == 0) return 0;  // No XGETBV.
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
#endif
}

constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;

bool saves(uint64_t state) { return (saved_state() & state) == state; }
bool bit(uint32_t word, int number) { return (word >> number & 1) != 0; }

// Linux keeps the registers of tiles, 8 KiB a thread, for processes that ask. Other systems are not
// known to.
bool ask_for_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

bool has_avx2() {
  static const bool has = [] {
    const Registers basic = cpuid(1, 0), extended = cpuid(7, 0);
    return bit(basic.ecx, 12) && bit(basic.ecx, 29) && bit(extended.ebx, 5) && saves(kYmm);
  }();
  return has;
}

bool has_avxvnni() {
  static const bool has = has_avx2() && bit(cpuid(7, 1).eax, 4);
  return has;
}

bool has_avx512() {
  static const bool has = [] {
    const uint32_t ebx = cpuid(7, 0).ebx;
    return has_avx2() && bit(ebx, 16) && bit(ebx, 17) && bit(ebx, 30) && bit(ebx, 31) &&
           saves(kZmm);
  }();
  return has;
}

bool has_avx512vnni() {
  static const bool has = has_avx512() && bit(cpuid(7, 0).ecx, 11);
  return has;
}

bool has_avx512bf16() {
  static const bool has = has_avx512vnni() && bit(cpuid(7, 1).eax, 5);
  return has;
}

bool has_amx() {
  static const bool has = [] {
    const uint32_t edx = cpuid(7, 0).edx;
    return has_avx512bf16() && bit(edx, 24) && bit(edx, 25) && saves(kTiles) && ask_for_tiles();
  }();
  return has;
}

bool has_neon_dotprod() { return false; }

#elif defined(MINIGPT4_ARM)

bool has_avx2() { return false; }
bool has_avxvnni() { return false; }
bool has_avx512() { return false; }
bool has_avx512vnni() { return false; }
bool has_avx512bf16() { return false; }
bool has_amx() { return false; }

bool has_neon_dotprod() {
#if defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has != 0;
#elif defined(__linux__)
  constexpr unsigned long kDotProduct = 1UL << 20;
  return (getauxval(AT_HWCAP) & kDotProduct) != 0;
#else
  return true;  // Windows runs on no processor without it.
#endif
}

#endif

}  // namespace minigpt4
