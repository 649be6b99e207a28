// Linear layers in bfloat16: rows are rounded as they are read, sums are float32.
//
// Every output is the sum that bfloat16.h defines, whether tiles or vectors compute it: a row's
// result depends on nothing but the row, and is the same on any processor.
#pragma once

#include <algorithm>

#include "linear_tiles.h"

namespace baton {

// Rows of a register tile: two chains of two vectors each, and two weights as two vectors each.
#if defined(__AVX512F__)
constexpr int kPairRows = 6;
#else
constexpr int kPairRows = 2;
#endif

constexpr int kFewRows = 4;  // So few are as fast with vectors as with tiles: memory limits both.
constexpr int64_t kRoundedFloats = 1 << 18;  // Rounded rows that stay in cache: half of 2 MB.
constexpr int64_t kPairsAhead = 24;  // Pairs that memory is asked for before they are needed.

// Rows that are rounded at a time for tiles, and twice as many as for vectors.
static inline int64_t rounded_rows(int64_t inputs) {
  const int64_t fit = kRoundedFloats * 2 / Pairs::rows(inputs);
  return std::min<int64_t>(512, std::max<int64_t>(4 * kTileRows, fit / 32 * 32));
}

// Floats of scratch memory that each thread needs.
static inline int64_t pairs_scratch(int64_t inputs) {
  return tile_sums(inputs) + rounded_rows(inputs) * Pairs::rows(inputs) / 2;
}

// ---- With vectors

// Rounds `count` rows to [pairs][count][2] floats, zeros after the last input.
static inline void round_rows(const float* x, int64_t stride, int64_t count, int64_t inputs,
                              float* to) {
  const int64_t padded = Pairs::rows(inputs);
  float values[kWidth];
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t at = 0; at < padded; at += kWidth) {
      const int64_t left = inputs - at;
      Vec value{};
      if (left > 0) {
        value = load_lanes(x + row * stride + at,
                           static_cast<int>(std::min<int64_t>(left, kWidth)));
      }
      store(values, rounded(value));
      float* pair = to + (at / 2 * count + row) * 2;
      for (int lane = 0; lane < kWidth; lane += 2, pair += 2 * count) {
        std::memcpy(pair, values + lane, 2 * sizeof(float));
      }
    }
  }
}

// Makes the sums [kPanels][kCount][kPanel] of rounded rows and kPanels panels.
template <int kCount, int kPanels>
static inline void multiply_pairs(const float* x, const uint16_t* weights, int64_t groups,
                                  float* sums) {
  const int64_t panel_values = groups * kGroup * kPanel;
  std::fill_n(sums, kPanels * kCount * kPanel, 0.0f);
  for (int64_t group = 0; group < groups; ++group) {
    Vec even[kPanels][kCount][2] = {}, odd[kPanels][kCount][2] = {};
    for (int pair = 0; pair < kPairs; ++pair) {
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        const uint16_t* words = weights + p * panel_values;
        __builtin_prefetch(words + kPairsAhead * 2 * kPanel);
        __builtin_prefetch(words + kPairsAhead * 2 * kPanel + kPanel);
        const IntVec low = load_words(words), high = load_words(words + 2 * kWidth);
#pragma GCC unroll 6
        for (int row = 0; row < kCount; ++row) {
          const float first = x[2 * row], second = x[2 * row + 1];
          even[p][row][0] = first_of(low) * first + even[p][row][0];
          even[p][row][1] = first_of(high) * first + even[p][row][1];
          odd[p][row][0] = second_of(low) * second + odd[p][row][0];
          odd[p][row][1] = second_of(high) * second + odd[p][row][1];
        }
      }
      weights += 2 * kPanel;
      x += 2 * kCount;
    }
#pragma GCC unroll 24
    for (int index = 0; index < kPanels * kCount * 2; ++index) {
      const int p = index / 2 / kCount, row = index / 2 % kCount, half = index % 2;
      float* sum = sums + index * kWidth;
      store(sum, load(sum) + (even[p][row][half] + odd[p][row][half]));
    }
  }
}

// Calls `multiply_pairs` for a number of rows that is known only now.
template <int kPanels>
static inline void multiply_some(int64_t rows, const float* x, const uint16_t* weights,
                                 int64_t groups, float* sums) {
#define BATON_ROWS(count)                                                              \
  case count:                                                                          \
    if constexpr (count * kPanels <= kPairRows)                                        \
      return multiply_pairs<count, kPanels>(x, weights, groups, sums);                 \
    break;
  switch (rows) {
    BATON_ROWS(1)
    BATON_ROWS(2)
    BATON_ROWS(3)
    BATON_ROWS(4)
    BATON_ROWS(5)
    BATON_ROWS(6)
  }
#undef BATON_ROWS
  __builtin_unreachable();
}

