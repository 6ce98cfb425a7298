// Memory of one thread for the length of a call. A thread keeps up to kKept bytes of each kind for its next
// call and gives everything back when it ends.
#pragma once

#include <cstddef>
#include <cstdint>

class Workspace {
 public:
  enum Kind { kKernel, kRow };  // a kernel's own, and the logits row that outlives two kernels
  static constexpr size_t kKept = 8u << 20;

  Workspace(Kind kind, size_t bytes);  // one at a time of a kind
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // The next n elements, on a cache line of their own and with a line more, so that whole vectors may be
  // written.
  template <class T>
  T* take(size_t n) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += padded(n * sizeof(T));
    return p;
  }

  // Counts what the same calls will take.
  struct Size {
    size_t bytes = 0;
    template <class T>
    T* take(size_t n) {
      bytes += padded(n * sizeof(T));
      return nullptr;
    }
  };

 private:
  static constexpr size_t padded(size_t bytes) { return (bytes + 2 * 64 - 1) / 64 * 64; }

  Kind kind_;
  char* next_;
};

// An object whose constructor takes its buffers from a workspace: laid out once to count, once to have them.
template <class Object, class Arguments, class F>
static inline void with_workspace(const Arguments& args, F&& f) {
  Workspace::Size size;
  Object{args, size};
  Workspace workspace(Workspace::kKernel, size.bytes);
  Object object{args, workspace};
  f(object);
}
