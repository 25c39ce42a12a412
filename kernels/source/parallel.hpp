// Work on all of torch's threads: the one pool of the process.
//
// Owns   the division into tasks. Threads take the next task when they are done with one, so that a
//        slow core holds up the others by one task at most.
#pragma once

#include <cstddef>
#include <cstdint>

namespace minigpt4 {

int64_t num_threads();

using Task = void (*)(const void* work, int64_t first, int64_t last);

// Waking another thread costs about as much as so many multiplications.
constexpr int64_t kLeastWork = 1 << 17;

// The least multiple of `step` that is work enough for a task, if each item costs so much.
inline int64_t least_step(int64_t step, int64_t cost) {
  return step * (1 + kLeastWork / (step * (cost > 0 ? cost : 1)));
}

// Calls task(work, first, last) for parts of [0, count) that are multiples of `step`, but the last.
void in_parallel(int64_t count, int64_t step, Task task, const void* work);

// At least `bytes` of memory of this thread, on a cache line; its content lasts until the next call
// with the same `slot`. It is not cleared.
void* scratch(int slot, size_t bytes);

}  // namespace minigpt4
