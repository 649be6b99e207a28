// Linear layers in float32, of weights in float32 or bfloat16.
//
// A panel goes straight from memory through the registers, for a tile of rows at a time. Of many
// rows, a block of them by some inputs stays in the L2 cache while panels go by, and a piece of a
// panel in the L1 cache while the block's rows go by; sums are kept in between. bfloat16 is widened
// anew each time, which takes less than storing and loading it as floats does.
//
// Every output is one chain of multiply-adds over k = 0, 1, ..., inputs - 1, whatever the number of
// rows, their tiles or the threads: a row's result depends on nothing but the row.
#pragma once

#include <algorithm>

#include "linear_job.h"

namespace baton {

// Rows of a register tile: kRows x 2 sums, two weights and one input fill the registers.
#if defined(__AVX512F__)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif

constexpr int64_t kCached = 1 << 18;       // Floats of x that stay in cache: half of 2 MB.
constexpr int64_t kCachedRows = 1024;      // No more rows than that.
constexpr int64_t kCachedInputs = 2048;    // Inputs of a block, if there are more,
constexpr int64_t kCachedPanels = kMostPanels;  // and the panels whose sums are kept meanwhile.
constexpr int64_t kPieceBytes = 24 << 10;  // Of a panel: half of an L1 cache of 48 KB.
constexpr int64_t kAhead = 48;  // Inputs that memory is asked for before several panels need them,
constexpr int64_t kBytesAhead = 1 << 15;  // and bytes, before one does.
constexpr int64_t kManyRows = 4 * kRows;  // More than these are multiplied in pieces.
constexpr int64_t kStep = 4;  // Inputs that are multiplied in one turn of the loop.
template <class Weights>  // Lines of a panel for so many inputs.
constexpr int64_t kStepLines = kStep * kPanel * sizeof(typename Weights::Value) / kLineBytes;

// Rows of a block, at most.
static inline int64_t cached_rows(int64_t inputs) {
  const int64_t rows = std::min(kCached / std::min(inputs, kCachedInputs), kCachedRows);
  return std::max(rows, int64_t{4} * kRows);
}

// Floats of scratch memory that each thread needs: sums of a block of rows by a panel and its gate,
// or by several panels where inputs take several blocks.
static inline int64_t float_scratch(int64_t inputs) {
  return cached_rows(inputs) * (inputs > kCachedInputs ? kCachedPanels : 2) * kPanel;
}

// ---- The register tile

// What a tile multiplies: rows of x by panels, from some input on.
template <class Weights>
struct Factors {
  const float* x;
  int64_t x_stride;
  const typename Weights::Value* panel;
  int64_t panel_values;  // From a panel to the next.
  int64_t inputs;
  bool add;  // To the sums that are there.
  const char* ahead;  // What to call into the cache meanwhile,
  int64_t lines;      // so many lines of it for kStep inputs.
};

// Makes the sums [kPanels][kCount][kPanel] of kCount rows and kPanels panels.
template <class Weights, int kCount, int kPanels>
static inline void multiply(const Factors<Weights>& factors, float* sums) {
  Vec low[kPanels][kCount] = {}, high[kPanels][kCount] = {};
  if (factors.add) {
#pragma GCC unroll 12
    for (int row = 0; row < kPanels * kCount; ++row) {
      low[row / kCount][row % kCount] = load(sums + row * kPanel);
      high[row / kCount][row % kCount] = load(sums + row * kPanel + kWidth);
    }
  }
  const int64_t stride = factors.x_stride, inputs = factors.inputs;
  // Three rows to a pointer, by way of the processor's addressing: there are not twelve registers.
  const float *x0 = factors.x, *x3 = x0 + 3 * stride, *x6 = x0 + 6 * stride, *x9 = x0 + 9 * stride;
  const auto* panel = factors.panel;
  const auto multiply_input = [&](int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      const auto* row_of_weights = panel + p * factors.panel_values;
      if constexpr (kPanels > 1) __builtin_prefetch(row_of_weights + kAhead * kPanel);
      const Pair weights = Weights::load_row(row_of_weights);
#pragma GCC unroll 12
      for (int row = 0; row < kCount; ++row) {
        const float* base = row < 3 ? x0 : row < 6 ? x3 : row < 9 ? x6 : x9;
        const float value = base[k + row % 3 * stride];
        low[p][row] = weights.low * value + low[p][row];
        high[p][row] = weights.high * value + high[p][row];
      }
    }
    panel += kPanel;
  };
  const char* ahead = factors.ahead;
  int64_t k = 0;
  for (; k + kStep <= inputs; k += kStep) {
    if constexpr (kPanels == 1) {
      for (int64_t line = 0; line < factors.lines; ++line, ahead += kLineBytes) {
        __builtin_prefetch(ahead, 0, 2);  // Into the L2 cache.
      }
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < kStep; ++i) {
      multiply_input(k + i);
      asm volatile("" ::: "memory");
    }
  }
  for (int64_t left = inputs - k; left > 0; --left, ++k) multiply_input(k);
#pragma GCC unroll 4
  for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 12
    for (int row = 0; row < kCount; ++row) {
      store(sums + (p * kCount + row) * kPanel, low[p][row]);
      store(sums + (p * kCount + row) * kPanel + kWidth, high[p][row]);
    }
  }
}

