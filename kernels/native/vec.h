// One vector register of floats, as wide as the machine that compiles this has it.
//
// GCC's and clang's vector extensions: the same source gives AVX-512, AVX2, SSE or NEON code, and
// `a * b + c` becomes one fused multiply-add where there is one (-ffp-contract=fast). Nothing here
// may be compiled with -ffast-math: results must not depend on how a compiler reorders sums.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace baton {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));

// Lanes of two vectors by number, those of the second counted on from the first's.
#if defined(__clang__)
#define BATON_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define BATON_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, baton::IntVec{__VA_ARGS__})
#endif

static inline Vec load(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

static inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

// One rounding where the processor has it, said outright: compilers may see a product and a sum in
// one place and not in another that is to have the same bits.
static inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// The first `count` lanes, zeros after them; memory past them is not touched.
static inline Vec load_some(const float* from, int count) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
#else
  Vec value{};
  for (int lane = 0; lane < count; ++lane) value[lane] = from[lane];
  return value;
#endif
}

static inline void store_some(float* to, Vec value, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), value);
#else
  for (int lane = 0; lane < count; ++lane) to[lane] = value[lane];
#endif
}

// All lanes, or the first few.
static inline Vec load_lanes(const float* from, int lanes) {
  return lanes == kWidth ? load(from) : load_some(from, lanes);
}

static inline void store_lanes(float* to, Vec value, int lanes) {
  if (lanes == kWidth) {
    store(to, value);
  } else {
    store_some(to, value, lanes);
  }
}

static inline Vec splat(float value) { return value - Vec{}; }

static inline IntVec lane_numbers() {
#if defined(__AVX512F__)
  return IntVec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX__)
  return IntVec{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return IntVec{0, 1, 2, 3};
#endif
}

static inline IntVec bits_of(Vec value) {
  IntVec bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline Vec of_bits(IntVec bits) {
  Vec value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
static inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }

// Calls `fold` on halves until each lane has the fold of all of them, in an order that is fixed.
template <class Fold>
static inline float fold_lanes(Vec v, Fold fold) {
#if defined(__AVX512F__)
  v = fold(v, BATON_SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = fold(v, BATON_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = fold(v, BATON_SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  v = fold(v, BATON_SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif defined(__AVX__)
  v = fold(v, BATON_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
  v = fold(v, BATON_SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
  v = fold(v, BATON_SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
#else
  v = fold(v, BATON_SHUFFLE(v, v, 2, 3, 0, 1));
  v = fold(v, BATON_SHUFFLE(v, v, 1, 0, 3, 2));
#endif
  return v[0];
}

static inline float sum_of(Vec v) {
  return fold_lanes(v, [](Vec a, Vec b) { return a + b; });
}

static inline float largest_of(Vec v) { return fold_lanes(v, larger); }

// Calls body(vector start, lanes) over [0, width); only the last call may have fewer than kWidth.
template <class Body>
static inline void for_vectors(int64_t width, Body body) {
  int64_t at = 0;
  for (; at + kWidth <= width; at += kWidth) body(at, kWidth);
  if (at < width) body(at, static_cast<int>(width - at));
}

}  // namespace baton
