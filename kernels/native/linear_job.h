// What a linear layer computes: y = x W^T, plus a bias, plus what is in y's place already.
#pragma once

#include "gate.h"
#include "matrix.h"

namespace baton {

constexpr int64_t kLineBytes = 64;  // Of a cache line.

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
  // If not null, the first half of the outputs are gates of the other half, and out has what they
  // come to: [rows, outputs / 2]. Only of pieces_by_tiles(), without bias and residual.
  const Gate* gate = nullptr;
};

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

// As finish_sums, of sums of gates and of what they are for.
static inline void finish_gated(const Linear& job, int64_t begin, int64_t count, int64_t output,
                                const float* gates, const float* ups) {
  by_gate(*job.gate, [&](auto function) {
    for (int64_t row = 0; row < count; ++row) {
      float* out = job.out + (begin + row) * job.out_stride + output;
      for (int64_t at = row * kPanel; at < (row + 1) * kPanel; at += kWidth, out += kWidth) {
        store(out, function(load(gates + at), load(ups + at)));
      }
    }
  });
}

}  // namespace baton
