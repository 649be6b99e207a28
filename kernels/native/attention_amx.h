// Attention over a tile of keys in bfloat16, with AMX: what goes in, and few queries.
//
// The same sums as attention_pairs.h, 16 queries at a time:
//
//     scores   [keys, queries] = K as it lies in the pool x 16 queries, transposed once per unit
//     shares   [queries, keys]: scores, transposed and softened row by row
//     values   [queries, dims] = shares x V in pairs of keys
//
// No keys are transposed, and no values: a decode reads them once. Units of more queries go by
// attention_columns.h.
#pragma once

#include "amx.h"
#include "attention_pairs.h"

#if defined(BATON_AMX)

namespace baton {

constexpr int kKeyTiles = kTileKeys / kTileRows;
constexpr int kTileScores = kTileKeys * kTileRows;

struct TileScratch {
  uint32_t *q, *values;  // [16 queries][pairs of dims][16], [pairs of keys][value_dim]
  uint32_t* turned;      // [value_dim][pairs of keys]
  float *by_key, *next_by_key, *by_query, *found;
  uint32_t* shares;  // [16 queries][pairs of keys], or turned
  uint16_t *keys, *rows, *zeros;
  Gathered all, span;
  int64_t floats;

  TileScratch(float* memory, int64_t head_dim, int64_t value_dim) {
    float* at = memory;
    const int64_t dim = padded(head_dim), width = sums_stride(value_dim);
    q = take<uint32_t>(at, kTileQueries * dim / 2);
    values = take<uint32_t>(at, kTileKeys / 2 * width);
    turned = take<uint32_t>(at, width * kTileKeys / 2);
    by_key = take(at, kTileScores);
    next_by_key = take(at, kTileScores);
    by_query = take(at, kTileRows * kTileKeys);
    shares = take<uint32_t>(at, kTileRows * kTileKeys / 2);
    found = take(at, kTileRows * width);
    keys = take<uint16_t>(at, kTileKeys * dim);
    rows = take<uint16_t>(at, kTileRows * dim);
    zeros = take<uint16_t>(at, dim);
    const int64_t sums = gathered_floats(kTileQueries, value_dim);
    all = gathered_at(take(at, sums), kTileQueries, value_dim);
    span = gathered_at(take(at, sums), kTileQueries, value_dim);
    floats = at - memory;
  }