// Calls `multiply` for a number of rows that is known only now.
template <class Weights, int kPanels>
static inline void multiply_rows(int rows, const Factors<Weights>& factors, float* sums) {
#define BATON_ROWS(count)                                                                        \
  case count:                                                                                    \
    if constexpr (count * kPanels <= kRows) return multiply<Weights, count, kPanels>(factors, sums); \
    break;
  switch (rows) {
    BATON_ROWS(1)
    BATON_ROWS(2)
    BATON_ROWS(3)
    BATON_ROWS(4)
    BATON_ROWS(5)
    BATON_ROWS(6)
    BATON_ROWS(7)
    BATON_ROWS(8)
    BATON_ROWS(9)
    BATON_ROWS(10)
    BATON_ROWS(11)
    BATON_ROWS(12)
  }
#undef BATON_ROWS
  __builtin_unreachable();
}

// Rows in tiles of like size.
struct RowTiles {
  int64_t rows, count;
  explicit RowTiles(int64_t rows) : rows(rows), count((rows + kRows - 1) / kRows) {}
  Share operator[](int64_t tile) const {
    return {rows * tile / count, rows * (tile + 1) / count};
  }
};

// ---- Few rows

// Computes as many whole groups of kPanels panels as there are, and takes them from `panels`.
template <class Weights, int kPanels>
static void multiply_panels(const Linear& job, Share& panels, float* sums) {
  const auto* values = static_cast<const typename Weights::Value*>(job.matrix.panels);
  const int64_t inputs = job.matrix.inputs;
  for (; panels.begin + kPanels <= panels.end; panels.begin += kPanels) {
    const auto* first = values + panels.begin * inputs * kPanel;
    const auto* ahead = reinterpret_cast<const char*>(first) + kBytesAhead;
    const Factors<Weights> factors{job.x,  job.x_stride, first, inputs * kPanel,
                                   inputs, false,        ahead, kStepLines<Weights>};
    multiply_rows<Weights, kPanels>(static_cast<int>(job.rows), factors, sums);
    for (int p = 0; p < kPanels; ++p) {
      finish_sums(job, 0, job.rows, (panels.begin + p) * kPanel, sums + p * job.rows * kPanel);
    }
  }
}

// ---- Many rows

// Rows of a block, and the panels that they are multiplied by, by their numbers in order.
struct FloatBlock {
  Share rows, panels;

  // Sums of a panel.
  int64_t sums() const { return (rows.end - rows.begin) * kPanel; }
};

// Where rows are cut into blocks: of like size, since weights go by once for each, and a small one
// would wait for them.
struct RowBlocks {
  int64_t rows, count;
  explicit RowBlocks(const Linear& job) : rows(job.rows), count(1) {
    const int64_t high = cached_rows(job.matrix.inputs);
    count = (rows + high - 1) / high;
  }
  Share operator[](int64_t block) const {
    return {rows * block / count, rows * (block + 1) / count};
  }
};

// Finishes complete sums of a tile; those of a gate wait for the sums it is for.
static inline void finish_tile(const Linear& job, Share rows, int64_t number, const float* sums,
                               int64_t kept) {
  const int64_t count = rows.end - rows.begin;
  if (!job.gate) return finish_sums(job, rows.begin, count, number * kPanel, sums);
  if (number % 2) finish_gated(job, rows.begin, count, number / 2 * kPanel, sums - kept, sums);
}

