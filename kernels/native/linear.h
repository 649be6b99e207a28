// Linear layers of weights in any format.
#pragma once

#include "linear_float.h"
#include "linear_pairs.h"

namespace baton {

// Floats of scratch memory that each thread needs for a matrix.
static inline int64_t linear_scratch(const Matrix& matrix) {
  return matrix.format == Format::kPairs ? pairs_scratch(matrix.inputs) : kLinearScratch;
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

}  // namespace baton
