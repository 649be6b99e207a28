// What a linear layer computes: y = x W^T, plus a bias, plus what is in y's place already.
#pragma once

#include <algorithm>

#include "batch.h"
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
  // come to: [rows, outputs / 2]. Only of jobs in pieces, without bias and residual.
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

// The panels of a layer in the order in which they are multiplied: gates before what they are for.
struct PanelOrder {
  int64_t gates;  // Panels of gates, or 0.

  explicit PanelOrder(const Linear& job) : gates(job.gate ? job.matrix.outputs / kPanel / 2 : 0) {}

  int64_t operator[](int64_t number) const {
    return gates ? number / 2 + number % 2 * gates : number;
  }
};

constexpr int64_t kLeastPanels = 8;  // Of a piece: a block of rows is read again for each.
constexpr int64_t kMostPanels = 32;

// Panels of a piece, where rows come in so many blocks; a gate and what it is for stay together.
static inline int64_t panels_of_piece(int64_t panels, int64_t blocks, int threads) {
  const int64_t wanted = (kPiecesEach * threads + blocks - 1) / blocks;
  const int64_t even = (panels + wanted - 1) / wanted;
  return std::min((even + kLeastPanels - 1) / kLeastPanels * kLeastPanels, kMostPanels);
}

}  // namespace baton
