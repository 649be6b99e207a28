// Linear layers in bfloat16 with AMX, for more than a few rows.
//
// Rows are rounded once into the order in which tiles read them. A block of them, some rows by some
// inputs, stays in the L2 cache while panel after panel of weights goes by, and of a panel a piece
// in the L1 cache while all rows of the block go by; the next panel is called for meanwhile. Sums
// are kept in between and tiles go on from them, so that every output is the same chain of
// additions however it is cut.
#pragma once

#include <algorithm>

#include "amx.h"
#include "batch.h"
#include "linear_job.h"

namespace baton {

constexpr int64_t kTileValues = kTileRows * kGroup;
constexpr int64_t kPairTiles = 2;  // Row tiles that are multiplied at a time.
constexpr int64_t kTileSums = kPairTiles * kTileRows * kPanel;
constexpr int64_t kPieceGroups = 8;  // Of a panel, 16 KB: a third of an L1 cache of 48.
constexpr int64_t kBlockTiles = 1024;  // Row tiles times groups of a block: 1 MB of an L2 of 2.
constexpr int64_t kBlockGroups = 32;  // Groups of it, if not all of them fit,
constexpr int64_t kBlockPanels = kMostPanels;  // and the panels whose sums are kept meanwhile.
constexpr int64_t kGroupsAhead = 16;  // How far ahead a stream of weights is called for.
constexpr int64_t kGroupLines = kGroup * kPanel * 2 / kLineBytes;

// Rows as tiles: [pieces of groups][row tiles][groups of a piece][kTileRows][kGroup].
struct RoundedRows {
  uint16_t* values;
  int64_t tiles, groups;

  // Rows that a panel is read only once for are not cut.
  bool few() const { return tiles <= kPairTiles; }
  // Groups of a piece.
  int64_t piece() const { return few() ? groups : kPieceGroups; }
  // Groups of a block, and its row tiles.
  int64_t block() const {
    const bool fit = few() || tiles * groups <= kBlockTiles;
    return fit ? groups : std::min(groups, kBlockGroups);
  }
  int64_t block_tiles() const {
    return std::max(kBlockTiles / block() / kPairTiles * kPairTiles, kPairTiles);
  }

