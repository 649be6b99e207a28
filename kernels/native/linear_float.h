// Linear layers in float32, of weights in float32 or bfloat16.
//
// A panel goes straight from memory through the registers, for a tile of rows at a time; it is
// still in cache for the next tile. bfloat16 is widened anew each time, which takes less than
// storing and loading it as floats does.
//
// Every output is one chain of multiply-adds over k = 0, 1, ..., inputs - 1, whatever the number of
// rows, their tiles or the threads: a row's result depends on nothing but the row.
#pragma once

#include "linear_job.h"

namespace baton {

// Rows of a register tile: kRows x 2 sums, two weights and one input fill the registers.
#if defined(__AVX512F__)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif

constexpr int64_t kCached = 1 << 18;  // Floats of x that stay in cache: half of 2 MB.
constexpr int64_t kAhead = 48;  // Inputs that memory is asked for before they are needed.

// Floats of scratch memory that each thread needs.
constexpr int64_t kLinearScratch = kRows * kPanel;

// ---- The register tile

// What a tile multiplies: rows of x by panels.
template <class Weights>
struct Factors {
  const float* x;
  int64_t x_stride;
  const typename Weights::Value* panel;
  int64_t inputs;
};

// Makes the sums [kPanels][kCount][kPanel] of kCount rows and kPanels panels.
template <class Weights, int kCount, int kPanels>
static inline void multiply(const Factors<Weights>& factors, float* sums) {
  Vec low[kPanels][kCount] = {}, high[kPanels][kCount] = {};
  const int64_t stride = factors.x_stride, inputs = factors.inputs;
  // Three rows to a pointer, by way of the processor's addressing: there are not twelve registers.
  const float *x0 = factors.x, *x3 = x0 + 3 * stride, *x6 = x0 + 6 * stride, *x9 = x0 + 9 * stride;
  const auto* panel = factors.panel;
  int64_t k = 0;
  do {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      const auto* row_of_weights = panel + p * inputs * kPanel;
      __builtin_prefetch(row_of_weights + kAhead * kPanel);
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

// ---- All rows and panels

// Computes as many whole groups of kPanels panels as there are, and takes them from `panels`.
template <class Weights, int kPanels>
static void multiply_panels(const Linear& job, Share rows, Share& panels, float* sums) {
  const auto* values = static_cast<const typename Weights::Value*>(job.matrix.panels);
  const RowTiles tiles(rows.end - rows.begin);
  for (; panels.begin + kPanels <= panels.end; panels.begin += kPanels) {
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t begin = rows.begin + tiles[t].begin, count = tiles[t].end - tiles[t].begin;
      const Factors<Weights> factors{job.x + begin * job.x_stride, job.x_stride,
                                     values + panels.begin * job.matrix.inputs * kPanel,
                                     job.matrix.inputs};
      multiply_rows<Weights, kPanels>(static_cast<int>(count), factors, sums);
      for (int p = 0; p < kPanels; ++p) {
        finish_sums(job, begin, count, (panels.begin + p) * kPanel, sums + p * count * kPanel);
      }
    }
  }
}

// `sums` has kLinearScratch floats.
template <class Weights>
static void linear_of(const Linear& job, Share panels, float* sums) {
  const int64_t cached = kCached / job.matrix.inputs / kRows * kRows;
  const int64_t step = cached < 4 * kRows ? 4 * kRows : cached;
  for (int64_t row = 0; row < job.rows; row += step) {
    const Share rows{row, row + step < job.rows ? row + step : job.rows};
    Share left = panels;
    // Several panels at once where one has too few sums to keep the multipliers and memory busy.
    if (job.rows * 4 <= kRows) multiply_panels<Weights, 4>(job, rows, left, sums);
    if (job.rows * 2 <= kRows) multiply_panels<Weights, 2>(job, rows, left, sums);
    multiply_panels<Weights, 1>(job, rows, left, sums);
  }
}

}  // namespace baton
