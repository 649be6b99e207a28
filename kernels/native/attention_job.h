// What attention computes, cut into units, and where a unit's keys lie.
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
  const void* pool;  // This layer's first value in block 0; the new tokens' KV is there already.
  PoolShape shape;
  bool pairs;  // The pool holds bfloat16, and products are in bfloat16; otherwise float32.
  float* out;  // [tokens, heads, value_dim], out_stride floats from a token to the next.
  int64_t out_stride;
  float* scratch;     // attention_scratch() floats for every thread.
  float* partials;    // attention_partials() floats, perhaps none.
  int32_t* counters;  // [count * kv_heads], zero; they are zero again afterwards.

  int32_t group() const { return heads / shape.kv_heads; }
};

// ---- Memory of what is gathered

static inline int64_t sums_stride(int64_t value_dim) {
  return (value_dim + kWidth - 1) / kWidth * kWidth;
}

// Room for whole tiles of queries, whose sums AMX gathers by dimension.
static inline int64_t whole_tiles(int64_t queries) { return (queries + 15) / 16 * 16; }

static inline int64_t gathered_floats(int64_t queries, int64_t value_dim) {
  return whole_tiles(queries) * (sums_stride(value_dim) + 2);
}

// The next `count` values of scratch memory, from where a cache line begins if `memory` does.
template <class Value = float>
static inline Value* take(float*& memory, int64_t count) {
  float* taken = memory;
  memory += (count * static_cast<int64_t>(sizeof(Value)) + 63) / 64 * 16;
  return reinterpret_cast<Value*>(taken);
}

static inline Gathered gathered_at(float* memory, int64_t queries, int64_t value_dim) {
  float* highest = memory + whole_tiles(queries) * sums_stride(value_dim);
  return {memory, highest, highest + whole_tiles(queries)};
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

static inline const float* query_of(const Attention& job, const Unit& unit, int32_t query) {
  const int64_t row = unit.sequence->row + unit.row(query);
  const int64_t head = unit.kv_head * unit.group + (unit.first + query) % unit.group;
  return job.q + row * job.q_stride + head * job.shape.head_dim;
}

// ---- Keys and values of a tile

template <class Value>
struct KeyRows {
  const Value *keys[kTileKeys], *values[kTileKeys];
};

// Finds the keys [begin, end) of a tile; groups of `whole` are filled up with zeros.
template <class Value>
static inline void find_rows(const Attention& job, const Unit& unit, int32_t tile, int begin,
                             int end, int whole, const Value* zeros, KeyRows<Value>& rows) {
  const PoolShape& shape = job.shape;
  const Value* pool = static_cast<const Value*>(job.pool) + unit.kv_head * shape.head_stride();
  const int last = (end + whole - 1) / whole * whole;
  for (int key = begin / whole * whole; key < last; ++key) {
    if (key < begin || key >= end) rows.keys[key] = rows.values[key] = zeros;
  }
  for (int key = begin; key < end;) {
    const int32_t offset = (tile + key) % shape.block_size;
    const int32_t run = std::min(end - key, shape.block_size - offset);
    const int64_t block = unit.sequence->blocks[(tile + key) / shape.block_size];
    const int64_t within = static_cast<int64_t>(offset) * shape.head_dim;
    const Value* at = pool + block * shape.block_stride + within;
    for (const int stop = key + run; key < stop; ++key, at += shape.head_dim) {
      rows.keys[key] = at;
      rows.values[key] = at + shape.value_offset();
    }
  }
}

// Calls for rows in the order they lie in, which the hardware's prefetcher then runs ahead of: the
// transposition's own order, down a column of rows, does not start it.
template <class Value>
static inline void prefetch(const Value* const* rows, int begin, int end, int64_t dim) {
  constexpr int64_t kLineValues = 64 / sizeof(Value);
  for (int row = begin; row < end; ++row) {
    for (int64_t at = 0; at < dim; at += kLineValues) __builtin_prefetch(rows[row] + at);
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

}  // namespace baton
