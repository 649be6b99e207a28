// Attention over a tile of keys in bfloat16, with vectors.
//
// Scores are sums over a head's dimensions and values are sums over keys, both of them as
// bfloat16.h defines them. Queries, times the scale, and the shares that softmax gives are rounded
// to bfloat16; scores, the shares' total and what is gathered stay float32.
#pragma once

#include "attention_job.h"
#include "bfloat16.h"

namespace baton {

constexpr int kPairVecs = kWidth == 16 ? 2 : 1;  // In registers, with both chains of 6 queries.

static inline int64_t padded(int64_t values) { return whole_groups(values) * kGroup; }

// What a thread works with: rounded queries as floats, keys filled up with zeros, the same packed,
// shares of a block of queries, what their values add up to, zeros, and two sets of sums.
struct PairScratch {
  float *q, *packed, *scores, *found;
  uint16_t *keys, *zeros;
  Gathered all, span;
  int64_t floats;

  PairScratch(float* memory, int64_t head_dim, int64_t value_dim) {
    float* at = memory;
    const int64_t dim = padded(head_dim);
    q = take(at, kTileQueries * dim);
    packed = take(at, kTileKeys * dim / 2);
    scores = take(at, kBlockQueries * kTileKeys);
    found = take(at, kBlockQueries * sums_stride(value_dim));
    keys = take<uint16_t>(at, kTileKeys * dim);
    zeros = take<uint16_t>(at, dim);
    const int64_t sums = gathered_floats(kTileQueries, value_dim);
    all = gathered_at(take(at, sums), kTileQueries, value_dim);
    span = gathered_at(take(at, sums), kTileQueries, value_dim);
    floats = at - memory;
  }

  void clear(int64_t head_dim) { std::fill_n(zeros, padded(head_dim), uint16_t{0}); }
};

static inline void take_queries(const Attention& job, const Unit& unit,
                                const PairScratch& scratch) {
  const int64_t dim = job.shape.head_dim, whole = padded(dim);
  float* q = scratch.q;
  for (int32_t query = 0; query < unit.queries; ++query, q += whole) {
    const float* from = query_of(job, unit, query);
    std::fill_n(q, whole, 0.0f);
    for_vectors(dim, [&](int64_t at, int lanes) {
      store_lanes(q + at, rounded(load_lanes(from + at, lanes) * job.scale), lanes);
    });
  }
}

// Makes rows of whole groups out of rows of `dim` values.
static inline void fill_up(const uint16_t** rows, int begin, int end, int64_t dim, uint16_t* room) {
  const int64_t whole = padded(dim);
  if (whole == dim) return;
  for (int key = begin; key < end; ++key, room += whole) {
    std::memcpy(room, rows[key], static_cast<size_t>(dim) * sizeof *room);
    std::fill_n(room + dim, whole - dim, uint16_t{0});
    rows[key] = room;
  }
}

// scores[query][key] = q[query] . key, of kVecs groups of packed keys.
template <int kQueries, int kVecs>
static inline void score_pairs(const float* q, const float* packed, int64_t dim, float* scores) {
  const int64_t words = dim / 2;
  Vec totals[kQueries][kVecs] = {};
  for (int64_t group = 0; group < dim; group += kGroup) {
    Vec even[kQueries][kVecs] = {}, odd[kQueries][kVecs] = {};
    for (int64_t at = group; at < group + kGroup; at += 2) {
      IntVec keys[kVecs];
      for (int v = 0; v < kVecs; ++v) keys[v] = load_words(packed + (v * words + at / 2) * kWidth);
      for (int query = 0; query < kQueries; ++query) {
        const float first = q[query * dim + at], second = q[query * dim + at + 1];
        for (int v = 0; v < kVecs; ++v) {
          even[query][v] = first_of(keys[v]) * first + even[query][v];
          odd[query][v] = second_of(keys[v]) * second + odd[query][v];
        }
      }
    }
    for (int query = 0; query < kQueries; ++query) {
      for (int v = 0; v < kVecs; ++v) totals[query][v] += even[query][v] + odd[query][v];
    }
  }
  for (int query = 0; query < kQueries; ++query) {
    for (int v = 0; v < kVecs; ++v) store(scores + query * kTileKeys + v * kWidth, totals[query][v]);
  }
}

static inline Vec widen(const uint16_t* from, int lanes) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __mmask16 mask = static_cast<__mmask16>((1u << lanes) - 1);
  const __m512i words = _mm512_maskz_cvtepu16_epi32(
      mask, lanes == kWidth ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                            : _mm256_maskz_loadu_epi16(mask, from));
  return reinterpret_cast<Vec>(_mm512_slli_epi32(words, 16));
#else
  uint16_t values[kWidth] = {};
  std::memcpy(values, from, static_cast<size_t>(lanes) * sizeof *values);
  IntVec words{};
  for (int lane = 0; lane < kWidth; ++lane) words[lane] = values[lane] << 16;
  return of_bits(words);
#endif
}

