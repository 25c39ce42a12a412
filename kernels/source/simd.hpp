// The vectors of the level that a file is compiled for: floats, whole numbers, bytes.
//
// Each simd_*.hpp has the same functions, so that what is built on them is written once.
#pragma once

#include "half.hpp"

#if defined(_MSC_VER)
#define MINIGPT4_MEMBER __forceinline
#define MINIGPT4_LAMBDA
#define MINIGPT4_ALONE __declspec(noinline)
#else
#define MINIGPT4_LAMBDA __attribute__((always_inline))
#define MINIGPT4_MEMBER inline __attribute__((always_inline))
// Among other code a compiler keeps less of a loop in registers.
#define MINIGPT4_ALONE __attribute__((noinline))
#endif
#define MINIGPT4_INLINE static MINIGPT4_MEMBER

// The next loop, whose length the compiler knows, becomes its steps in a row. Portable vectors are
// loops themselves, and compilers take minutes for loops in loops.
#if defined(_MSC_VER) || defined(MINIGPT4_IS_PORTABLE)
#define MINIGPT4_UNROLL
#else
#define MINIGPT4_UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(MINIGPT4_USE_AVX512)
#include "simd_avx512.hpp"
#elif defined(MINIGPT4_USE_AVX2)
#include "simd_avx2.hpp"
#elif defined(MINIGPT4_USE_NEON)
#include "simd_neon.hpp"
#elif defined(MINIGPT4_IS_PORTABLE)
#include "simd_portable.hpp"
#endif
