#include "workspace.h"

#include <cstdlib>

namespace {

struct Block {
  char* memory = nullptr;
  size_t bytes = 0;

  void reserve(size_t n) {
    if (n <= bytes) return;
    release();
    n = (n + 4095) / 4096 * 4096;
    memory = static_cast<char*>(std::aligned_alloc(4096, n));
    if (!memory) std::abort();  // rare: Linux grants memory here, and ends the process if it runs out later
    bytes = n;
  }
  void release() {
    std::free(memory);
    memory = nullptr;
    bytes = 0;
  }
  ~Block() { release(); }
};

thread_local Block blocks[2];

}  // namespace

Workspace::Workspace(Kind kind, size_t bytes) : kind_(kind) {
  blocks[kind].reserve(bytes);
  next_ = blocks[kind].memory;
}

Workspace::~Workspace() {
  if (blocks[kind_].bytes > kKept) blocks[kind_].release();
}
