// bfloat16 as arithmetic: what a product of two bfloat16 vectors is, to the bit.
//
// A sum of products goes by groups of kGroup = 32 values. In a group, the products of even places
// are one chain of additions in float32 and those of odd places another, each from 0 on; the two
// are added, and then their sum to the total. A product of two bfloat16 numbers is exact in
// float32, so it does not matter whether it is fused with the addition. Numbers too small to be
// normal count as 0, before and after each operation.
//
// This is how Intel defines TDPBF16PS of AMX (Software Developer's Manual, volume 2), and it can
// be written with any vectors; VDPBF16PS of AVX-512 adds in another order and is of no use here.
#pragma once

#include "vec.h"

namespace baton {

// bfloat16 in memory.
struct Bf16 {
  uint16_t bits;
};

static inline float to_float(float value) { return value; }

static inline float to_float(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

constexpr int kGroup = 32;
constexpr int kPairs = kGroup / 2;

static inline int64_t whole_groups(int64_t values) { return (values + kGroup - 1) / kGroup; }

// Makes the processor treat numbers that are not normal as 0 for as long as it lives.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

// A vector of pairs, as words whose lower half is the first of two, becomes two vectors of floats.
static inline Vec first_of(IntVec words) { return of_bits(words << 16); }

static inline Vec second_of(IntVec words) {
  return of_bits(words & static_cast<int32_t>(0xffff0000u));
}

static inline IntVec load_words(const void* from) {
  IntVec words;
  std::memcpy(&words, from, sizeof words);
  return words;
}

// The nearest bfloat16, of two the even one, as a float; 0 for numbers that are not normal.
static inline Vec rounded(Vec value) {
  const IntVec bits = bits_of(value), size = bits & 0x7fffffff;
  const IntVec sign = bits & static_cast<int32_t>(0x80000000u);
  IntVec near = (size + 0x7fff + ((size >> 16) & 1)) & static_cast<int32_t>(0xffff0000u);
  near = size > 0x7f800000 ? IntVec{} + 0x7fc00000 : near;
  near = size < 0x00800000 ? IntVec{} : near;
  return of_bits(near | sign);
}

static inline uint16_t narrowed(float value) {
  return static_cast<uint16_t>(static_cast<uint32_t>(bits_of(rounded(splat(value)))[0]) >> 16);
}

// Rounds `count` floats times `scale` into whole groups of bfloat16, zeros after them.
static inline void narrow_row(const float* from, int64_t count, float scale, uint16_t* to) {
  int64_t at = 0;
#if defined(__AVX512BF16__)
  const __m512 factor = _mm512_set1_ps(scale);
  for (; at + kGroup <= count; at += kGroup) {
    const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(from + at), factor);
    const __m512 high = _mm512_mul_ps(_mm512_loadu_ps(from + at + 16), factor);
    const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
    std::memcpy(to + at, &both, sizeof both);
  }
#endif
  const int64_t whole = whole_groups(count) * kGroup;
  for (; at < whole; at += kWidth) {
    const int64_t left = count - at;
    Vec value{};
    if (left > 0) value = load_lanes(from + at, static_cast<int>(left < kWidth ? left : kWidth));
    const IntVec bits = bits_of(rounded(value * scale));
    for (int lane = 0; lane < kWidth; ++lane) {
      to[at + lane] = static_cast<uint16_t>(static_cast<uint32_t>(bits[lane]) >> 16);
    }
  }
}

// Rounds `count` floats and writes no more than they take.
static inline void narrow_some(const float* from, int64_t count, uint16_t* to) {
  uint16_t group[kGroup];
  for (int64_t at = 0; at < count; at += kGroup) {
    const int64_t some = count - at < kGroup ? count - at : kGroup;
    narrow_row(from + at, some, 1.0f, group);
    std::memcpy(to + at, group, static_cast<size_t>(some) * sizeof *to);
  }
}

}  // namespace baton
