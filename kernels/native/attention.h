// Attention of a ragged batch over the paged KV pool, decodes and chunks of prompts alike.
//
// The queries of a sequence that share a KV head are (row, head) pairs; a tile of them goes over
// the keys it sees, tile by tile, with an online softmax (FlashAttention, Dao et al., 2022). Keys
// are gathered in spans of fixed size, and spans are put together in the order of the sequence, so
// that a long decode's spans may be computed by several threads without a change in any bit.
#pragma once

#include <algorithm>

#include "attention_tile.h"
#include "batch.h"

namespace baton {

constexpr int32_t kSpanKeys = 1024;
static_assert(kSpanKeys % kTileKeys == 0);

struct Attention {
  const Sequence* sequences;
  int32_t count;
  int32_t heads;      // A multiple of shape.kv_heads.
  int32_t value_dim;  // head_dim, or, of a pool with one part, the first so many values of it.
  int32_t window;     // Keys that a row sees at most, its own included; 0: all.
  float scale;
  float softcap;       // Scores are squeezed to +- this by tanh; 0: they are not.
  const float* sinks;  // [heads] or null: scores that take their share and give nothing.
  const float* q;      // [tokens, heads, head_dim], q_stride floats from a token to the next.
  int64_t q_stride;
  const float* pool;  // This layer's first value in block 0; the new tokens' KV is there already.
  PoolShape shape;
  float* out;  // [tokens, heads, value_dim], out_stride floats from a token to the next.
  int64_t out_stride;
  float* scratch;     // attention_scratch() floats for every thread.
  float* partials;    // attention_partials() floats, perhaps none.
  int32_t* counters;  // [count * kv_heads], zero; they are zero again afterwards.

  int32_t group() const { return heads / shape.kv_heads; }
};

// ---- Memory

static inline int64_t sums_stride(int64_t value_dim) {
  return (value_dim + kWidth - 1) / kWidth * kWidth;
}

static inline int64_t gathered_floats(int64_t queries, int64_t value_dim) {
  return queries * (sums_stride(value_dim) + 2);
}

static inline Gathered gathered_at(float* memory, int64_t queries, int64_t value_dim) {
  float* highest = memory + queries * sums_stride(value_dim);
  return {memory, highest, highest + queries};
}

// What a thread works with: queries, packed keys, scores, fades, zeros, and two sets of sums.
struct AttentionScratch {
  float *q, *packed, *scores, *fades, *zeros;
  Gathered all, span;

  AttentionScratch(float* memory, int64_t head_dim, int64_t value_dim) {
    const auto take = [&](int64_t count) {
      float* taken = memory;
      memory += count;
      return taken;
    };
    q = take(kTileQueries * head_dim);
    packed = take(kTileKeys * head_dim);
    scores = take(kTileQueries * kTileKeys);
    fades = take(kTileQueries);
    zeros = take(head_dim);
    const int64_t sums = gathered_floats(kTileQueries, value_dim);
    all = gathered_at(take(sums), kTileQueries, value_dim);
    span = gathered_at(take(sums), kTileQueries, value_dim);
  }
};

// Floats of scratch memory that each thread needs.
static inline int64_t attention_scratch(int64_t head_dim, int64_t value_dim) {
  return (kTileQueries + kTileKeys + 1) * head_dim + kTileQueries * (kTileKeys + 1) +
         2 * gathered_floats(kTileQueries, value_dim);
}

// ---- Work

// A tile of queries of one sequence and KV head; query i is head i % group of row i / group.
struct Unit {
  const Sequence* sequence;
  int32_t kv_head, first, queries;
  int32_t begin, end;  // Keys that any of them sees.
  int32_t group;

