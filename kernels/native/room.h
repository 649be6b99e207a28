// Memory of a program: aligned to cache lines, reserved as steps grow.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace baton {

constexpr int64_t kLine = 16;  // Floats of a cache line.

static inline int64_t whole_lines(int64_t floats) { return (floats + kLine - 1) / kLine * kLine; }

constexpr size_t kHugePage = 2 << 20;

// Memory in huge pages if it is large and the system has any: rows that are a page apart each would
// otherwise need more translations than a core keeps at hand. Null if there is none.
static inline void* aligned_room(size_t bytes) {
  if (bytes < kHugePage) return std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  const size_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* room = std::aligned_alloc(kHugePage, whole);
#if defined(MADV_HUGEPAGE)
  if (room) madvise(room, whole, MADV_HUGEPAGE);
#endif
  return room;
}

// Memory that only grows and never keeps what was in it.
template <class Value>
class Room {
 public:
  void reserve(int64_t count) {
    if (count <= count_) return;
    std::free(values_);
    count_ = 0;
    values_ = static_cast<Value*>(aligned_room(static_cast<size_t>(count) * sizeof(Value)));
    if (!values_) throw std::bad_alloc();
    count_ = count;
  }
  Room() = default;
  ~Room() { std::free(values_); }
  Room(Room&& other) noexcept : values_(other.values_), count_(other.count_) {
    other.values_ = nullptr;
    other.count_ = 0;
  }
  Value* get() const { return values_; }
  int64_t count() const { return count_; }

 private:
  Value* values_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace baton
