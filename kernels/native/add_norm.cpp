// Sum, addition to the stream and norm in one pass: the native side of kernels/add_rms_norm.py.
//
// A row goes through all three before the next one begins, so that it is read once from where it
// lies, which may be memory that other processes have written, and is in the cache from then on.
#include <cstdint>

#include "elementwise.h"

using baton::Vec;

// Adds the `count` addends [rows, width], in order, to each other and then to the stream; `out` is
// its norm times `weight` [width]. All are dense.
extern "C" void baton_add_norm(const float* const* addends, int count, float* stream, int64_t rows,
                               int64_t width, const float* weight, float eps, float* out) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = row * width;
    baton::for_vectors(width, [&](int64_t at, int lanes) {
      Vec sum = baton::load_lanes(addends[0] + first + at, lanes);
      for (int i = 1; i < count; ++i) sum += baton::load_lanes(addends[i] + first + at, lanes);
      sum = baton::load_lanes(stream + first + at, lanes) + sum;
      baton::store_lanes(stream + first + at, sum, lanes);
    });
    baton::norm_row(stream + first, weight, eps, width, out + first);
  }
}
