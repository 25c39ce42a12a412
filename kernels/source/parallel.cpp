#include "parallel.hpp"

#include <algorithm>
#include <atomic>

#include <torch/csrc/stable/ops.h>

namespace minigpt4 {

// More tasks than threads, so that one is rarely waited for.
constexpr int64_t kTasksPerThread = 6;

int64_t num_threads() { return torch::stable::get_num_threads(); }

void in_parallel(int64_t count, int64_t step, Task task, const void* work) {
  const int64_t threads = num_threads();
  const int64_t steps = (count + step - 1) / step;
  if (threads == 1 || steps <= 1) {
    if (count > 0) task(work, 0, count);
    return;
  }
  const int64_t steps_at_once = std::max<int64_t>(1, steps / (threads * kTasksPerThread));
  const int64_t size = steps_at_once * step;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(
      0, std::min(threads, steps), 1, [&](int64_t begin, int64_t end) {
        // A thread that was given several parts, or none other, works until nothing is left.
        (void)begin, (void)end;
        for (;;) {
          const int64_t first = next.fetch_add(size, std::memory_order_relaxed);
          if (first >= count) break;
          task(work, first, std::min(count, first + size));
        }
      });
}

}  // namespace minigpt4
