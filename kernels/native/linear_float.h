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
constexpr int64_t kCachedPanels = 32;      // and the panels whose sums are kept meanwhile.
constexpr int64_t kPieceBytes = 24 << 10;  // Of a panel: half of an L1 cache of 48 KB.
constexpr int64_t kAhead = 48;  // Inputs that memory is asked for before several panels need them,
constexpr int64_t kBytesAhead = 1 << 15;  // and bytes, before one does.

// Rows of a block.
static inline int64_t cached_rows(int64_t inputs) {
  const int64_t rows = std::min(kCached / std::min(inputs, kCachedInputs), kCachedRows);
  return std::max(rows / kRows, int64_t{4}) * kRows;
}

// Floats of scratch memory that each thread needs.
static inline int64_t float_scratch(int64_t inputs) {
  return cached_rows(inputs) * (inputs > kCachedInputs ? kCachedPanels : 1) * kPanel;
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
  int64_t k = 0;
  do {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      const auto* row_of_weights = panel + p * factors.panel_values;
      if constexpr (kPanels > 1) {
        __builtin_prefetch(row_of_weights + kAhead * kPanel);
      } else {
        const auto* ahead = reinterpret_cast<const char*>(row_of_weights) + kBytesAhead;
        constexpr int64_t kRowBytes = kPanel * sizeof(typename Weights::Value);
        for (int64_t byte = 0; byte < kRowBytes; byte += 64) __builtin_prefetch(ahead + byte, 0, 2);
      }
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
  } while (++k < inputs);
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
    const Factors<Weights> factors{job.x,           job.x_stride,
                                   values + panels.begin * inputs * kPanel,
                                   inputs * kPanel, inputs, false};
    multiply_rows<Weights, kPanels>(static_cast<int>(job.rows), factors, sums);
    for (int p = 0; p < kPanels; ++p) {
      finish_sums(job, 0, job.rows, (panels.begin + p) * kPanel, sums + p * job.rows * kPanel);
    }
  }
}

// ---- Many rows

// Multiplies rows by inputs of a panel, piece by piece, and finishes sums that are complete.
template <class Weights>
static void multiply_rows_by(const Linear& job, Share rows, Share inputs, int64_t panel,
                             float* sums) {
  constexpr int64_t kPiece = kPieceBytes / (kPanel * sizeof(typename Weights::Value));
  const int64_t panel_values = job.matrix.inputs * kPanel;
  const auto* values = static_cast<const typename Weights::Value*>(job.matrix.panels);
  const RowTiles tiles(rows.end - rows.begin);
  for (int64_t k = inputs.begin; k < inputs.end; k += kPiece) {
    const int64_t end = std::min(k + kPiece, inputs.end);
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t begin = rows.begin + tiles[t].begin, count = tiles[t].end - tiles[t].begin;
      float* found = sums + tiles[t].begin * kPanel;
      const Factors<Weights> factors{job.x + begin * job.x_stride + k, job.x_stride,
                                     values + panel * panel_values + k * kPanel, panel_values,
                                     end - k, k > 0};
      multiply_rows<Weights, 1>(static_cast<int>(count), factors, found);
      if (end == job.matrix.inputs) finish_sums(job, begin, count, panel * kPanel, found);
    }
  }
}

// Multiplies a block of rows by some panels.
template <class Weights>
static void multiply_block(const Linear& job, Share rows, Share panels, float* sums) {
  const int64_t all = job.matrix.inputs;
  for (int64_t k = 0; k < all; k += kCachedInputs) {
    const Share inputs{k, std::min(k + kCachedInputs, all)};
    float* found = sums;
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      multiply_rows_by<Weights>(job, rows, inputs, p, found);
      if (all > kCachedInputs) found += (rows.end - rows.begin) * kPanel;
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
  const int64_t step = cached_rows(job.matrix.inputs);
  const int64_t wide = job.matrix.inputs > kCachedInputs ? kCachedPanels : panels.end;
  for (int64_t row = 0; row < job.rows; row += step) {
    const Share rows{row, std::min(row + step, job.rows)};
    for (int64_t p = panels.begin; p < panels.end; p += wide) {
      multiply_block<Weights>(job, rows, {p, std::min(p + wide, panels.end)}, sums);
    }
  }
}

}  // namespace baton
