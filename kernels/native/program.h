// A model as a flat list of operations on buffers, and one engine step's input to it.
//
// kernels/native/library.py has the same structures for Python: change both together.
#pragma once

#include <cstdint>

#include "batch.h"
#include "linear.h"
#include "moe.h"

namespace baton {

enum class Kind : int32_t {
  kPlace,    // Once per step: positions of the tokens and where their KV goes.
  kAngles,   // Once per step and rotation `table`.
  kEmbed,    // out = rows of `matrix`, or else of the table `weight`, times scale
  kNorm,     // out = norm(x) * weight
  kLinear,   // out = x W^T + bias + y
  kHeads,    // Norm, turn and store what x has of q, k and v.
  kAttend,   // out = what the queries in x see
  kGate,     // out = gate(x's first half) * x's second half
  kAdd,      // out += x
  kPick,     // out = rows of x whose logits are wanted
  kSoftcap,  // out = scale * tanh(out / scale)
  kLatent,   // Turn and store x's latent, turn y's queries and put their ends where out has them.
  kByHead,   // out = x W^T, each of `heads` with one of the matrices in `weight`
  kRoute,    // Which experts each row visits, by the scores in x and the Routing in `weight`.
  kGroup,    // Puts pairs of row and expert in the order of the experts.
  kSpread,   // out = x, a row for each pair
  kExperts,  // out = x W^T + bias, each pair by its expert's of the matrices in `weight`
  kCombine,  // out += the weighted sum of each row's pairs in x
};

// What fields mean follows from the kind; those that it does not use are 0.
struct Op {
  Kind kind;
  int32_t sampled;     // 1: rows are the tokens whose logits are wanted; 0: all tokens
  int32_t layer;
  int32_t x, y, out;   // Buffers; y may be -1 for none, out may be -1 for the logits.
  int32_t x_at, out_at;  // The first column of x and of out.
  int32_t x_step, out_step;  // Columns from a head to the next.
  int32_t width;       // Columns.
  int32_t top_k;       // Rows of x per row of the step: 1, or each token's experts.
  int32_t table;       // Which rotation.
  int32_t heads;
  int32_t window;
  GateKind gate;
  Stored stored;       // What `weight` of kEmbed is.
  float scale;
  float eps;
  float alpha, limit;
  const void* weight;
  const float* bias;
  Matrix matrix;
};

struct Routing {
  int32_t experts, top_k;
  Scoring scoring;
  int32_t normalise;
  float scale;
  int32_t groups, top_groups;
  const float* correction;
};

struct Rotation {
  const float* frequencies;
  int32_t pairs;
  float magnitude;
};

// A buffer has a row per token; number -1 is the logits, in the caller's memory.
struct Plan {
  const Op* ops;
  int32_t op_count;
  const int32_t* widths;  // Floats of a row of each buffer,
  const int32_t* spreads; // and its rows per token.
  int32_t buffer_count;
  const Rotation* rotations;
  int32_t rotation_count;
  int32_t vocabulary;
  int64_t blocks;  // Of the pool.
  PoolShape pool;
  int64_t layer_stride;  // Values from a layer to the next within a block.
  int32_t pairs;  // 1: the pool holds bfloat16 and attention computes in it; 0: float32
};

struct StepInput {
  const int32_t* tokens;
  const Sequence* sequences;  // Together they have all tokens, in order.
  const int32_t* sampled;     // Rows whose logits are wanted.
  void* pool;
  float* logits;  // [sampled_count, vocabulary]
  int32_t token_count, sequence_count, sampled_count;
};

}  // namespace baton
