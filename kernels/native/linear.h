// y = x W^T, plus a bias, plus what is in y's place already.
//
// A panel goes straight from memory through the registers, for a tile of rows at a time; it is
// still in cache for the next tile. bfloat16 is widened anew each time, which takes less than
// storing and loading it as floats does.
//
// Every output is one chain of multiply-adds over k = 0, 1, ..., inputs - 1, whatever the number of
// rows, their tiles or the threads: a row's result depends on nothing but the row.
#pragma once

#include "matrix.h"

namespace baton {

struct Linear {
  Matrix matrix;
  const float* bias;  // [outputs] or null
  const float* x;     // [rows, inputs]
  int64_t x_stride;
  const float* residual;  // [rows, outputs] or null; may be out.
  int64_t residual_stride;
  float* out;  // [rows, outputs]
  int64_t out_stride;
  int64_t rows;
};

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

// Finishes sums [count][kPanel] of rows from `begin` on and outputs from `output` on.
static inline void finish_sums(const Linear& job, int64_t begin, int64_t count, int64_t output,
                               const float* sums) {
  const int64_t left = job.matrix.outputs - output;
  for (int64_t row = 0; row < count; ++row) {
    float* out = job.out + (begin + row) * job.out_stride + output;
    for (int half = 0; half < 2; ++half) {
      const int64_t at = half * kWidth, lanes = left - at < kWidth ? left - at : kWidth;
      if (lanes <= 0) break;
      const int some = static_cast<int>(lanes);
      Vec value = load(sums + row * kPanel + at);
      if (job.bias) value = value + load_lanes(job.bias + output + at, some);
      if (job.residual) {
        const float* residual = job.residual + (begin + row) * job.residual_stride + output + at;
        value = value + load_lanes(residual, some);
      }
      store_lanes(out + at, value, some);
    }
  }
}

// Rows in tiles of like size.
struct Tiles {
  int64_t rows, count;
  explicit Tiles(int64_t rows) : rows(rows), count((rows + kRows - 1) / kRows) {}
  Share operator[](int64_t tile) const {
    return {rows * tile / count, rows * (tile + 1) / count};
  }
};

// ---- All rows and panels

// Computes as many whole groups of kPanels panels as there are, and takes them from `panels`.
template <class Weights, int kPanels>
static void multiply_panels(const Linear& job, Share rows, Share& panels, float* sums) {
  const auto* values = static_cast<const typename Weights::Value*>(job.matrix.panels);
  const Tiles tiles(rows.end - rows.begin);
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

// `scratch` has kLinearScratch floats and is the thread's own.
static inline void linear(const Linear& job, int thread, int threads, float* scratch) {
  const Share panels = share_of((job.matrix.outputs + kPanel - 1) / kPanel, thread, threads);
  if (job.matrix.format == Format::kBfloat16) return linear_of<Bfloat16>(job, panels, scratch);
  linear_of<Float32>(job, panels, scratch);
}

}  // namespace baton