// Computes as many whole groups of kPanels panels as there are, and takes them from `panels`.
template <int kPanels>
static void pairs_by_vectors(const Linear& job, Share rows, Share& panels, const float* x) {
  const int64_t padded = Pairs::rows(job.matrix.inputs);
  const auto* weights = static_cast<const uint16_t*>(job.matrix.panels);
  float sums[kPairRows * kPanel];
  for (; panels.begin + kPanels <= panels.end; panels.begin += kPanels) {
    for (int64_t row = rows.begin; row < rows.end; row += kPairRows) {
      const int64_t count = std::min<int64_t>(kPairRows, rows.end - row);
      multiply_some<kPanels>(count, x + (row - rows.begin) * padded,
                             weights + panels.begin * padded * kPanel, padded / kGroup, sums);
      for (int p = 0; p < kPanels; ++p) {
        finish_sums(job, row, count, (panels.begin + p) * kPanel, sums + p * count * kPanel);
      }
    }
  }
}

static void pairs_by_vectors(const Linear& job, Share panels, float* x) {
  const int64_t inputs = job.matrix.inputs, padded = Pairs::rows(inputs);
  const int64_t step = rounded_rows(inputs) / 2 / kPairRows * kPairRows;
  for (int64_t begin = 0; begin < job.rows; begin += step) {
    const Share rows{begin, std::min(begin + step, job.rows)};
    for (int64_t row = begin; row < rows.end; row += kPairRows) {
      round_rows(job.x + row * job.x_stride, job.x_stride,
                 std::min<int64_t>(kPairRows, rows.end - row), inputs, x + (row - begin) * padded);
    }
    Share left = panels;
    // Several panels at once where one has too few sums to keep the multipliers and memory busy.
    if constexpr (kPairRows >= 4) {
      if (job.rows == 1) pairs_by_vectors<4>(job, rows, left, x);
    }
    if (job.rows * 2 <= kPairRows) pairs_by_vectors<2>(job, rows, left, x);
    pairs_by_vectors<1>(job, rows, left, x);
  }
}

// ---- With either

// Whether tiles compute it.
static inline bool by_tiles(const Linear& job) {
  return job.matrix.format == Format::kPairs && job.rows > kFewRows && has_amx();
}

#if defined(BATON_AMX)

// Rounds all rows, so many at a time as `scratch` has room for, and computes them.
static void pairs_by_tiles(const Linear& job, Share panels, float* scratch) {
  const int64_t groups = whole_groups(job.matrix.inputs), step = rounded_rows(job.matrix.inputs);
  auto* values = reinterpret_cast<uint16_t*>(scratch + tile_sums(job.matrix.inputs));
  for (int64_t row = 0; row < job.rows; row += step) {
    Linear part = job;
    part.rows = std::min(step, job.rows - row);
    part.x += row * job.x_stride;
    part.out += row * job.out_stride;
    if (part.residual) part.residual += row * job.residual_stride;
    const RoundedRows x{values, row_tiles(part.rows), groups};
    round_tiles(part, {0, x.tiles}, x);
    pairs_by_tiles(part, panels, x, scratch);
  }
}

#endif

#if defined(BATON_AMX)

__attribute__((noinline)) static void round_rows_of(const Linear& job, Share tiles,
                                                    const RoundedRows& x) {
  const FlushDenormals flush;
  round_tiles(job, tiles, x);
}

__attribute__((noinline)) static void linear_of_rounded(const Linear& job, Share panels,
                                                        const RoundedRows& x, float* scratch) {
  const FlushDenormals flush;
  pairs_by_tiles(job, panels, x, scratch);
}

template <class Take>
__attribute__((noinline)) static void pieces_of_rounded(const Linear& job, int threads,
                                                        const RoundedRows& x, float* scratch,
                                                        const Take& take) {
  const FlushDenormals flush;
  pieces_by_tiles(job, threads, x, scratch, take);
}

#endif

// `scratch` has pairs_scratch() floats. Not inlined, so that no arithmetic moves out of the part
// where small numbers are flushed.
__attribute__((noinline)) static void linear_of_pairs(const Linear& job, Share panels,
                                                      float* scratch) {
  const FlushDenormals flush;
#if defined(BATON_AMX)
  if (by_tiles(job)) return pairs_by_tiles(job, panels, scratch);
#endif
  pairs_by_vectors(job, panels, scratch);
}

}  // namespace baton
