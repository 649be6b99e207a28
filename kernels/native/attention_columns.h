// Attention over a tile of keys in bfloat16, with AMX, of more than 16 queries.
//
// Again the sums of attention_pairs.h, 16 queries at a time, a column each from beginning to end:
//
//     scores   [keys, queries] = K as it lies in the pool x 16 queries
//     shares   [pairs of keys, queries]: softened a lane for a query, in the order of soften()
//     values   [dims, queries] = V, transposed once for all queries, x shares
//
// Nothing of a score is transposed, and no lanes are added across. The scores of the next 16
// queries are multiplied while the shares of these are computed.
#pragma once

#include "attention_amx.h"

#if defined(BATON_AMX)

namespace baton {

static inline bool by_columns(const Unit& unit) { return unit.queries > kTileRows; }

// ---- Softmax

struct SeenColumns {
  IntVec begin, end;
};

// Leaves scores that are not seen at -infinity, and returns the highest of each query.
template <bool kAll>
static inline Vec highest_of(float* by_key, const SeenColumns& seen, float softcap) {
  Vec tops[4];
  for (Vec& top : tops) top = splat(-kInfinity);
  for (int key = 0; key < kTileKeys; key += 4) {
    for (int i = 0; i < 4; ++i) {
      float* scores = by_key + (key + i) * kTileRows;
      Vec value = load(scores);
      if constexpr (!kAll) {
        if (softcap != 0.0f) value = tanh_of(value / softcap) * softcap;
        value = (seen.begin <= key + i) & (seen.end > key + i) ? value : splat(-kInfinity);
        store(scores, value);
      }
      tops[i] = larger(tops[i], value);
    }
  }
  return larger(larger(tops[0], tops[1]), larger(tops[2], tops[3]));
}

// Stores the shares of two keys, rounded, as pairs.
static inline void store_pairs(uint32_t* to, Vec first, Vec second) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t kTurns[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4,  20, 5,
                                                      21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second),
                                            reinterpret_cast<__m512>(first));
  __m512i halves;
  std::memcpy(&halves, &both, sizeof halves);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kTurns), halves));
#else
  const IntVec low = bits_of(rounded(first)), high = bits_of(rounded(second));
  const __m512i moved = _mm512_srli_epi32(reinterpret_cast<__m512i>(low), 16);
  _mm512_storeu_si512(to, _mm512_or_si512(moved, reinterpret_cast<__m512i>(high)));
#endif
}

