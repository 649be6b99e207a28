// y = x W^T, plus a bias, plus what is in y's place already: few rows from memory, many from cache.
//
// Every output is one chain of multiply-adds over k = 0, 1, ... whatever the number of rows, the
// blocking or the threads: a sum that is put away between two blocks comes back as it was. So a
// row's result depends on nothing but the row.
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

constexpr int64_t kDepth = 256;         // Inputs of a block of a panel, so that it stays in L1.
constexpr int64_t kPackedFloats = 1 << 18;  // Inputs of all rows of a block: half of a 2 MB L2.
constexpr int64_t kMostRows = 32 * kRows;

// Rows that are computed together, as many groups of kRows as the cache has room for.
static inline int64_t rows_at_once(int64_t inputs) {
  const int64_t fitting = kPackedFloats / inputs / kRows * kRows;
  return fitting < 4 * kRows ? 4 * kRows : fitting < kMostRows ? fitting : kMostRows;
}

// Floats of scratch memory that each thread needs for matrices of up to so many inputs.
static inline int64_t linear_scratch(int64_t inputs) {
  const int64_t most = kPackedFloats + 4 * kRows * inputs;
  return most + (kMostRows + kDepth) * kPanel;
}

// Adds `depth` products to sums [kCount][kPanel] for each of kPanels panels, `stride` values apart.
//
// x is [depth][kCount]. With `fresh` the sums begin at zero.
template <class Weights, int kCount, int kPanels>
static inline void multiply(const float* x, const typename Weights::Value* panel, int64_t stride,
                            int64_t depth, bool fresh, float* sums) {
  Vec low[kPanels][kCount] = {}, high[kPanels][kCount] = {};
  if (!fresh) {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 12
      for (int row = 0; row < kCount; ++row) {
        low[p][row] = load(sums + (p * kCount + row) * kPanel);
        high[p][row] = load(sums + (p * kCount + row) * kPanel + kWidth);
      }
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      const Pair weights = Weights::load_row(panel + p * stride + k * kPanel);
#pragma GCC unroll 12
      for (int row = 0; row < kCount; ++row) {
        low[p][row] = weights.low * x[k * kCount + row] + low[p][row];
        high[p][row] = weights.high * x[k * kCount + row] + high[p][row];
      }
    }
  }
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
static inline void multiply_rows(int rows, const float* x, const typename Weights::Value* panel,
                                 int64_t stride, int64_t depth, bool fresh, float* sums) {
#define BATON_ROWS(count)                                                            \
  case count:                                                                        \
    if constexpr (count <= kRows && count * kPanels <= kRows)                        \
      return multiply<Weights, count, kPanels>(x, panel, stride, depth, fresh, sums); \
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

// x rows [begin, begin + count) to [inputs][count].
static inline void pack_inputs(const Linear& job, int64_t begin, int count, float* packed) {
  for (int row = 0; row < count; ++row) {
    const float* x = job.x + (begin + row) * job.x_stride;
    for (int64_t k = 0; k < job.matrix.inputs; ++k) packed[k * count + row] = x[k];
  }
}

// Finishes sums [count][kPanel] of rows from `begin` on and outputs from `output` on.
static inline void finish_sums(const Linear& job, int64_t begin, int count, int64_t output,
                               const float* sums) {
  const int64_t left = job.matrix.outputs - output;
  for (int row = 0; row < count; ++row) {
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

// Few rows: each panel goes straight from memory through the registers, once.
template <class Weights, int kPanels>
static void stream_panels(const Linear& job, const float* packed, Share& panels, float* sums) {
  const auto* values = static_cast<const typename Weights::Value*>(job.matrix.panels);
  const int64_t stride = job.matrix.inputs * kPanel;
  const int rows = static_cast<int>(job.rows);
  for (; panels.begin + kPanels <= panels.end; panels.begin += kPanels) {
    multiply_rows<Weights, kPanels>(rows, packed, values + panels.begin * stride, stride,
                                    job.matrix.inputs, true, sums);
    for (int p = 0; p < kPanels; ++p) {
      finish_sums(job, 0, rows, (panels.begin + p) * kPanel, sums + p * rows * kPanel);
    }
  }
}

template <class Weights>
static void linear_few(const Linear& job, Share panels, float* scratch) {
  float* sums = scratch + kRows * job.matrix.inputs;
  const float* packed = job.x;
  if (job.rows > 1) {
    pack_inputs(job, 0, static_cast<int>(job.rows), scratch);
    packed = scratch;
  }
  // Several panels at once where one has too few sums to keep the multipliers and memory busy.
  if (job.rows * 4 <= kRows) stream_panels<Weights, 4>(job, packed, panels, sums);
  if (job.rows * 2 <= kRows) stream_panels<Weights, 2>(job, packed, panels, sums);
  stream_panels<Weights, 1>(job, packed, panels, sums);
}

// A block of a panel as floats: itself, or widened.
template <class Weights>
static const float* widened(const typename Weights::Value* block, int64_t depth, float* room) {
  if constexpr (sizeof(typename Weights::Value) == sizeof(float)) {
    return block;
  } else {
    for (int64_t k = 0; k < depth; ++k) {
      const Pair row = Weights::load_row(block + k * kPanel);
      store(room + k * kPanel, row.low);
      store(room + k * kPanel + kWidth, row.high);
    }
    return room;
  }
}

// Rows [begin, end), which fit the cache, times each panel, block by block.
template <class Weights>
static void linear_block(const Linear& job, Share rows, Share panels, float* scratch) {
  const int64_t inputs = job.matrix.inputs, count = rows.end - rows.begin;
  const int64_t groups = (count + kRows - 1) / kRows;
  const auto group = [&](int64_t index) { return share_of(count, static_cast<int>(index), static_cast<int>(groups)); };
  float* sums = scratch + count * inputs;
  float* room = sums + count * kPanel;
  for (int64_t g = 0; g < groups; ++g) {
    const Share part = group(g);
    pack_inputs(job, rows.begin + part.begin, static_cast<int>(part.end - part.begin),
                scratch + part.begin * inputs);
  }
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    const auto* panel =
        static_cast<const typename Weights::Value*>(job.matrix.panels) + p * inputs * kPanel;
    for (int64_t k = 0; k < inputs; k += kDepth) {
      const int64_t depth = inputs - k < kDepth ? inputs - k : kDepth;
      const float* block = widened<Weights>(panel + k * kPanel, depth, room);
      for (int64_t g = 0; g < groups; ++g) {
        const Share part = group(g);
        const int some = static_cast<int>(part.end - part.begin);
        const float* x = scratch + part.begin * inputs + k * some;
        float* into = sums + part.begin * kPanel;
        multiply_rows<Float32, 1>(some, x, block, 0, depth, k == 0, into);
        if (k + depth == inputs) finish_sums(job, rows.begin + part.begin, some, p * kPanel, into);
      }
    }
  }
}

template <class Weights>
static void linear_of(const Linear& job, int thread, int threads, float* scratch) {
  const int64_t count = (job.matrix.outputs + kPanel - 1) / kPanel;
  const Share panels = share_of(count, thread, threads);
  if (job.rows <= kRows) return linear_few<Weights>(job, panels, scratch);
  const int64_t step = rows_at_once(job.matrix.inputs);
  for (int64_t row = 0; row < job.rows; row += step) {
    const Share rows{row, row + step < job.rows ? row + step : job.rows};
    linear_block<Weights>(job, rows, panels, scratch);
  }
}

// `scratch` has linear_scratch(inputs) floats and is the thread's own.
static inline void linear(const Linear& job, int thread, int threads, float* scratch) {
  if (job.matrix.format == Format::kBfloat16) {
    return linear_of<Bfloat16>(job, thread, threads, scratch);
  }
  linear_of<Float32>(job, thread, threads, scratch);
}

}  // namespace baton
