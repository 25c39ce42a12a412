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

// Calls task(work, first, last) for parts of [0, count) that are multiples of `step`, but the last.
void in_parallel(int64_t count, int64_t step, Task task, const void* work);

// At least `bytes` of memory of this thread, on a cache line; its content lasts until the next call
// with the same `slot`. A zero stands behind nothing: the memory is not cleared.
void* scratch(int slot, size_t bytes);

}  // namespace minigpt4
