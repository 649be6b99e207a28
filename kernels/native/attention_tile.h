// Attention of a tile of queries over a tile of keys.
//
// All queries and all batches go through these functions, and each (query, key, dimension) takes
// part in the same fused operations in the same order wherever it stands in a tile, so that a
// query's result has the same bits alone, in a batch, and in any cut of its prompt. A key that a
// query does not see adds an exact 0.
#pragma once

#include <type_traits>

#include "vec_math.h"

namespace baton {

constexpr int kTileKeys = 64;      // Tiles begin at multiples of it in the sequence.
constexpr int kTileQueries = 128;  // (row, head) pairs that share the reading of a tile's keys.
constexpr int kBlockQueries = 6;   // Of them, so many are in registers at a time.
constexpr int kBlockVecs = kWidth == 16 ? 4 : 2;

// ---- Keys, transposed: [groups of kWidth keys][dim][kWidth]

// Lanes 4i to 4i + 3 are the 4 values that rows[4i] points to.
static inline Vec join(const float* const* rows, int64_t at) {
#if defined(__AVX512F__)
  __m512 joined = _mm512_castps128_ps512(_mm_loadu_ps(rows[0] + at));
  joined = _mm512_insertf32x4(joined, _mm_loadu_ps(rows[4] + at), 1);
  joined = _mm512_insertf32x4(joined, _mm_loadu_ps(rows[8] + at), 2);
  return _mm512_insertf32x4(joined, _mm_loadu_ps(rows[12] + at), 3);
#elif defined(__AVX__)
  const __m256 joined = _mm256_castps128_ps256(_mm_loadu_ps(rows[0] + at));
  return _mm256_insertf128_ps(joined, _mm_loadu_ps(rows[4] + at), 1);
#else
  return load(rows[0] + at);
#endif
}

static inline Vec first_pairs(Vec a, Vec b) {  // Of every 4 lanes: a0 b0 a1 b1
#if defined(__AVX512F__)
  return BATON_SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
#elif defined(__AVX__)
  return BATON_SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
#else
  return BATON_SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}

static inline Vec last_pairs(Vec a, Vec b) {  // Of every 4 lanes: a2 b2 a3 b3
#if defined(__AVX512F__)
  return BATON_SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#elif defined(__AVX__)
  return BATON_SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
#else
  return BATON_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

static inline Vec first_halves(Vec a, Vec b) {  // Of every 4 lanes: a0 a1 b0 b1
#if defined(__AVX512F__)
  return BATON_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
#elif defined(__AVX__)
  return BATON_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
#else
  return BATON_SHUFFLE(a, b, 0, 1, 4, 5);
#endif
}

static inline Vec last_halves(Vec a, Vec b) {  // Of every 4 lanes: a2 a3 b2 b3
#if defined(__AVX512F__)
  return BATON_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
#elif defined(__AVX__)
  return BATON_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
#else
  return BATON_SHUFFLE(a, b, 2, 3, 6, 7);
#endif
}

// Transposes 4 * kQuads values of each of kWidth rows, from `at` on; columns become `step` apart.
template <int kQuads>
static inline void pack_columns(const float* const* rows, int64_t at, float* packed,
                                int64_t step) {
  Vec joined[kQuads][4];
  for (int row = 0; row < 4; ++row) {
    for (int quad = 0; quad < kQuads; ++quad) joined[quad][row] = join(rows + row, at + 4 * quad);
  }
  for (int quad = 0; quad < kQuads; ++quad) {
    const Vec(&row)[4] = joined[quad];
    float* to = packed + (at + 4 * quad) * step;
    const Vec first = first_pairs(row[0], row[1]), second = first_pairs(row[2], row[3]);
    const Vec third = last_pairs(row[0], row[1]), fourth = last_pairs(row[2], row[3]);
    store(to, first_halves(first, second));
    store(to + step, last_halves(first, second));
    store(to + 2 * step, first_halves(third, fourth));
    store(to + 3 * step, last_halves(third, fourth));
  }
}

// Transposes kWidth rows of `dim` values, or words of as many bytes.
static inline void pack_keys(const float* const* rows, int64_t dim, float* packed,
                             int64_t step = kWidth) {
  constexpr int kQuads = kWidth == 16 ? 4 : 2;
  int64_t at = 0;
  for (; at + 4 * kQuads <= dim; at += 4 * kQuads) pack_columns<kQuads>(rows, at, packed, step);
  for (; at + 4 <= dim; at += 4) pack_columns<1>(rows, at, packed, step);
  for (; at < dim; ++at) {
    for (int key = 0; key < kWidth; ++key) packed[at * step + key] = rows[key][at];
  }
}

// ---- Scores

// scores[query][key] = q[query] . key, of kVecs groups of packed keys.
template <int kQueries, int kVecs>
static void score_block(const float* q, const float* packed, int64_t dim, float* scores) {
  Vec sums[kQueries][kVecs] = {};
  for (int64_t at = 0; at < dim; ++at) {
    Vec keys[kVecs];
    for (int v = 0; v < kVecs; ++v) keys[v] = load(packed + (v * dim + at) * kWidth);
    for (int query = 0; query < kQueries; ++query) {
      const float value = q[query * dim + at];
      for (int v = 0; v < kVecs; ++v) sums[query][v] = value * keys[v] + sums[query][v];
    }
  }
  for (int query = 0; query < kQueries; ++query) {
    for (int v = 0; v < kVecs; ++v) store(scores + query * kTileKeys + v * kWidth, sums[query][v]);
  }
}

template <int kQueries>
static void score_groups(const float* q, const float* packed, int64_t dim, int groups,
                         float* scores) {
  for (; groups >= kBlockVecs; groups -= kBlockVecs) {
    score_block<kQueries, kBlockVecs>(q, packed, dim, scores);
    packed += kBlockVecs * kWidth * dim;
    scores += kBlockVecs * kWidth;
  }
  for (; groups > 0; --groups) {
    score_block<kQueries, 1>(q, packed, dim, scores);
    packed += kWidth * dim;
    scores += kWidth;
  }
}

// ---- Softmax, one tile after the other (Milakov and Gimelshein, 2018)

// What a query has gathered so far: sum of e^(score - highest) * value, and of e^(score - highest).
struct Gathered {
  float* sums;  // [queries, stride]
  float* highest;
  float* totals;
};

// By how much sums shrink when their highest score rises.
static inline float fade_of(float before, float after) {
  return before == after ? 1.0f : exp_below(splat(before - after))[0];
}

// Turns a query's scores into shares, 0 outside [begin, end); returns what to fade its sums by.
static inline float soften(float* scores, int begin, int end, float softcap, float* highest,
                           float* total) {
  constexpr int kVecs = kTileKeys / kWidth;
  Vec values[kVecs];
  Vec top = splat(-kInfinity);
  for (int v = 0; v < kVecs; ++v) {
    Vec value = load(scores + v * kWidth);
    if (softcap != 0.0f) value = tanh_of(value / softcap) * softcap;
    const IntVec key = lane_numbers() + v * kWidth;
    value = (key >= begin) & (key < end) ? value : splat(-kInfinity);
    values[v] = value;
    top = larger(top, value);
  }
  const float before = *highest, found = largest_of(top);
  const float after = found > before ? found : before;
  const float against = after == -kInfinity ? 0.0f : after;
  Vec sum{};
  for (int v = 0; v < kVecs; ++v) {
    const Vec share = exp_below(values[v] - against);
    store(scores + v * kWidth, share);
    sum += share;
  }
  const float fade = fade_of(before, after);
  *highest = after;
  *total = multiply_add(*total, fade, sum_of(sum));
  return fade;
}

// ---- Values

// sums[query] = sums[query] * fade + the sum of share * value over keys [begin, end), of kVecs
// vectors of every value.
template <int kQueries, int kVecs>
static inline void weigh_block(const float* shares, const float* fades, const float* const* values,
                               int begin, int end, int64_t column, int lanes, float* sums,
                               int64_t stride) {
  Vec into[kQueries][kVecs];
  for (int query = 0; query < kQueries; ++query) {
    for (int v = 0; v < kVecs; ++v) {
      into[query][v] = load(sums + query * stride + column + v * kWidth) * fades[query];
    }
  }
  for (int key = begin; key < end; ++key) {
    const float* row = values[key] + column;
    Vec value[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      value[v] = lanes == kWidth ? load(row + v * kWidth) : load_some(row, lanes);
    }
    for (int query = 0; query < kQueries; ++query) {
      const float share = shares[query * kTileKeys + key];
      for (int v = 0; v < kVecs; ++v) into[query][v] = share * value[v] + into[query][v];
    }
  }
  for (int query = 0; query < kQueries; ++query) {
    for (int v = 0; v < kVecs; ++v) {
      store(sums + query * stride + column + v * kWidth, into[query][v]);
    }
  }
}

template <int kQueries>
static void weigh_values(const float* shares, const float* fades, const float* const* values,
                         int begin, int end, int64_t dim, float* sums, int64_t stride) {
  constexpr int kVecs = kQueries <= 2 ? 2 * kBlockVecs : kBlockVecs;
  int64_t column = 0;
  for (; column + kVecs * kWidth <= dim; column += kVecs * kWidth) {
    weigh_block<kQueries, kVecs>(shares, fades, values, begin, end, column, kWidth, sums, stride);
  }
  for (; column + kWidth <= dim; column += kWidth) {
    weigh_block<kQueries, 1>(shares, fades, values, begin, end, column, kWidth, sums, stride);
  }
  if (column < dim) {
    const int lanes = static_cast<int>(dim - column);
    weigh_block<kQueries, 1>(shares, fades, values, begin, end, column, lanes, sums, stride);
  }
}

// ---- Blocks of queries of any number up to kBlockQueries

template <class Call>
static inline void with_count(int count, Call call) {
  switch (count) {
    case 1: return call(std::integral_constant<int, 1>());
    case 2: return call(std::integral_constant<int, 2>());
    case 3: return call(std::integral_constant<int, 3>());
    case 4: return call(std::integral_constant<int, 4>());
    case 5: return call(std::integral_constant<int, 5>());
    default: return call(std::integral_constant<int, kBlockQueries>());
  }
}

// Calls body(first, count) for [0, queries) in blocks of nearly equal size.
template <class Body>
static inline void for_blocks(int queries, Body body) {
  int left = (queries + kBlockQueries - 1) / kBlockQueries;
  for (int first = 0; left > 0; --left) {
    const int count = (queries - first + left - 1) / left;
    body(first, count);
    first += count;
  }
}

}  // namespace baton
