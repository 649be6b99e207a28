// The operations between linear layers and attention: each row or value by itself.
//
// Every operation is called by all threads of a team and does its own share; rows are independent,
// so that nothing depends on the number of threads or on the rest of the batch.
#pragma once

#include <cmath>

#include "batch.h"
#include "bfloat16.h"
#include "gate.h"
#include "vec_math.h"

namespace baton {

// ---- Root mean square norm (Zhang and Sennrich, 2019)

// out = x / sqrt(mean(x^2) + eps) * weight, of one row; out may be x.
static inline void norm_row(const float* x, const float* weight, float eps, int64_t width,
                            float* out) {
  Vec sums[4] = {};
  for_vectors(width, [&](int64_t at, int lanes) {
    const Vec value = load_lanes(x + at, lanes);
    Vec& sum = sums[at / kWidth % 4];
    sum = value * value + sum;
  });
  const float square = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
  const float factor = 1.0f / std::sqrt(square / static_cast<float>(width) + eps);
  for_vectors(width, [&](int64_t at, int lanes) {
    const Vec normed = load_lanes(x + at, lanes) * factor;
    store_lanes(out + at, normed * load_lanes(weight + at, lanes), lanes);
  });
}

struct RmsNorm {
  const float* x;  // [rows, width]
  int64_t x_stride;
  const float* weight;  // [width]
  float eps;
  float* out;  // [rows, width]; may be x.
  int64_t out_stride;
  int64_t rows, width;
};

static inline void rms_norm(const RmsNorm& job, int thread, int threads) {
  const Share share = share_of(job.rows, thread, threads);
  for (int64_t row = share.begin; row < share.end; ++row) {
    norm_row(job.x + row * job.x_stride, job.weight, job.eps, job.width,
             job.out + row * job.out_stride);
  }
}

// ---- Rotary position embedding (Su et al., 2021), pairs (i, i + pairs) of a head's dimensions

struct RopeTable {
  const int32_t* positions;  // [tokens]
  const float* frequencies;  // [pairs]
  float magnitude;
  float *cos, *sin;  // [tokens, pairs]
  int64_t tokens, pairs;
};

// Once per step for every distinct rotation.
static inline void rope_table(const RopeTable& job, int thread, int threads) {
  const Share share = share_of(job.tokens, thread, threads);
  for (int64_t token = share.begin; token < share.end; ++token) {
    const float position = static_cast<float>(job.positions[token]);
    for (int64_t pair = 0; pair < job.pairs; ++pair) {
      const float angle = position * job.frequencies[pair];
      job.cos[token * job.pairs + pair] = std::cos(angle) * job.magnitude;
      job.sin[token * job.pairs + pair] = std::sin(angle) * job.magnitude;
    }
  }
}

// Turns the 2 * pairs values of one head that `x` points to.
static inline void turn(float* x, const float* cos, const float* sin, int64_t pairs) {
  for_vectors(pairs, [&](int64_t at, int lanes) {
    const Vec first = load_lanes(x + at, lanes), second = load_lanes(x + pairs + at, lanes);
    const Vec c = load_lanes(cos + at, lanes), s = load_lanes(sin + at, lanes);
    store_lanes(x + at, first * c - second * s, lanes);
    store_lanes(x + pairs + at, second * c + first * s, lanes);
  });
}

// ---- Places of new KV

// A layer's offset in the pool for each token of a batch, and its position, once per step.
struct PlaceTokens {
  const Sequence* sequences;
  int32_t count;
  PoolShape shape;
  int64_t* slots;      // [tokens]: where K of head 0 goes, from the layer's first value in block 0.
  int32_t* positions;  // [tokens]
};

static inline void place_tokens(const PlaceTokens& job, int thread, int threads) {
  const int32_t size = job.shape.block_size;
  for (int64_t index = thread; index < job.count; index += threads) {
    const Sequence& sequence = job.sequences[index];
    for (int32_t row = 0; row < sequence.rows; ++row) {
      const int32_t position = sequence.length - sequence.rows + row;
      const int64_t block = sequence.blocks[position / size];
      job.positions[sequence.row + row] = position;
      const int64_t within = static_cast<int64_t>(position % size) * job.shape.head_dim;
      job.slots[sequence.row + row] = block * job.shape.block_stride + within;
    }
  }
}

// ---- What happens to q, k and v between their projection and attention

struct PrepareHeads {
  float* heads;  // [tokens, heads + 2 * kv_heads, head_dim]: q, k and v; q is changed in place.
  int64_t stride;
  int64_t tokens, q_heads;
  const float* norm_weights;  // [q_heads + kv_heads, head_dim], or null: q and k are not normed.
  float eps;
  const float *cos, *sin;  // [tokens, pairs]
  int64_t pairs;           // The first 2 * pairs values of a head are turned.
  void* pool;              // This layer's first value in block 0.
  bool narrow;             // The pool holds bfloat16, otherwise float32.
  PoolShape shape;         // Of two parts.
  const int64_t* slots;    // [tokens]
};

// Writes one token's vector of one head to the pool, `at` values from where a layer begins.
static inline void store_kv(const float* from, int64_t dim, bool narrow, void* pool, int64_t at) {
  if (narrow) return narrow_some(from, dim, static_cast<uint16_t*>(pool) + at);
  std::memcpy(static_cast<float*>(pool) + at, from, static_cast<size_t>(dim) * sizeof(float));
}

// Norms and turns each head of q and k in place and writes k and v to the pool.
static inline void prepare_heads(const PrepareHeads& job, int thread, int threads) {
  const PoolShape& shape = job.shape;
  const int64_t dim = shape.head_dim, turned = job.q_heads + shape.kv_heads;
  const Share share = share_of(job.tokens, thread, threads);
  for (int64_t token = share.begin; token < share.end; ++token) {
    float* row = job.heads + token * job.stride;
    for (int64_t head = 0; head < turned; ++head) {
      float* x = row + head * dim;
      if (job.norm_weights) norm_row(x, job.norm_weights + head * dim, job.eps, dim, x);
      turn(x, job.cos + token * job.pairs, job.sin + token * job.pairs, job.pairs);
    }
    const float* k = row + job.q_heads * dim;
    for (int64_t head = 0; head < 2 * shape.kv_heads; ++head) {
      store_kv(k + head * dim, dim, job.narrow, job.pool,
               job.slots[token] + head * shape.head_stride());
    }
  }
}

// ---- Gates of feed-forward layers, on gate and up side by side

struct GateMul {
  const float* gate_up;  // [rows, 2 * width]
  int64_t gate_up_stride;
  float* out;  // [rows, width]
  int64_t out_stride;
  int64_t rows, width;
  Gate gate;
};

template <class Function>
static inline void gate_rows(const GateMul& job, int thread, int threads, Function function) {
  constexpr int64_t kPiece = 16 * kWidth;  // So that threads share single rows too.
  const int64_t pieces = (job.width + kPiece - 1) / kPiece;
  const Share share = share_of(job.rows * pieces, thread, threads);
  for (int64_t piece = share.begin; piece < share.end; ++piece) {
    const int64_t row = piece / pieces, begin = piece % pieces * kPiece;
    const float* gate = job.gate_up + row * job.gate_up_stride + begin;
    float* out = job.out + row * job.out_stride + begin;
    const int64_t width = begin + kPiece < job.width ? kPiece : job.width - begin;
    for_vectors(width, [&](int64_t at, int lanes) {
      const Vec g = load_lanes(gate + at, lanes), u = load_lanes(gate + job.width + at, lanes);
      store_lanes(out + at, function(g, u), lanes);
    });
  }
}

static inline void gate_mul(const GateMul& job, int thread, int threads) {
  by_gate(job.gate, [&](auto function) { gate_rows(job, thread, threads, function); });
}

// ---- Sums, soft caps, and rows from elsewhere

struct Add {
  float* x;  // [count]: x += y
  const float* y;
  int64_t count;
};

static inline void add(const Add& job, int thread, int threads) {
  const Share share = share_of(job.count, thread, threads);
  float* x = job.x + share.begin;
  const float* y = job.y + share.begin;
  for_vectors(share.end - share.begin, [&](int64_t at, int lanes) {
    store_lanes(x + at, load_lanes(x + at, lanes) + load_lanes(y + at, lanes), lanes);
  });
}

struct Softcap {
  float* x;  // [count]: x = cap * tanh(x / cap)
  float cap;
  int64_t count;
};

static inline void softcap(const Softcap& job, int thread, int threads) {
  const Share share = share_of(job.count, thread, threads);
  float* x = job.x + share.begin;
  for_vectors(share.end - share.begin, [&](int64_t at, int lanes) {
    store_lanes(x + at, tanh_of(load_lanes(x + at, lanes) / job.cap) * job.cap, lanes);
  });
}

// out[i] = table[index[i]] * scale, for embeddings (Element float or Bf16) and for picked rows.
template <class Element>
struct Gather {
  const Element* table;  // [.., width]
  int64_t table_stride;
  const int32_t* index;  // [rows]
  float scale;
  float* out;  // [rows, width]
  int64_t out_stride;
  int64_t rows, width;
};

template <class Element>
static inline void gather(const Gather<Element>& job, int thread, int threads) {
  const Share share = share_of(job.rows, thread, threads);
  for (int64_t row = share.begin; row < share.end; ++row) {
    const Element* from = job.table + job.index[row] * job.table_stride;
    float* to = job.out + row * job.out_stride;
    for (int64_t at = 0; at < job.width; ++at) to[at] = to_float(from[at]) * job.scale;
  }
}

}  // namespace baton