  // Where the tile's part of the piece that begins with a group is.
  uint16_t* at(int64_t tile, int64_t group) const {
    return values + (group * tiles + tile * std::min(piece(), groups - group)) * kTileValues;
  }
};

static inline int64_t row_tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// Floats for sums: of a block of rows by a panel and its gate, or by several panels where inputs take
// several blocks.
static inline int64_t tile_sums(int64_t inputs) {
  const int64_t groups = whole_groups(inputs);
  const bool cut = groups > kBlockGroups;
  const int64_t pairs = kBlockTiles / (cut ? kBlockGroups : groups) / kPairTiles + 1;
  return pairs * (cut ? kBlockPanels : 2) * kTileSums;
}

#if defined(BATON_AMX)

// Rounds row tiles [share.begin, share.end) of x.
static inline void round_tiles(const Linear& job, Share share, const RoundedRows& to) {
  const int64_t inputs = job.matrix.inputs;
  for (int64_t row = share.begin * kTileRows; row < share.end * kTileRows; ++row) {
    if (row >= job.rows) break;  // The last tile's others are multiplied, and seen by nobody.
    const float* x = job.x + row * job.x_stride;
    for (int64_t first = 0; first < to.groups; first += to.piece()) {
      uint16_t* at = to.at(row / kTileRows, first) + row % kTileRows * kGroup;
      const int64_t end = std::min(first + to.piece(), to.groups);
      for (int64_t group = first; group < end; ++group, at += kTileValues) {
        const int64_t begin = group * kGroup;
        narrow_row(x + begin, std::min<int64_t>(kGroup, inputs - begin), 1.0f, at);
      }
    }
  }
}

// What is multiplied at a time: a pair of row tiles, or one, by a piece of a panel.
struct TilePair {
  const uint16_t *first, *second, *panel;
  int64_t groups;
  bool add;           // To the sums that are there.
  const char* ahead;  // What to call for meanwhile,
  int64_t lines;      // so many lines of it per group.
  float* sums;  // [kPairTiles * kTileRows][kPanel]
};

template <bool kTwo>
static inline void multiply_tiles(const TilePair& pair) {
  constexpr int64_t kPanelBytes = kPanel * 4;
  float* sums = pair.sums;
  before_loads();
  if (pair.add) {
    _tile_loadd(0, sums, kPanelBytes);
    _tile_loadd(1, sums + kWidth, kPanelBytes);
    if constexpr (kTwo) {
      _tile_loadd(2, sums + kTileRows * kPanel, kPanelBytes);
      _tile_loadd(3, sums + kTileRows * kPanel + kWidth, kPanelBytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  const char* ahead = pair.ahead;
  for (int64_t g = 0; g < pair.groups; ++g) {
    const uint16_t* weights = pair.panel + g * kGroup * kPanel;
    for (int64_t line = 0; line < pair.lines; ++line, ahead += kLineBytes) {
      __builtin_prefetch(ahead, 0, 2);  // Into the L2 cache.
    }
    _tile_loadd(4, pair.first + g * kTileValues, kTileBytes);
    _tile_loadd(6, weights, kPanelBytes);
    _tile_loadd(7, weights + 2 * kWidth, kPanelBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwo) {
      _tile_loadd(5, pair.second + g * kTileValues, kTileBytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kPanelBytes);
  _tile_stored(1, sums + kWidth, kPanelBytes);
  if constexpr (kTwo) {
    _tile_stored(2, sums + kTileRows * kPanel, kPanelBytes);
    _tile_stored(3, sums + kTileRows * kPanel + kWidth, kPanelBytes);
  }
}

// Some rows by some inputs, and the panels that they are multiplied by, by their numbers in order.
struct TileBlock {
  Share tiles, groups, panels;

  int64_t pairs() const { return (tiles.end - tiles.begin + kPairTiles - 1) / kPairTiles; }
};

// Finishes complete sums of a pair of tiles; those of a gate wait for the sums it is for.
static inline void finish_pair(const Linear& job, int64_t tile, int64_t rows, int64_t number,
                               const float* sums, int64_t kept) {
  const int64_t row = tile * kTileRows, count = std::min(rows, job.rows - row);
  if (!job.gate) return finish_sums(job, row, count, number * kPanel, sums);
  if (number % 2) finish_gated(job, row, count, number / 2 * kPanel, sums - kept, sums);
}

// Multiplies a piece of a panel by all rows of a block, and finishes sums that are complete.
// `kept` is how many sums a panel has.
static inline void multiply_piece(const Linear& job, const TileBlock& block, Share groups,
                                  int64_t number, const char* ahead, const RoundedRows& x,
                                  float* sums, int64_t kept) {
  const int64_t panel = PanelOrder(job)[number];
  const auto* weights = static_cast<const uint16_t*>(job.matrix.panels) +
                        (panel * x.groups + groups.begin) * kGroup * kPanel;
  const int64_t count = groups.end - groups.begin, pairs = block.pairs();
  const int64_t lines = (kGroupLines + pairs - 1) / pairs;
  for (int64_t tile = block.tiles.begin; tile < block.tiles.end; tile += kPairTiles) {
    const bool two = tile + 1 < block.tiles.end;
    const TilePair pair{x.at(tile, groups.begin), x.at(tile + two, groups.begin), weights, count,
                        groups.begin > 0, ahead, lines, sums};
    if (two) {
      multiply_tiles<true>(pair);
    } else {
      multiply_tiles<false>(pair);
    }
    if (groups.end == x.groups) {
      finish_pair(job, tile, (1 + two) * int64_t{kTileRows}, number, sums, kept);
    }
    ahead += lines * kLineBytes * count;
    sums += kTileSums;
  }
}

// `sums` has kTileSums floats for each pair of tiles; for each panel too if more groups follow, or
// for two of them if one is a gate of the other.
static inline void multiply_block(const Linear& job, const TileBlock& block, const RoundedRows& x,
                                  float* sums) {
  const Share groups = block.groups;
  const bool whole = groups.end - groups.begin == x.groups;
  // Rows that a panel is read only once for wait for memory: that is called for just in time.
  const bool soon = block.pairs() == 1 && !job.gate;
  const int64_t distance = std::min(x.groups, kGroupsAhead), kept = block.pairs() * kTileSums;
  const char* panels = static_cast<const char*>(job.matrix.panels);
  const PanelOrder order(job);
  for (int64_t p = block.panels.begin; p < block.panels.end; ++p) {
    const int64_t next = soon ? order[p] * x.groups + distance : order[p + 1] * x.groups;
    const int64_t before = whole ? job.gate && p % 2 : p - block.panels.begin;
    float* found = sums + before * kept;
    for (int64_t g = groups.begin; g < groups.end; g += x.piece()) {
      const int64_t end = std::min(g + x.piece(), groups.end);
      const char* ahead = panels + (next + g) * kGroupLines * kLineBytes;
      multiply_piece(job, block, {g, end}, p, ahead, x, found, kept);
    }
  }
}

// Computes all rows for some panels. `sums` has tile_sums() floats.
static void pairs_by_tiles(const Linear& job, Share panels, const RoundedRows& x, float* sums) {
  const Tiles config;
  const int64_t step = x.block(), high = x.block_tiles();
  const int64_t wide = step < x.groups ? kBlockPanels : panels.end - panels.begin;
  for (int64_t tile = 0; tile < x.tiles; tile += high) {
    const Share tiles{tile, std::min(tile + high, x.tiles)};
    for (int64_t p = panels.begin; p < panels.end; p += wide) {
      const Share some{p, std::min(p + wide, panels.end)};
      for (int64_t g = 0; g < x.groups; g += step) {
        multiply_block(job, {tiles, {g, std::min(g + step, x.groups)}, some}, x, sums);
      }
    }
  }
}

// Computes all rows for the pieces that this thread takes: some panels for one block of rows, which
// the next piece is mostly of too. `take` returns the number of the next piece.
template <class Take>
static void pieces_by_tiles(const Linear& job, int threads, const RoundedRows& x, float* sums,
                            const Take& take) {
  const Tiles config;
  const int64_t panels = (job.matrix.outputs + kPanel - 1) / kPanel;
  const int64_t step = x.block(), high = x.block_tiles();
  const int64_t blocks = (x.tiles + high - 1) / high;
  const int64_t wide = panels_of_piece(panels, blocks, threads);
  const int64_t pieces = (panels + wide - 1) / wide;
  for (int64_t piece = take(); piece < blocks * pieces; piece = take()) {
    const int64_t tile = piece / pieces * high, panel = piece % pieces * wide;
    const Share tiles{tile, std::min(tile + high, x.tiles)};
    const Share some{panel, std::min(panel + wide, panels)};
    for (int64_t g = 0; g < x.groups; g += step) {
      multiply_block(job, {tiles, {g, std::min(g + step, x.groups)}, some}, x, sums);
    }
  }
}

#endif

}  // namespace baton
