#include <memory>

#include "parallel.hpp"

namespace minigpt4 {
namespace {

constexpr int kSlots = 5;
constexpr size_t kLine = 64;

// Memory that grows and stays, so that a step of decoding allocates nothing.
struct Scratch {
  std::unique_ptr<unsigned char[]> memory;
  size_t size = 0;
};

thread_local Scratch scratches[kSlots];

}  // namespace

void* scratch(int slot, size_t bytes) {
  Scratch& mine = scratches[slot];
  if (mine.size < bytes) {
    mine.size = bytes + bytes / 2;
    mine.memory.reset(new unsigned char[mine.size + kLine]);
  }
  const auto address = reinterpret_cast<uintptr_t>(mine.memory.get());
  return reinterpret_cast<void*>((address + kLine - 1) & ~(kLine - 1));
}

}  // namespace minigpt4
