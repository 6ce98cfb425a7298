// Memory of one thread for the length of a call. A thread keeps up to kKept bytes of each kind for its next
// call and frees everything when it ends.
#pragma once

#include <cstddef>

class Workspace {
 public:
  enum Kind { kKernel, kRow };  // for one kernel; for what several share: logits, and copies of rows
  static constexpr size_t kKept = 8u << 20;

  Workspace(Kind kind, size_t bytes);  // a thread has at most one of each kind
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // The next n elements, aligned to a cache line. At least 64 unused bytes follow, so that the last vector
  // may be written as a whole.
  template <class T>
  T* take(size_t n) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += padded(n * sizeof(T));
    return p;
  }

  // Counts the bytes that the same calls will take.
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

// Calls f(object). The object's constructor takes its buffers from a workspace; it runs twice: once to count
// the bytes, once to take them.
template <class Object, class Arguments, class F>
static inline void with_workspace(const Arguments& args, F&& f) {
  Workspace::Size size;
  Object{args, size};
  Workspace workspace(Workspace::kKernel, size.bytes);
  Object object{args, workspace};
  f(object);
}