  int32_t row(int32_t query) const { return (first + query) / group; }
  int32_t position(int32_t query) const {
    return sequence->length - sequence->rows + row(query);
  }
  int32_t first_span() const { return begin / kSpanKeys; }
  int32_t spans() const { return (end - 1) / kSpanKeys + 1 - first_span(); }
  // In keys times queries; reading the keys costs as much as a few queries.
  int64_t cost() const { return static_cast<int64_t>(end - begin) * (queries + 8); }
};

template <class Body>
static inline void for_units(const Attention& job, Body body) {
  const int32_t group = job.group();
  for (int32_t index = 0; index < job.count; ++index) {
    const Sequence& sequence = job.sequences[index];
    const int32_t total = sequence.rows * group;
    const int32_t tiles = (total + kTileQueries - 1) / kTileQueries;
    for (int32_t head = 0; head < job.shape.kv_heads; ++head) {
      for (int32_t tile = 0; tile < tiles; ++tile) {
        const int32_t first = static_cast<int32_t>(static_cast<int64_t>(total) * tile / tiles);
        const int32_t last = static_cast<int32_t>(static_cast<int64_t>(total) * (tile + 1) / tiles);
        Unit unit{&sequence, head, first, last - first, 0, 0, group};
        unit.end = unit.position(unit.queries - 1) + 1;
        if (job.window) unit.begin = std::max(0, unit.position(0) + 1 - job.window);
        body(unit);
      }
    }
  }
}

static inline int64_t total_cost(const Attention& job) {
  int64_t total = 0;
  for_units(job, [&](const Unit& unit) { total += unit.cost(); });
  return total;
}

// Whether a unit is so large a part of the work that threads share it, span by span.
static inline bool is_split(const Unit& unit, int64_t total, int threads) {
  return threads > 1 && unit.spans() > 1 && unit.cost() * threads * 2 > total &&
         unit.queries == unit.sequence->rows * unit.group;
}

// Floats that the spans of split units are kept in.
static inline int64_t attention_partials(const Attention& job, int threads) {
  const int64_t total = total_cost(job);
  int64_t floats = 0;
  for_units(job, [&](const Unit& unit) {
    if (!is_split(unit, total, threads)) return;
    floats += unit.spans() * gathered_floats(unit.queries, job.value_dim);
  });
  return floats;
}

// ---- One span of keys

struct KeyRows {
  const float *keys[kTileKeys], *values[kTileKeys];
};

// Finds the keys [begin, end) of a tile; whole groups of kWidth are filled up with zeros.
static inline void find_rows(const Attention& job, const Unit& unit, int32_t tile, int begin,
                             int end, const float* zeros, KeyRows& rows) {
  const PoolShape& shape = job.shape;
  const float* pool = job.pool + unit.kv_head * shape.head_stride();
  for (int key = begin / kWidth * kWidth; key < begin; ++key) rows.keys[key] = zeros;
  for (int key = end; key % kWidth; ++key) rows.keys[key] = zeros;
  for (int key = begin; key < end;) {
    const int32_t offset = (tile + key) % shape.block_size;
    const int32_t run = std::min(end - key, shape.block_size - offset);
    const int64_t block = unit.sequence->blocks[(tile + key) / shape.block_size];
    const int64_t within = static_cast<int64_t>(offset) * shape.head_dim;
    const float* at = pool + block * shape.block_stride + within;
    for (const int stop = key + run; key < stop; ++key, at += shape.head_dim) {
      rows.keys[key] = at;
      rows.values[key] = at + shape.value_offset();
    }
  }
}

// Calls for rows in the order they lie in, which the hardware's prefetcher then runs ahead of: the
// transposition's own order, down a column of rows, does not start it.
static inline void prefetch(const float* const* rows, int begin, int end, int64_t dim) {
  for (int row = begin; row < end; ++row) {
    for (int64_t at = 0; at < dim; at += 16) __builtin_prefetch(rows[row] + at);
  }
}

// Which of a tile's keys a query sees.
struct Seen {
  int begin, end;
};

static inline Seen seen_by(const Attention& job, const Unit& unit, int32_t tile, int32_t query) {
  const int32_t position = unit.position(query) - tile;
  const int32_t begin = job.window ? std::max(0, position + 1 - job.window) : 0;
  return {begin, std::min(kTileKeys, position + 1)};
}

static inline void attend_tile(const Attention& job, const Unit& unit, int32_t tile,
                               const AttentionScratch& scratch, const Gathered& into) {
  const int64_t dim = job.shape.head_dim, stride = sums_stride(job.value_dim);
  const int begin = std::max(0, unit.begin - tile), end = std::min(kTileKeys, unit.end - tile);
  KeyRows rows;
  find_rows(job, unit, tile, begin, end, scratch.zeros, rows);
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

// Gathers what a unit's queries see of a span, numbered from the start of the sequence.
static inline void attend_span(const Attention& job, const Unit& unit, int32_t span,
                               const AttentionScratch& scratch, const Gathered& into) {
  std::fill_n(into.sums, unit.queries * sums_stride(job.value_dim), 0.0f);
  std::fill_n(into.highest, unit.queries, -kInfinity);
  std::fill_n(into.totals, unit.queries, 0.0f);
  const int32_t begin = std::max(unit.begin, span * kSpanKeys);
  const int32_t end = std::min(unit.end, (span + 1) * kSpanKeys);
  for (int32_t tile = begin / kTileKeys * kTileKeys; tile < end; tile += kTileKeys) {
    attend_tile(job, unit, tile, scratch, into);
  }
}

// ---- From spans to outputs

static inline void merge(const Gathered& into, const Gathered& span, int64_t queries,
                         int64_t stride) {
  for (int64_t query = 0; query < queries; ++query) {
    const float a = into.highest[query], b = span.highest[query];
    const float highest = b > a ? b : a;
    const float fade = fade_of(a, highest), gain = fade_of(b, highest);
    float* sums = into.sums + query * stride;
    const float* more = span.sums + query * stride;
    for (int64_t at = 0; at < stride; at += kWidth) {
      const Vec faded = load(sums + at) * fade;
      store(sums + at, load(more + at) * gain + faded);
    }
    const float faded = into.totals[query] * fade;
    into.totals[query] = span.totals[query] * gain + faded;
    into.highest[query] = highest;
  }
}

static inline void write_out(const Attention& job, const Unit& unit, const Gathered& all) {
  const int64_t stride = sums_stride(job.value_dim);
  for (int32_t query = 0; query < unit.queries; ++query) {
    const int32_t head = unit.kv_head * unit.group + (unit.first + query) % unit.group;
    float factor = 1.0f, total = all.totals[query];
    if (job.sinks) {
      const float before = all.highest[query], sink = job.sinks[head];
      const float highest = sink > before ? sink : before;
      factor = fade_of(before, highest);
      total = total * factor + fade_of(sink, highest);
    }
    factor /= total;
    const float* sums = all.sums + query * stride;
    float* out = job.out + (unit.sequence->row + unit.row(query)) * job.out_stride +
                 static_cast<int64_t>(head) * job.value_dim;
    for (int64_t at = 0; at < job.value_dim; at += kWidth) {
      const int lanes = static_cast<int>(std::min<int64_t>(kWidth, job.value_dim - at));
      store_lanes(out + at, load(sums + at) * factor, lanes);
    }
  }
}

// Copies a unit's queries, times the scale.
static inline void take_queries(const Attention& job, const Unit& unit, float* q) {
  const int64_t dim = job.shape.head_dim;
  for (int32_t query = 0; query < unit.queries; ++query, q += dim) {
    const int32_t head = unit.kv_head * unit.group + (unit.first + query) % unit.group;
    const float* from = job.q + (unit.sequence->row + unit.row(query)) * job.q_stride + head * dim;
    for (int64_t at = 0; at < dim; ++at) q[at] = from[at] * job.scale;
  }
}

static inline void attend_whole(const Attention& job, const Unit& unit,
                                const AttentionScratch& scratch) {
  take_queries(job, unit, scratch.q);
  attend_span(job, unit, unit.first_span(), scratch, scratch.all);
  for (int32_t span = 1; span < unit.spans(); ++span) {
    attend_span(job, unit, unit.first_span() + span, scratch, scratch.span);
    merge(scratch.all, scratch.span, unit.queries, sums_stride(job.value_dim));
  }
  write_out(job, unit, scratch.all);
}

// Computes one span of a split unit; who comes last puts all spans together.
static inline void attend_part(const Attention& job, const Unit& unit, int32_t span,
                               float* partials, const AttentionScratch& scratch) {
  const int64_t size = gathered_floats(unit.queries, job.value_dim);
  const auto part = [&](int32_t number) {
    return gathered_at(partials + number * size, unit.queries, job.value_dim);
  };
  take_queries(job, unit, scratch.q);
  attend_span(job, unit, unit.first_span() + span, scratch, part(span));
  int32_t* counter =
      job.counters + (unit.sequence - job.sequences) * job.shape.kv_heads + unit.kv_head;
  if (__atomic_add_fetch(counter, 1, __ATOMIC_ACQ_REL) < unit.spans()) return;
  __atomic_store_n(counter, 0, __ATOMIC_RELAXED);
  for (int32_t other = 1; other < unit.spans(); ++other) {
    merge(part(0), part(other), unit.queries, sums_stride(job.value_dim));
  }
  write_out(job, unit, part(0));
}

static inline void attend(const Attention& job, int thread, int threads) {
  const int64_t dim = job.shape.head_dim;
  const AttentionScratch scratch(
      job.scratch + thread * attention_scratch(dim, job.value_dim), dim, job.value_dim);
  std::fill_n(scratch.zeros, dim, 0.0f);
  const int64_t total = total_cost(job);
  const Share share = share_of(total, thread, threads);
  int64_t done = 0;  // Cost of the units so far; a piece is its middle's thread's.
  float* partials = job.partials;
  const auto is_mine = [&](int64_t cost) {
    const int64_t middle = done + cost / 2;
    done += cost;
    return share.begin <= middle && middle < share.end;
  };
  for_units(job, [&](const Unit& unit) {
    if (!is_split(unit, total, threads)) {
      if (is_mine(unit.cost())) attend_whole(job, unit, scratch);
      return;
    }
    const int32_t spans = unit.spans();
    for (int32_t span = 0; span < spans; ++span) {
      const Share part = share_of(unit.cost(), span, spans);
      if (is_mine(part.end - part.begin)) attend_part(job, unit, span, partials, scratch);
    }
    partials += spans * gathered_floats(unit.queries, job.value_dim);
  });
}

}  // namespace baton