// Multiplies rows by inputs of a panel, piece by piece, and finishes sums that are complete.
template <class Weights>
static void multiply_rows_by(const Linear& job, const FloatBlock& block, Share inputs,
                             int64_t number, float* sums) {
  constexpr int64_t kPiece = kPieceBytes / (kPanel * sizeof(typename Weights::Value));
  const int64_t panel_values = job.matrix.inputs * kPanel;
  const PanelOrder order(job);
  const auto* values = static_cast<const typename Weights::Value*>(job.matrix.panels);
  const auto* panel = values + order[number] * panel_values;
  const auto* following = values + order[number + 1] * panel_values;
  const RowTiles tiles(block.rows.end - block.rows.begin);
  // Each tile calls for its share of the next piece: all of it at once would wait for memory.
  const int64_t lines = (kStepLines<Weights> + tiles.count - 1) / tiles.count;
  for (int64_t k = inputs.begin; k < inputs.end; k += kPiece) {
    const int64_t end = std::min(k + kPiece, inputs.end);
    const auto* next = end < inputs.end ? panel + end * kPanel : following + inputs.begin * kPanel;
    const char* ahead = reinterpret_cast<const char*>(next);
    for (int64_t t = 0; t < tiles.count; ++t) {
      const Share rows{block.rows.begin + tiles[t].begin, block.rows.begin + tiles[t].end};
      float* found = sums + tiles[t].begin * kPanel;
      const Factors<Weights> factors{job.x + rows.begin * job.x_stride + k, job.x_stride,
                                     panel + k * kPanel, panel_values, end - k, k > 0,
                                     ahead, lines};
      multiply_rows<Weights, 1>(static_cast<int>(rows.end - rows.begin), factors, found);
      if (end == job.matrix.inputs) finish_tile(job, rows, number, found, block.sums());
      ahead += (end - k) / kStep * lines * kLineBytes;
    }
  }
}

// `sums` has float_scratch() floats.
template <class Weights>
static void multiply_block(const Linear& job, const FloatBlock& block, float* sums) {
  const int64_t all = job.matrix.inputs;
  for (int64_t k = 0; k < all; k += kCachedInputs) {
    const Share inputs{k, std::min(k + kCachedInputs, all)};
    for (int64_t p = block.panels.begin; p < block.panels.end; ++p) {
      const int64_t before = all > kCachedInputs ? p - block.panels.begin : job.gate && p % 2;
      multiply_rows_by<Weights>(job, block, inputs, p, sums + before * block.sums());
    }
  }
}

// `sums` has float_scratch() floats.
template <class Weights>
static void linear_of(const Linear& job, Share panels, float* sums) {
  if (job.rows <= kRows) {
    // Several panels at once where one has too few sums to keep the multipliers and memory busy.
    if (job.rows * 4 <= kRows) multiply_panels<Weights, 4>(job, panels, sums);
    if (job.rows * 2 <= kRows) multiply_panels<Weights, 2>(job, panels, sums);
    return multiply_panels<Weights, 1>(job, panels, sums);
  }
  const RowBlocks blocks(job);
  const int64_t wide = job.matrix.inputs > kCachedInputs ? kCachedPanels : panels.end;
  for (int64_t block = 0; block < blocks.count; ++block) {
    for (int64_t p = panels.begin; p < panels.end; p += wide) {
      const Share some{p, std::min(p + wide, panels.end)};
      multiply_block<Weights>(job, {blocks[block], some}, sums);
    }
  }
}

// Computes all rows for the pieces that this thread takes: some panels for one block of rows, which
// the next piece is mostly of too. `take` returns the number of the next piece.
template <class Weights, class Take>
static void pieces_of_floats(const Linear& job, int threads, float* sums, const Take& take) {
  const RowBlocks blocks(job);
  const int64_t panels = (job.matrix.outputs + kPanel - 1) / kPanel;
  const int64_t wide = panels_of_piece(panels, blocks.count, threads);
  const int64_t pieces = (panels + wide - 1) / wide;
  for (int64_t piece = take(); piece < blocks.count * pieces; piece = take()) {
    const int64_t panel = piece % pieces * wide;
    const Share some{panel, std::min(panel + wide, panels)};
    multiply_block<Weights>(job, {blocks[piece / pieces], some}, sums);
  }
}

}  // namespace baton
