// One vector register of floats, as wide as the machine that compiles this has it.
//
// GCC's and clang's vector extensions: the same source gives AVX-512, AVX2, SSE or NEON code, and
// `a * b + c` becomes one fused multiply-add where there is one (-ffp-contract=fast).
#pragma once

#include <cstdint>
#include <cstring>

namespace baton {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));

static inline Vec load(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

static inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

static inline Vec splat(float value) { return value - Vec{}; }

}  // namespace baton