// found[query] = the sum of share * value over the keys of groups [begin, end), of one vector of
// each value.
template <int kQueries>
static inline void weigh_pairs(const float* shares, const uint16_t* const* values, int begin,
                               int end, int64_t column, int lanes, float* found, int64_t stride) {
  Vec totals[kQueries] = {};
  for (int group = begin; group < end; group += kGroup) {
    Vec even[kQueries] = {}, odd[kQueries] = {};
    for (int key = group; key < group + kGroup; key += 2) {
      const Vec first = widen(values[key] + column, lanes);
      const Vec second = widen(values[key + 1] + column, lanes);
      for (int query = 0; query < kQueries; ++query) {
        const float* share = shares + query * kTileKeys + key;
        even[query] = first * share[0] + even[query];
        odd[query] = second * share[1] + odd[query];
      }
    }
    for (int query = 0; query < kQueries; ++query) totals[query] += even[query] + odd[query];
  }
  for (int query = 0; query < kQueries; ++query) {
    store(found + query * stride + column, totals[query]);
  }
}

// sums = sums * fade + found
static inline void gather_found(const float* found, float fade, float* sums, int64_t stride) {
  for (int64_t at = 0; at < stride; at += kWidth) {
    store(sums + at, load(sums + at) * fade + load(found + at));
  }
}

// A block of queries on the keys [from, last) that any of them sees.
template <int kQueries>
static inline void attend_block(const Attention& job, const Unit& unit, int32_t tile, int query,
                                Share keys, const KeyRows<uint16_t>& rows,
                                const PairScratch& scratch, const Gathered& into) {
  const int64_t dim = padded(job.shape.head_dim), stride = sums_stride(job.value_dim);
  constexpr int kStep = kPairVecs * kWidth;
  for (int64_t key = keys.begin / kGroup * kGroup; key < keys.end; key += kStep) {
    score_pairs<kQueries, kPairVecs>(scratch.q + query * dim, scratch.packed + key * dim / 2, dim,
                                     scratch.scores + key);
  }
  float fades[kQueries];
  for (int i = 0; i < kQueries; ++i) {
    const Seen seen = seen_by(job, unit, tile, query + i);
    float* scores = scratch.scores + i * kTileKeys;
    fades[i] = soften(scores, seen.begin, seen.end, job.softcap, into.highest + query + i,
                      into.totals + query + i);
    for (int at = 0; at < kTileKeys; at += kWidth) store(scores + at, rounded(load(scores + at)));
  }
  const int begin = static_cast<int>(keys.begin) / kGroup * kGroup;
  for_vectors(job.value_dim, [&](int64_t column, int lanes) {
    weigh_pairs<kQueries>(scratch.scores, rows.values, begin, static_cast<int>(keys.end), column,
                          lanes, scratch.found, stride);
  });
  for (int i = 0; i < kQueries; ++i) {
    gather_found(scratch.found + i * stride, fades[i], into.sums + (query + i) * stride, stride);
  }
}

static inline void attend_tile(const Attention& job, const Unit& unit, int32_t tile,
                               const PairScratch& scratch, const Gathered& into) {
  const int64_t dim = job.shape.head_dim, words = padded(dim) / 2;
  const int begin = std::max(0, unit.begin - tile), end = std::min(kTileKeys, unit.end - tile);
  KeyRows<uint16_t> rows;
  find_rows(job, unit, tile, begin, end, kGroup, scratch.zeros, rows);
  fill_up(rows.keys, begin, end, dim, scratch.keys);
  prefetch(rows.keys, begin, end, dim);
  for (int key = begin / kGroup * kGroup; key < end || key % kGroup; key += kWidth) {
    const float* const* from = reinterpret_cast<const float* const*>(rows.keys + key);
    pack_keys(from, words, scratch.packed + key * words);
  }
  prefetch(rows.values, begin, end, job.value_dim);
  for_blocks(unit.queries, [&](int query, int count) {
    const int last = seen_by(job, unit, tile, query + count - 1).end;
    const int from = seen_by(job, unit, tile, query).begin;
    if (from >= last) return;
    with_count(count, [&](auto n) {
      attend_block<n>(job, unit, tile, query, {from, last}, rows, scratch, into);
    });
  });
}

// Sums are as they should be.
static inline void finish_span(const Attention&, const Unit&, const PairScratch&,
                               const Gathered&) {}

}  // namespace baton
