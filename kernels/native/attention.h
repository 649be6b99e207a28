// Attention of a ragged batch over the paged KV pool, decodes and chunks of prompts alike.
#pragma once

#include "batch.h"
#include "vec_math.h"

namespace baton {

template <class Element>
struct Attention {
  const Sequence* sequences;
  int32_t count;
  int32_t heads;      // A multiple of pool.kv_heads.
  int32_t value_dim;  // head_dim, or, of a pool with one part, the first so many values of it.
  int32_t window;     // Keys that a row sees at most, its own included; 0: all.
  float scale;
  float softcap;       // Scores are squeezed to +- this by tanh; 0: they are not.
  const float* sinks;  // [heads] or null: scores that take their share and give nothing.
  const float* q;      // [tokens, heads, head_dim], q_stride floats from a token to the next.
  int64_t q_stride;
  const Element* pool;  // This layer's first value in block 0; the new tokens' KV is there already.
  PoolShape shape;
  float* out;  // [tokens, heads, value_dim], out_stride floats from a token to the next.
  int64_t out_stride;
  float* scratch;   // attention_scratch() floats for every thread.
  float* partials;  // attention_partials() floats, perhaps none.
  int32_t* counters;  // [count * kv_heads], zero; they are zero again afterwards.
};

// Floats of scratch memory that each thread needs.
int64_t attention_scratch(int head_dim, int value_dim);

// Floats that spans of long decodes, computed by several threads, are kept in.
template <class Element>
int64_t attention_partials(const Attention<Element>& job, int threads);

template <class Element>
void attend(const Attention<Element>& job, int thread, int threads);

}  // namespace baton
