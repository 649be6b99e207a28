// Attention over a tile of keys in float32.
#pragma once

#include "attention_job.h"

namespace baton {

// What a thread works with: queries, packed keys, scores, fades, zeros, and two sets of sums.
struct FloatScratch {
  float *q, *packed, *scores, *fades, *zeros;
  Gathered all, span;
  int64_t floats;

  FloatScratch(float* memory, int64_t head_dim, int64_t value_dim) {
    float* at = memory;
    q = take(at, kTileQueries * head_dim);
    packed = take(at, kTileKeys * head_dim);
    scores = take(at, kTileQueries * kTileKeys);
    fades = take(at, kTileQueries);
    zeros = take(at, head_dim);
    const int64_t sums = gathered_floats(kTileQueries, value_dim);
    all = gathered_at(take(at, sums), kTileQueries, value_dim);
    span = gathered_at(take(at, sums), kTileQueries, value_dim);
    floats = at - memory;
  }

  void clear(int64_t head_dim) { std::fill_n(zeros, head_dim, 0.0f); }
};

// Copies a unit's queries, times the scale.
static inline void take_queries(const Attention& job, const Unit& unit,
                                const FloatScratch& scratch) {
  float* q = scratch.q;
  const int64_t dim = job.shape.head_dim;
  for (int32_t query = 0; query < unit.queries; ++query, q += dim) {
    const float* from = query_of(job, unit, query);
    for (int64_t at = 0; at < dim; ++at) q[at] = from[at] * job.scale;
  }
}

static inline void attend_tile(const Attention& job, const Unit& unit, int32_t tile,
                               const FloatScratch& scratch, const Gathered& into) {
  const int64_t dim = job.shape.head_dim, stride = sums_stride(job.value_dim);
  const int begin = std::max(0, unit.begin - tile), end = std::min(kTileKeys, unit.end - tile);
  KeyRows<float> rows;
  find_rows(job, unit, tile, begin, end, kWidth, scratch.zeros, rows);
  const int first = begin / kWidth, groups = (end + kWidth - 1) / kWidth - first;
  float* packed = scratch.packed;
  for (int g = 0; g < groups; ++g) {
    const int row = (first + g) * kWidth;
    prefetch(rows.keys, row, row + kWidth, dim);
    pack_keys(rows.keys + row, dim, packed + g * kWidth * dim);
  }
  prefetch(rows.values, begin, end, job.value_dim);
  const auto for_seen = [&](auto body) {  // Blocks of queries that see any of these keys.
    for_blocks(unit.queries, [&](int query, int count) {
      const int last = seen_by(job, unit, tile, query + count - 1).end;
      const int from = seen_by(job, unit, tile, query).begin;
      if (from < last) with_count(count, [&](auto n) { body(query, n, from, last); });
    });
  };
  for_seen([&](int query, auto n, int, int) {
    score_groups<n>(scratch.q + query * dim, packed, dim, groups,
                    scratch.scores + query * kTileKeys + first * kWidth);
    for (int i = query; i < query + n; ++i) {
      const Seen seen = seen_by(job, unit, tile, i);
      scratch.fades[i] = soften(scratch.scores + i * kTileKeys, seen.begin, seen.end, job.softcap,
                                into.highest + i, into.totals + i);
    }
  });
  for_seen([&](int query, auto n, int from, int last) {
    weigh_values<n>(scratch.scores + query * kTileKeys, scratch.fades + query, rows.values, from,
                    last, job.value_dim, into.sums + query * stride, stride);
  });
}

// Sums are as they should be.
static inline void finish_span(const Attention&, const Unit&, const FloatScratch&,
                               const Gathered&) {}

}  // namespace baton
