// Memory of a program: aligned to cache lines, reserved as steps grow.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace baton {

constexpr int64_t kLine = 16;  // Floats of a cache line.

static inline int64_t whole_lines(int64_t floats) { return (floats + kLine - 1) / kLine * kLine; }

// Memory that only grows and never keeps what was in it.
template <class Value>
class Room {
 public:
  void reserve(int64_t count) {
    if (count <= count_) return;
    std::free(values_);
    count_ = 0;
    const size_t bytes = (static_cast<size_t>(count) * sizeof(Value) + 63) / 64 * 64;
    values_ = static_cast<Value*>(std::aligned_alloc(64, bytes));
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