// Makes rounded shares of scores less the highest, and returns their sums: 16 keys by 16, then
// halves on halves.
static inline Vec take_shares(const float* by_key, Vec highest, uint32_t* shares) {
  Vec sums[kTileRows] = {};
  for (int lane = 0; lane < kTileRows; lane += 2) {
    for (int tile = 0; tile < kKeyTiles; ++tile) {
      const float* scores = by_key + (tile * kTileRows + lane) * kTileRows;
      const Vec first = exp_below(load(scores) - highest);
      const Vec second = exp_below(load(scores + kTileRows) - highest);
      sums[lane] += first;
      sums[lane + 1] += second;
      store_pairs(shares + (tile * kTileRows + lane) / 2 * kTileRows, first, second);
    }
  }
  for (int half = kTileRows / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

// 16 queries, or fewer, of a unit, and which keys of a tile they see.
struct QueryTile {
  int first, count;
  int begin, end;  // Keys that any of them sees.
  bool all;        // Each sees every key.
};

static inline QueryTile query_tile(const Attention& job, const Unit& unit, int32_t tile,
                                   int first) {
  const int count = std::min(kTileRows, unit.queries - first);
  const Seen low = seen_by(job, unit, tile, first);
  const Seen high = seen_by(job, unit, tile, first + count - 1);
  return {first, count, low.begin, high.end, high.begin == 0 && low.end == kTileKeys};
}

// From scores to shares; updates `highest` and `totals` and returns what to fade sums by.
static inline Vec soften_columns(const Attention& job, const Unit& unit, int32_t tile,
                                 const QueryTile& queries, float* by_key, uint32_t* shares,
                                 const Gathered& into) {
  const int count = queries.count;
  float *highest = into.highest + queries.first, *totals = into.totals + queries.first;
  Vec found;
  SeenColumns columns{};
  if (queries.all && job.softcap == 0.0f) {
    found = highest_of<true>(by_key, columns, 0.0f);
  } else {
    for (int i = 0; i < count; ++i) {
      const Seen seen = seen_by(job, unit, tile, queries.first + i);
      columns.begin[i] = seen.begin;
      columns.end[i] = seen.end;
    }
    found = highest_of<false>(by_key, columns, job.softcap);
  }
  const Vec before = load_lanes(highest, count), after = found > before ? found : before;
  const Vec sum = take_shares(by_key, after == -kInfinity ? Vec{} : after, shares);
  const Vec fade = before == after ? splat(1.0f) : exp_below(before - after);
  store_lanes(highest, after, count);
  const __m512 faded = reinterpret_cast<__m512>(load_lanes(totals, count));
  store_lanes(totals, reinterpret_cast<Vec>(_mm512_fmadd_ps(faded, fade, sum)), count);
  return fade;
}

// ---- Values

// From pairs of values [pairs of keys][width] to [width][pairs of keys].
static inline void turn_values(const uint32_t* values, int begin, int end, int64_t width,
                               uint32_t* turned) {
  for (int key = begin; key < end; key += kGroup) {
    const float* rows[kPairs];
    for (int pair = 0; pair < kPairs; ++pair) {
      rows[pair] = reinterpret_cast<const float*>(values + (key / 2 + pair) * width);
    }
    pack_keys(rows, width, reinterpret_cast<float*>(turned + key / 2), kTileKeys / 2);
  }
}

// found [kTiles * 16 dims][16 queries] = values x shares, over groups of keys [begin, end).
template <int kTiles>
static inline void weigh_dims(const uint32_t* shares, const uint32_t* turned, int begin, int end,
                              float* found) {
  constexpr int64_t kStride = kTileKeys * 2, kStep = kTileRows * kTileKeys / 2;
  constexpr int64_t kFound = kTileRows * kTileRows;
  _tile_zero(0);
  if constexpr (kTiles > 1) _tile_zero(1);
  if constexpr (kTiles > 2) _tile_zero(2);
  if constexpr (kTiles > 3) _tile_zero(3);
  for (int key = begin; key < end; key += kGroup) {
    const uint32_t* rows = turned + key / 2;
    _tile_loadd(4, shares + key / 2 * kTileRows, kTileBytes);
    _tile_loadd(5, rows, kStride);
    _tile_dpbf16ps(0, 5, 4);
    if constexpr (kTiles > 1) {
      _tile_loadd(6, rows + kStep, kStride);
      _tile_dpbf16ps(1, 6, 4);
    }
    if constexpr (kTiles > 2) {
      _tile_loadd(7, rows + 2 * kStep, kStride);
      _tile_dpbf16ps(2, 7, 4);
    }
    if constexpr (kTiles > 3) {
      _tile_loadd(5, rows + 3 * kStep, kStride);
      _tile_dpbf16ps(3, 5, 4);
    }
  }
  _tile_stored(0, found, kTileBytes);
  if constexpr (kTiles > 1) _tile_stored(1, found + kFound, kTileBytes);
  if constexpr (kTiles > 2) _tile_stored(2, found + 2 * kFound, kTileBytes);
  if constexpr (kTiles > 3) _tile_stored(3, found + 3 * kFound, kTileBytes);
}

// found [width][16 queries], of all dimensions.
static inline void weigh_columns(const uint32_t* shares, const uint32_t* turned, int begin, int end,
                                 int64_t width, float* found) {
  before_loads();
  int64_t dim = 0;
  for (; dim + 4 * kTileRows <= width; dim += 4 * kTileRows) {
    weigh_dims<4>(shares, turned + dim * kTileKeys / 2, begin, end, found + dim * kTileRows);
  }
  for (; dim < width; dim += kTileRows) {
    weigh_dims<1>(shares, turned + dim * kTileKeys / 2, begin, end, found + dim * kTileRows);
  }
}

// ---- All queries of a unit

static inline void attend_columns(const Attention& job, const Unit& unit, int32_t tile,
                                  const TileRows& rows, const TileScratch& scratch,
                                  const Gathered& into) {
  const int64_t whole = padded(job.shape.head_dim), width = sums_stride(job.value_dim);
  float *by_key = scratch.by_key, *next_by_key = scratch.next_by_key;
  const auto score = [&](const QueryTile& queries, float* to) {
    if (queries.begin >= queries.end) return;
    score_tiles(scratch.q + queries.first * whole / 2, rows, queries.begin / kTileRows,
                (queries.end + kTileRows - 1) / kTileRows, whole, to);
  };
  QueryTile queries = query_tile(job, unit, tile, 0);
  score(queries, by_key);
  for (;;) {
    const int after = queries.first + kTileRows;
    QueryTile next = queries;
    if (after < unit.queries) score(next = query_tile(job, unit, tile, after), next_by_key);
    if (queries.begin < queries.end) {
      const Vec fade = soften_columns(job, unit, tile, queries, by_key, scratch.shares, into);
      weigh_columns(scratch.shares, scratch.turned, queries.begin / kGroup * kGroup,
                    (queries.end + kGroup - 1) / kGroup * kGroup, width, scratch.found);
      float* sums = into.sums + queries.first * width;
      for (int64_t at = 0; at < width * kTileRows; at += kWidth) {
        store(sums + at, load(sums + at) * fade + load(scratch.found + at));
      }
    }
    if (after >= unit.queries) return;
    queries = next;
    std::swap(by_key, next_by_key);
  }
}

static inline void attend_tile(const Attention& job, const Unit& unit, int32_t tile,
                               const TileScratch& scratch, const Gathered& into) {
  const int begin = std::max(0, unit.begin - tile), end = std::min(kTileKeys, unit.end - tile);
  KeyRows<uint16_t> rows;
  find_rows(job, unit, tile, begin, end, kGroup, scratch.zeros, rows);
  const TileRows tiles = find_tiles(job, begin, end, rows, scratch);
  const int first = begin / kGroup * kGroup, after = (end + kGroup - 1) / kGroup * kGroup;
  pair_values(rows.values, first, after, job.value_dim, scratch.values);
  if (!by_columns(unit)) {
    return attend_rows(job, unit, tile, {begin, end}, tiles, scratch, into);
  }
  turn_values(scratch.values, first, after, sums_stride(job.value_dim), scratch.turned);
  attend_columns(job, unit, tile, tiles, scratch, into);
}

// Turns sums from columns to rows.
static inline void finish_span(const Attention& job, const Unit& unit, const TileScratch& scratch,
                               const Gathered& into) {
  if (!by_columns(unit)) return;
  const int64_t width = sums_stride(job.value_dim);
  for (int first = 0; first < unit.queries; first += kTileRows) {
    float* sums = into.sums + first * width;
    for (int64_t dim = 0; dim < width; dim += kTileRows) {
      const float* rows[kTileRows];
      for (int row = 0; row < kTileRows; ++row) rows[row] = sums + (dim + row) * kTileRows;
      pack_keys(rows, kTileRows, scratch.found + dim, width);
    }
    std::copy_n(scratch.found, kTileRows * width, sums);
  }
}

}  // namespace baton

#endif
