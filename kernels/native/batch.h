// What a step's operations share: its sequences, the layout of the KV pool, and how to split work.
#pragma once

#include <cstdint>

namespace baton {

// New tokens of one sequence: rows [row, row + rows) of the batch, the last tokens of `length`.
struct Sequence {
  int32_t row;
  int32_t rows;
  int32_t length;         // Tokens of the sequence, the new ones included.
  const int32_t* blocks;  // Its block table; those behind a sliding window are never read.
};

// Pool [num_blocks, layers, parts, kv_heads, block_size, head_dim], as one layer sees it.
struct PoolShape {
  int64_t block_stride;  // Values from a block to the next: layers * parts * kv_heads * ...
  int32_t parts;         // 2: K and V; 1: one vector that is both.
  int32_t kv_heads;
  int32_t block_size;
  int32_t head_dim;

  int64_t head_stride() const { return static_cast<int64_t>(block_size) * head_dim; }
  int64_t value_offset() const { return (parts - 1) * kv_heads * head_stride(); }
};

struct Share {
  int64_t begin, end;
};

// The part of `total` pieces of work that falls to a thread.
static inline Share share_of(int64_t total, int thread, int threads) {
  return {total * thread / threads, total * (thread + 1) / threads};
}

// How many pieces a large operation is cut into for each thread. They are not dealt out but taken,
// each by the thread that is free first: the processes of a machine share its cores, and a thread
// that was kept from its own for a while must not hold up all others.
constexpr int64_t kPiecesEach = 6;

}  // namespace baton