  void clear(int64_t head_dim) { std::fill_n(zeros, padded(head_dim), uint16_t{0}); }
};

// ---- Queries, in the order in which tiles multiply them

static inline void take_queries(const Attention& job, const Unit& unit,
                                const TileScratch& scratch) {
  const int64_t dim = job.shape.head_dim, whole = padded(dim);
  const float* starts[kTileRows];
  for (int row = 0; row < kTileRows; ++row) {
    starts[row] = reinterpret_cast<const float*>(scratch.rows + row * whole);
  }
  for (int32_t first = 0; first < unit.queries; first += kTileRows) {
    for (int row = 0; row < kTileRows; ++row) {
      uint16_t* to = scratch.rows + row * whole;
      if (first + row < unit.queries) {
        narrow_row(query_of(job, unit, first + row), dim, job.scale, to);
      } else {
        std::fill_n(to, whole, uint16_t{0});
      }
    }
    pack_keys(starts, whole / 2, reinterpret_cast<float*>(scratch.q + first * whole / 2));
  }
}

// ---- Keys and values of a tile

struct TileRows {
  const uint16_t* keys[kKeyTiles];
  int64_t key_bytes;  // From a key to the next.
};

// Finds the keys where they lie, if 16 of them are in one piece, and copies them otherwise. What
// lies in between and is not of the unit gives scores that nobody sees.
static inline TileRows find_tiles(const Attention& job, int begin, int end,
                                  const KeyRows<uint16_t>& rows, const TileScratch& scratch) {
  const PoolShape& shape = job.shape;
  const int64_t dim = shape.head_dim, whole = padded(dim);
  const bool lie = dim == whole && shape.block_size % kTileRows == 0;
  TileRows found{{}, whole * 2};
  for (int key = begin / kTileRows * kTileRows; key < end; key += kTileRows) {
    if (lie) {
      const int known = std::max(key, begin);
      found.keys[key / kTileRows] = rows.keys[known] - (known - key) * dim;
      continue;
    }
    uint16_t* room = scratch.keys + key * whole;
    found.keys[key / kTileRows] = room;
    for (int row = key; row < key + kTileRows; ++row, room += whole) {
      const int64_t known = begin <= row && row < end ? dim : 0;
      std::memcpy(room, rows.keys[row], static_cast<size_t>(known) * 2);
      std::fill_n(room + known, whole - known, uint16_t{0});
    }
  }
  return found;
}

static inline __m512i load_some_halves(const uint16_t* from, int64_t count) {
  if (count >= kGroup) return _mm512_loadu_si512(from);
  return _mm512_maskz_loadu_epi16((1u << count) - 1, from);
}

// Puts pairs of values side by side, each dimension's of two keys.
static inline void pair_values(const uint16_t* const* rows, int begin, int end, int64_t dim,
                               uint32_t* to) {
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4,  36, 5,
                                                    37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42,
                                                    11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const int64_t width = sums_stride(dim);
  for (int key = begin; key < end; key += 2) {
    uint32_t* words = to + key / 2 * width;
    for (int64_t at = 0; at < dim; at += kGroup) {
      const __m512i first = load_some_halves(rows[key] + at, dim - at);
      const __m512i second = load_some_halves(rows[key + 1] + at, dim - at);
      _mm512_storeu_si512(words + at, _mm512_permutex2var_epi16(first, low, second));
      if (at + kWidth >= dim) break;
      _mm512_storeu_si512(words + at + kWidth, _mm512_permutex2var_epi16(first, high, second));
    }
  }
}

// ---- Scores

// by_key [keys][16 queries], of key tiles [begin, end).
static inline void score_tiles(const uint32_t* q, const TileRows& rows, int begin, int end,
                               int64_t dim, float* by_key) {
  const uint16_t* keys[kKeyTiles];
  for (int tile = 0; tile < kKeyTiles; ++tile) {
    keys[tile] = rows.keys[begin <= tile && tile < end ? tile : begin];
  }
  before_loads();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t step = rows.key_bytes;
  for (int64_t at = 0; at < dim; at += kGroup, q += kPairs * kTileRows) {
    _tile_loadd(4, q, kTileBytes);
    _tile_loadd(5, keys[0] + at, step);
    _tile_loadd(6, keys[1] + at, step);
    _tile_dpbf16ps(0, 5, 4);
    _tile_dpbf16ps(1, 6, 4);
    _tile_loadd(5, keys[2] + at, step);
    _tile_loadd(6, keys[3] + at, step);
    _tile_dpbf16ps(2, 5, 4);
    _tile_dpbf16ps(3, 6, 4);
  }
  _tile_stored(0, by_key, kTileBytes);
  _tile_stored(1, by_key + kTileRows * kTileRows, kTileBytes);
  _tile_stored(2, by_key + 2 * kTileRows * kTileRows, kTileBytes);
  _tile_stored(3, by_key + 3 * kTileRows * kTileRows, kTileBytes);
}

// ---- Softmax

// From scores by key to rounded shares by query; fades are [16].
static inline void soften_rows(const Attention& job, const Unit& unit, int32_t tile,
                               const TileScratch& scratch, const Gathered& into, float* fades) {
  const float* rows[kTileRows];
  for (int keys = 0; keys < kTileKeys; keys += kTileRows) {
    for (int row = 0; row < kTileRows; ++row) rows[row] = scratch.by_key + (keys + row) * kTileRows;
    pack_keys(rows, (unit.queries + 3) / 4 * 4, scratch.by_query + keys, kTileKeys);
  }
  for (int i = 0; i < unit.queries; ++i) {
    const Seen seen = seen_by(job, unit, tile, i);
    float* scores = scratch.by_query + i * kTileKeys;
    fades[i] = soften(scores, seen.begin, seen.end, job.softcap, into.highest + i,
                      into.totals + i);
    narrow_row(scores, kTileKeys, 1.0f,
               reinterpret_cast<uint16_t*>(scratch.shares + i * kTileKeys / 2));
  }
}

// ---- Values

// found [16 queries][width] = shares x values, over groups of keys [begin, end).
static inline void weigh_tiles(const uint32_t* shares, const uint32_t* values, int begin, int end,
                               int64_t width, float* found) {
  before_loads();
  for (int64_t column = 0; column < width; column += 2 * kTileRows) {
    const bool two = column + kTileRows < width;
    _tile_zero(0);
    _tile_zero(1);
    for (int key = begin; key < end; key += kGroup) {
      const uint32_t* at = values + key / 2 * width + column;
      _tile_loadd(4, shares + key / 2, kTileKeys * 2);
      _tile_loadd(6, at, width * 4);
      _tile_dpbf16ps(0, 4, 6);
      if (two) {
        _tile_loadd(7, at + kTileRows, width * 4);
        _tile_dpbf16ps(1, 4, 7);
      }
    }
    _tile_stored(0, found + column, width * 4);
    if (two) _tile_stored(1, found + column + kTileRows, width * 4);
  }
}

// ---- All queries, no more than 16, of a unit, on keys [keys.begin, keys.end)

static inline void attend_rows(const Attention& job, const Unit& unit, int32_t tile, Share keys,
                               const TileRows& rows, const TileScratch& scratch,
                               const Gathered& into) {
  const int64_t whole = padded(job.shape.head_dim), width = sums_stride(job.value_dim);
  const int begin = static_cast<int>(keys.begin), end = static_cast<int>(keys.end);
  score_tiles(scratch.q, rows, begin / kTileRows, (end + kTileRows - 1) / kTileRows, whole,
              scratch.by_key);
  float fades[kTileRows];
  soften_rows(job, unit, tile, scratch, into, fades);
  weigh_tiles(scratch.shares, scratch.values, begin / kGroup * kGroup,
              (end + kGroup - 1) / kGroup * kGroup, width, scratch.found);
  for (int i = 0; i < unit.queries; ++i) {
    gather_found(scratch.found + i * width, fades[i], into.sums + i * width, width);
  }
}

}  // namespace baton

#endif
