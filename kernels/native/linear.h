// Linear layers of weights in any format.
#pragma once

#include "linear_float.h"
#include "linear_pairs.h"

namespace baton {

// Floats of scratch memory that each thread needs for a matrix.
static inline int64_t linear_scratch(const Matrix& matrix) {
  return matrix.format == Format::kPairs ? pairs_scratch(matrix.inputs)
                                         : float_scratch(matrix.inputs);
}

// Values that a row of x is rounded to, if threads share its rounding.
static inline int64_t rounded_values(const Matrix& matrix) {
  return matrix.format == Format::kPairs && has_amx() ? Pairs::rows(matrix.inputs) : 0;
}

// `scratch` has linear_scratch() floats and is the thread's own.
static inline void linear(const Linear& job, int thread, int threads, float* scratch) {
  const Share panels = share_of((job.matrix.outputs + kPanel - 1) / kPanel, thread, threads);
  switch (job.matrix.format) {
    case Format::kFloat32:
      return linear_of<Float32>(job, panels, scratch);
    case Format::kBfloat16:
      return linear_of<Bfloat16>(job, panels, scratch);
    case Format::kPairs:
      return linear_of_pairs(job, panels, scratch);
  }
}

// Whether linear_together() takes pieces, and with them a gate.
static inline bool in_pieces(const Linear& job) {
  if (job.matrix.format != Format::kPairs) return job.rows > kManyRows;
#if defined(BATON_AMX)
  return by_tiles(job) && job.rows > kPairTiles * kTileRows;
#else
  return false;
#endif
}

// As linear(), of a team that meets at a barrier: `rounded` is shared and has rounded_values().
// `take` counts from 0, for all threads together.
template <class Barrier, class Take>
static inline void linear_together(const Linear& job, int thread, int threads, float* scratch,
                                   uint16_t* rounded, const Barrier& barrier, const Take& take) {
#if defined(BATON_AMX)
  if (by_tiles(job)) {
    const RoundedRows x{rounded, row_tiles(job.rows), whole_groups(job.matrix.inputs)};
    round_rows_of(job, share_of(x.tiles, thread, threads), x);
    barrier();
    if (in_pieces(job)) return pieces_of_rounded(job, threads, x, scratch, take);
    const Share panels = share_of((job.matrix.outputs + kPanel - 1) / kPanel, thread, threads);
    return linear_of_rounded(job, panels, x, scratch);
  }
#endif
  if (!in_pieces(job)) return linear(job, thread, threads, scratch);
  if (job.matrix.format == Format::kFloat32) {
    return pieces_of_floats<Float32>(job, threads, scratch, take);
  }
  pieces_of_floats<Bfloat16>(job, threads, scratch, take);
}

}  // namespace baton
