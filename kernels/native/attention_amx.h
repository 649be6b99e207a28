// Attention over a tile of keys in bfloat16, with AMX.
//
// The same sums as attention_pairs.h, 16 queries at a time:
//
//     scores   [keys, queries] = K as it lies in the pool x 16 queries, transposed once per unit
//     shares   [queries, keys], transposed
//     values   [queries, dims] = shares x V in pairs of keys
//
// Softmax goes over scores as they are, a lane for a query, or, of few queries, over transposed
// ones, a lane for a key, which gives the same bits in less time.
#pragma once

#include "amx.h"
#include "attention_pairs.h"

#if defined(BATON_AMX)

namespace baton {

constexpr int kKeyTiles = kTileKeys / kTileRows;
constexpr int kFewQueries = 6;  // So few are softened one by one.

struct TileScratch {
  uint32_t *q, *values;  // [16 queries][pairs of dims][16], [pairs of keys][value_dim]
  float *by_key, *by_query, *found;
  uint32_t* shares;  // [16 queries][pairs of keys]
  uint16_t *keys, *rows, *zeros;
  Gathered all, span;
  int64_t floats;

  TileScratch(float* memory, int64_t head_dim, int64_t value_dim) {
    float* at = memory;
    const int64_t dim = padded(head_dim), width = sums_stride(value_dim);
    q = take<uint32_t>(at, kTileQueries * dim / 2);
    values = take<uint32_t>(at, kTileKeys / 2 * width);
    by_key = take(at, kTileKeys * kTileRows);
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

// ---- Softmax: what soften() does, in the same order, of 16 queries at once

struct SeenColumns {
  IntVec begin, end;
};

// The sum over keys in the order of soften(): 16 by 16, then halves on halves.
static inline Vec sum_by_key(const float* by_key) {
  Vec sums[kTileRows];
  for (int lane = 0; lane < kTileRows; ++lane) {
    sums[lane] = load(by_key + lane * kTileRows);
    for (int tile = 1; tile < kKeyTiles; ++tile) {
      sums[lane] += load(by_key + (tile * kTileRows + lane) * kTileRows);
    }
  }
  for (int half = kTileRows / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

// Leaves shares in by_key, updates `highest` and `totals` and returns what to fade sums by.
static inline Vec soften_columns(float* by_key, const SeenColumns& seen, float softcap,
                                 Vec& highest, Vec& totals) {
  Vec tops[4];
  for (Vec& top : tops) top = splat(-kInfinity);
  for (int key = 0; key < kTileKeys; ++key) {
    Vec value = load(by_key + key * kTileRows);
    if (softcap != 0.0f) value = tanh_of(value / softcap) * softcap;
    value = (seen.begin <= key) & (seen.end > key) ? value : splat(-kInfinity);
    store(by_key + key * kTileRows, value);
    tops[key % 4] = larger(tops[key % 4], value);
  }
  const Vec found = larger(larger(tops[0], tops[1]), larger(tops[2], tops[3]));
  const Vec before = highest, after = found > before ? found : before;
  const Vec against = after == -kInfinity ? Vec{} : after;
  for (int key = 0; key < kTileKeys; ++key) {
    float* score = by_key + key * kTileRows;
    store(score, exp_of(load(score) - against));
  }
  const Vec fade = before == after ? splat(1.0f) : exp_of(before - after);
  highest = after;
  totals = reinterpret_cast<Vec>(_mm512_fmadd_ps(totals, fade, sum_by_key(by_key)));
  return fade;
}

// Two vectors, rounded to the lower and the upper halves of words.
static inline IntVec rounded_words(Vec first, Vec second) {
  const IntVec low = bits_of(rounded(first)), high = bits_of(rounded(second));
  return reinterpret_cast<IntVec>(_mm512_srli_epi32(reinterpret_cast<__m512i>(low), 16)) | high;
}

static inline void transpose_shares(const float* by_key, const TileScratch& scratch) {
  float words[kTileKeys / 2][kTileRows];
  const float* rows[kTileKeys / 2];
  for (int pair = 0; pair < kTileKeys / 2; ++pair) {
    const float* shares = by_key + 2 * pair * kTileRows;
    const IntVec both = rounded_words(load(shares), load(shares + kTileRows));
    std::memcpy(words[pair], &both, sizeof both);
    rows[pair] = words[pair];
  }
  float* to = reinterpret_cast<float*>(scratch.shares);
  pack_keys(rows, kTileRows, to, kTileKeys / 2);
  pack_keys(rows + kTileRows, kTileRows, to + kTileRows, kTileKeys / 2);
}

// From scores by key to rounded shares by query; fades are [16].
static inline void soften_many(const Attention& job, const Unit& unit, int32_t tile, int query,
                               int count, const TileScratch& scratch, const Gathered& into,
                               float* fades) {
  SeenColumns columns{};
  for (int i = 0; i < count; ++i) {
    const Seen seen = seen_by(job, unit, tile, query + i);
    columns.begin[i] = seen.begin;
    columns.end[i] = seen.end;
  }
  Vec highest = load_lanes(into.highest + query, count);
  Vec totals = load_lanes(into.totals + query, count);
  store(fades, soften_columns(scratch.by_key, columns, job.softcap, highest, totals));
  store_lanes(into.highest + query, highest, count);
  store_lanes(into.totals + query, totals, count);
  transpose_shares(scratch.by_key, scratch);
}

static inline void soften_few(const Attention& job, const Unit& unit, int32_t tile, int query,
                              int count, const TileScratch& scratch, const Gathered& into,
                              float* fades) {
  const float* rows[kTileRows];
  for (int keys = 0; keys < kTileKeys; keys += kTileRows) {
    for (int row = 0; row < kTileRows; ++row) rows[row] = scratch.by_key + (keys + row) * kTileRows;
    pack_keys(rows, (count + 3) / 4 * 4, scratch.by_query + keys, kTileKeys);
  }
  for (int i = 0; i < count; ++i) {
    const Seen seen = seen_by(job, unit, tile, query + i);
    float* scores = scratch.by_query + i * kTileKeys;
    fades[i] = soften(scores, seen.begin, seen.end, job.softcap, into.highest + query + i,
                      into.totals + query + i);
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

// ---- All queries of a unit

static inline void attend_tile(const Attention& job, const Unit& unit, int32_t tile,
                               const TileScratch& scratch, const Gathered& into) {
  const int64_t whole = padded(job.shape.head_dim), width = sums_stride(job.value_dim);
  const int begin = std::max(0, unit.begin - tile), end = std::min(kTileKeys, unit.end - tile);
  KeyRows<uint16_t> rows;
  find_rows(job, unit, tile, begin, end, kGroup, scratch.zeros, rows);
  const TileRows tiles = find_tiles(job, begin, end, rows, scratch);
  const int first = begin / kGroup * kGroup, after = (end + kGroup - 1) / kGroup * kGroup;
  pair_values(rows.values, first, after, job.value_dim, scratch.values);
  for (int query = 0; query < unit.queries; query += kTileRows) {
    const int count = std::min(kTileRows, unit.queries - query);
    const int last = seen_by(job, unit, tile, query + count - 1).end;
    const int from = seen_by(job, unit, tile, query).begin;
    if (from >= last) continue;
    score_tiles(scratch.q + query * whole / 2, tiles, from / kTileRows,
                (last + kTileRows - 1) / kTileRows, whole, scratch.by_key);
    float fades[kTileRows];
    const auto soften = count <= kFewQueries ? soften_few : soften_many;
    soften(job, unit, tile, query, count, scratch, into, fades);
    weigh_tiles(scratch.shares, scratch.values, from / kGroup * kGroup,
                (last + kGroup - 1) / kGroup * kGroup, width, scratch.found);
    for (int i = 0; i < count; ++i) {
      gather_found(scratch.found + i * width, fades[i], into.sums + (query + i) * width, width);
    }
  }
}

}  // namespace baton

#endif
