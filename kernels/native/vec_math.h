// exp, tanh and sigmoid of a vector, to within 2 units in the last place.
#pragma once

#include "vec.h"

namespace baton {

// e^x; exactly 1 at 0, exactly 0 below -87.33 (and of -inf), and no more than e^88.
//
// x = n ln 2 + r with |r| <= ln 2 / 2, and e^r by the polynomial of Cephes' expf (Moshier).
static inline Vec exp_of(Vec x) {
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: a sum's low bits are the integer next to x
  const Vec bounded = smaller(larger(x, splat(-87.33f)), splat(88.0f));
  const Vec shifted = bounded * 1.44269504f + shift;
  const Vec n = shifted - shift;
  const Vec r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vec grown = of_bits(bits_of(p) + (bits_of(shifted) << 23));
  return x < -87.33f ? Vec{} : grown;
}

// e^x of x <= 0, in less than that takes; exactly 1 at 0 and exactly 0 below -87.33.
//
// x log2(e) = n + r with |r| <= 1/2, and 2^r by the polynomial of least relative error, 1e-7, that
// is 1 at 0.
static inline Vec exp_below(Vec x) {
  const Vec shift = splat(12582912.0f);
  const Vec shifted = x * 1.44269504f + shift;
  const Vec n = shifted - shift;
  const Vec r = x * 1.44269504f - n;
  Vec p = splat(1.326472731e-3f);
  p = p * r + 9.671512991e-3f;
  p = p * r + 5.550733581e-2f;
  p = p * r + 2.402224243e-1f;
  p = p * r + 6.931470037e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  const __m512 least = _mm512_set1_ps(-87.33f);
  const auto seen = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), least, _CMP_GE_OQ);
  return reinterpret_cast<Vec>(
      _mm512_maskz_scalef_ps(seen, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  const Vec grown = of_bits(bits_of(p) + (bits_of(shifted) << 23));
  return x >= -87.33f ? grown : Vec{};
#endif
}

static inline Vec sigmoid_of(Vec x) { return 1.0f / (1.0f + exp_of(-x)); }

// Cephes' tanhf: a polynomial near 0, where 1 - 2 / (e^2x + 1) would lose digits.
static inline Vec tanh_of(Vec x) {
  const Vec size = x < 0.0f ? -x : x;
  const Vec far = 1.0f - 2.0f / (exp_of(size + size) + 1.0f);
  const Vec z = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Vec near = p * z * x + x;
  return size < 0.625f ? near : x < 0.0f ? -far : far;
}

// x * sigmoid(x)
static inline Vec silu_of(Vec x) { return x / (1.0f + exp_of(-x)); }

// GELU with tanh: x (1 + tanh y) / 2 = x sigmoid(2 y), exact also where tanh y is near -1.
static inline Vec gelu_of(Vec x) {
  const Vec twice = (x + x * x * x * 0.044715f) * 1.5957691216f;
  return x / (1.0f + exp_of(-twice));
}

}  // namespace baton
