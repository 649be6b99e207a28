// Runs a program: every operation by all threads, a barrier between one and the next.
#pragma once

#include <atomic>
#include <vector>

#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "program.h"
#include "room.h"
#include "team.h"

namespace baton {

// Where the tokens of a step go in a mixture of experts; every such layer uses it in turn.
struct Mixture {
  Room<int32_t> chosen, starts, rows, places;
  Room<float> weights;

  void reserve(int64_t pairs, int64_t experts) {
    chosen.reserve(pairs);
    rows.reserve(pairs);
    places.reserve(pairs);
    weights.reserve(pairs);
    starts.reserve(experts + 1);
  }
};

enum Result : int { kDone, kNoMemory, kBadToken, kBadBlock };

class Program {
 public:
  Program(const Plan& plan, int threads)
      : plan_(plan), team_(threads), buffers_(plan.buffer_count), angles_(plan.rotation_count) {
    const auto* ops = plan.ops;
    ops_.assign(ops, ops + plan.op_count);
    taken_ = std::vector<std::atomic<int64_t>>(ops_.size());
    widths_.assign(plan.widths, plan.widths + plan.buffer_count);
    spreads_.assign(plan.spreads, plan.spreads + plan.buffer_count);
    rotations_.assign(plan.rotations, plan.rotations + plan.rotation_count);
    for (const Op& op : ops_) {
      int64_t floats = 0;
      if (op.kind == Kind::kRoute) {
        most_experts_ = std::max(most_experts_, routing(op).experts);
        most_chosen_ = std::max(most_chosen_, routing(op).top_k);
      }
      if (op.kind == Kind::kLinear) {
        floats = linear_scratch(op.matrix);
        rounded_values_ = std::max(rounded_values_, rounded_values(op.matrix));
      }
      if (op.kind == Kind::kByHead || op.kind == Kind::kExperts) {
        floats = linear_scratch(*static_cast<const Matrix*>(op.weight));
      }
      if (op.kind == Kind::kAttend) floats = attention_scratch(plan.pool.head_dim, op.width, plan.pairs);
      scratch_floats_ = std::max(scratch_floats_, whole_lines(floats));
    }
    scratch_.reserve(scratch_floats_ * threads);
    for (size_t i = 0; i < ops_.size(); ++i) gated_.push_back(is_gated(i));
  }

  // Computes operations [first, last); a step's first call has first = 0.
  Result run(const StepInput& input, int first, int last) {
    if (first == 0) {
      if (const Result wrong = check(input)) return wrong;
      reserve(input);
    }
    input_ = &input;
    for (int index = first; index < last; ++index) taken_[index].store(0, std::memory_order_relaxed);
    team_.run([&](int thread) {
      for (int index = first; index < last; ++index) {
        if (index > first && gates_too(index - 1, last)) continue;
        if (index > first) team_.barrier();
        if (gates_too(index, last)) {
          linear_and_gate(ops_[index], ops_[index + 1], thread);
        } else {
          execute(ops_[index], thread);
        }
      }
    });
    return kDone;
  }

 private:
  // What a wrong number would make of memory is worse than an error.
  Result check(const StepInput& input) const {
    for (int32_t i = 0; i < input.token_count; ++i) {
      if (static_cast<uint32_t>(input.tokens[i]) >= static_cast<uint32_t>(plan_.vocabulary)) {
        return kBadToken;
      }
    }
    for (int32_t i = 0; i < input.sequence_count; ++i) {
      const Sequence& sequence = input.sequences[i];
      const int32_t blocks = (sequence.length - 1) / plan_.pool.block_size + 1;
      for (int32_t b = 0; b < blocks; ++b) {
        if (static_cast<uint64_t>(sequence.blocks[b]) >= static_cast<uint64_t>(plan_.blocks)) {
          return kBadBlock;
        }
      }
    }
    return kDone;
  }

  void reserve(const StepInput& input) {
    const int64_t tokens = input.token_count;
    if (tokens > capacity_) {
      capacity_ = std::max(tokens, 2 * capacity_);
      for (size_t i = 0; i < buffers_.size(); ++i) {
        buffers_[i].reserve(capacity_ * spreads_[i] * stride(static_cast<int32_t>(i)));
      }
      for (size_t i = 0; i < angles_.size(); ++i) {
        angles_[i].reserve(2 * capacity_ * rotations_[i].pairs);
      }
      slots_.reserve(capacity_);
      positions_.reserve(capacity_);
      rounded_.reserve(row_tiles(capacity_) * kTileRows * rounded_values_);
      mixture_.reserve(capacity_ * most_chosen_, most_experts_);
    }
    const int64_t counters = static_cast<int64_t>(input.sequence_count) * plan_.pool.kv_heads;
    if (counters > counters_.count()) {
      counters_.reserve(2 * counters);
      std::fill_n(counters_.get(), counters_.count(), 0);
    }
    if (team_.threads() == 1) return;
    input_ = &input;
    int64_t partials = 0;
    for (const Op& op : ops_) {
      if (op.kind != Kind::kAttend) continue;
      partials = std::max(partials, attention_partials(attention(op), team_.threads()));
    }
    partials_.reserve(partials);
  }

  // Numbers an operation's pieces, from 0, as threads take them.
  auto taking(const Op& op) {
    std::atomic<int64_t>& taken = taken_[&op - ops_.data()];
    return [&taken] { return taken.fetch_add(1, std::memory_order_relaxed); };
  }

  void execute(const Op& op, int thread) {
    const int threads = team_.threads();
    if (rows(op) == 0) return;
    switch (op.kind) {
      case Kind::kPlace:
        return place_tokens({input_->sequences, input_->sequence_count, plan_.pool, slots_.get(),
                             positions_.get()},
                            thread, threads);
      case Kind::kAngles:
        return angles(op, thread);
      case Kind::kEmbed:
        return embed(op, thread);
      case Kind::kNorm:
        return rms_norm({row_of(op.x) + op.x_at, stride(op.x), static_cast<const float*>(op.weight),
                         op.eps, row_of(op.out) + op.out_at, stride(op.out), rows(op), op.width},
                        thread, threads);
      case Kind::kLinear:
        return linear(op, linear_job(op), thread);
      case Kind::kHeads:
        return heads(op, thread);
      case Kind::kAttend:
        return attend(attention(op), thread, threads, taking(op));
      case Kind::kGate:
        return gate_mul({row_of(op.x), stride(op.x), row_of(op.out), stride(op.out), rows(op) * op.top_k,
                         op.width, {op.gate, op.alpha, op.limit}},
                        thread, threads);
      case Kind::kAdd:
        return baton::add({row_of(op.out), row_of(op.x), rows(op) * stride(op.out)}, thread,
                          threads);
      case Kind::kPick:
        return gather<float>({row_of(op.x), stride(op.x), input_->sampled, 1.0f, row_of(op.out),
                              stride(op.out), rows(op), op.width},
                             thread, threads);
      case Kind::kSoftcap:
        return softcap({row_of(op.out), op.scale, rows(op) * stride(op.out)}, thread, threads);
      case Kind::kLatent:
        return latent(op, thread);
      case Kind::kByHead:
        return by_head(op, thread);
      default:
        return execute_mixture(op, thread);
    }
  }

  Linear linear_job(const Op& op) const {
    return {op.matrix, op.bias, row_of(op.x) + op.x_at, stride(op.x),
            op.y < 0 ? nullptr : row_of(op.y), op.y < 0 ? 0 : stride(op.y),
            row_of(op.out) + op.out_at, stride(op.out), rows(op)};
  }

  void linear(const Op& op, const Linear& job, int thread) {
    linear_together(job, thread, team_.threads(), scratch_.get() + thread * scratch_floats_,
                    rounded_.get(), [this] { team_.barrier(); }, taking(op));
  }

  // Whether the next operation is the gate of a linear layer's outputs, which nothing else reads,
  // and may be computed with them: then they are never in memory.
  bool is_gated(size_t index) const {
    if (index + 1 >= ops_.size()) return false;
    const Op &op = ops_[index], &next = ops_[index + 1];
    if (op.kind != Kind::kLinear || next.kind != Kind::kGate) return false;
    if (next.x != op.out || next.top_k != 1 || op.sampled || op.bias || op.y >= 0) return false;
    if (op.matrix.outputs != 2 * next.width || next.width % kPanel) return false;
    for (size_t later = index + 2; later < ops_.size(); ++later) {
      if (ops_[later].x == op.out || ops_[later].y == op.out) return false;
      if (ops_[later].out == op.out) break;
    }
    return true;
  }

  bool gates_too(int index, int last) const {
    return gated_[index] && index + 1 < last && in_pieces(linear_job(ops_[index]));
  }

  void linear_and_gate(const Op& op, const Op& next, int thread) {
    const Gate gate{next.gate, next.alpha, next.limit};
    Linear job = linear_job(op);
    job.gate = &gate;
    job.out = row_of(next.out);
    job.out_stride = stride(next.out);
    linear(op, job, thread);
  }

  void execute_mixture(const Op& op, int thread) {
    const int threads = team_.threads();
    switch (op.kind) {
      case Kind::kRoute:
        return route(op, thread);
      case Kind::kGroup:
        return group_pairs({mixture_.chosen.get(), rows(op), op.heads, op.top_k,
                            mixture_.starts.get(), mixture_.rows.get(), mixture_.places.get()},
                           thread, threads);
      case Kind::kSpread:
        return gather<float>({row_of(op.x), stride(op.x), mixture_.rows.get(), 1.0f, row_of(op.out),
                              stride(op.out), rows(op) * op.top_k, op.width},
                             thread, threads);
      case Kind::kExperts:
        return experts(op, thread);
      case Kind::kCombine:
        return combine({row_of(op.x), stride(op.x), mixture_.places.get(), mixture_.weights.get(),
                        op.top_k, row_of(op.out), stride(op.out), row_of(op.out), stride(op.out),
                        rows(op), op.width},
                       thread, threads);
      default:
        return;
    }
  }

  void angles(const Op& op, int thread) {
    const Rotation& rotation = rotations_[op.table];
    rope_table({positions_.get(), rotation.frequencies, rotation.magnitude, cosines(op.table),
                sines(op.table), input_->token_count, rotation.pairs},
               thread, team_.threads());
  }

  void embed(const Op& op, int thread) {
    const Share share = share_of(input_->token_count, thread, team_.threads());
    for (int64_t row = share.begin; row < share.end; ++row) {
      float* out = row_of(op.out) + row * stride(op.out);
      const int64_t token = input_->tokens[row];
      if (op.matrix.panels) {
        matrix_row(op.matrix, token, op.scale, out);
        continue;
      }
      const Source table{op.weight, plan_.vocabulary, op.width, 1, op.stored};
      for (int64_t k = 0; k < op.width; ++k) {
        out[k] = stored_value(table, token * op.width + k) * op.scale;
      }
    }
  }

  void heads(const Op& op, int thread) {
    prepare_heads({row_of(op.x), stride(op.x), rows(op), op.heads,
                   static_cast<const float*>(op.weight), op.eps, cosines(op.table), sines(op.table),
                   rotations_[op.table].pairs, layer_of_pool(op.layer), plan_.pairs != 0, plan_.pool,
                   slots_.get()},
                  thread, team_.threads());
  }

  // DeepSeek's latent attention: what stands in the pool, and the queries' turned ends.
  void latent(const Op& op, int thread) {
    const Share share = share_of(rows(op), thread, team_.threads());
    const int64_t pairs = rotations_[op.table].pairs, dim = plan_.pool.head_dim;
    for (int64_t row = share.begin; row < share.end; ++row) {
      const float* cos = cosines(op.table) + row * pairs;
      const float* sin = sines(op.table) + row * pairs;
      float* vector = row_of(op.x) + row * stride(op.x);
      turn(vector + op.width, cos, sin, pairs);
      store_kv(vector, dim, plan_.pairs != 0, layer_of_pool(op.layer), slots_.get()[row]);
      for (int64_t head = 0; head < op.heads; ++head) {
        float* end = row_of(op.y) + row * stride(op.y) + head * op.x_step + op.x_at;
        turn(end, cos, sin, pairs);
        float* carried = row_of(op.out) + row * stride(op.out) + head * op.out_step;
        std::copy_n(end, 2 * pairs, carried + op.width);
      }
    }
  }

  void by_head(const Op& op, int thread) {
    const Share share = share_of(op.heads, thread, team_.threads());
    const Matrix* matrices = static_cast<const Matrix*>(op.weight);
    for (int64_t head = share.begin; head < share.end; ++head) {
      baton::linear({matrices[head], nullptr, row_of(op.x) + head * op.x_step, stride(op.x), nullptr, 0,
              row_of(op.out) + head * op.out_step, stride(op.out), rows(op)},
             0, 1, scratch_.get() + thread * scratch_floats_);
    }
  }

  void route(const Op& op, int thread) {
    const Routing& r = routing(op);
    baton::route({row_of(op.x), stride(op.x), rows(op), r.experts, r.top_k, r.scoring,
                  r.normalise != 0, r.scale, r.groups, r.top_groups, r.correction,
                  mixture_.chosen.get(), mixture_.weights.get()},
                 thread, team_.threads());
  }

  void experts(const Op& op, int thread) {
    const Matrix* matrices = static_cast<const Matrix*>(op.weight);
    const int32_t* starts = mixture_.starts.get();
    for (int64_t e = 0; e < op.heads; ++e) {
      const int64_t first = starts[e], count = starts[e + 1] - first;
      if (count == 0) continue;
      const float* bias = op.bias ? op.bias + e * matrices[e].outputs : nullptr;
      baton::linear({matrices[e], bias, row_of(op.x) + first * stride(op.x), stride(op.x), nullptr, 0,
              row_of(op.out) + first * stride(op.out), stride(op.out), count},
             thread, team_.threads(), scratch_.get() + thread * scratch_floats_);
    }
  }

  static const Routing& routing(const Op& op) { return *static_cast<const Routing*>(op.weight); }

  Attention attention(const Op& op) const {
    return {input_->sequences,
            input_->sequence_count,
            op.heads,
            op.width,
            op.window,
            op.scale,
            op.limit,
            static_cast<const float*>(op.weight),
            row_of(op.x),
            stride(op.x),
            layer_of_pool(op.layer),
            plan_.pool,
            plan_.pairs != 0,
            row_of(op.out),
            stride(op.out),
            scratch_.get(),
            partials_.get(),
            counters_.get()};
  }

  static bool is_logits(int32_t buffer) { return buffer < 0; }
  float* row_of(int32_t buffer) const {
    return is_logits(buffer) ? input_->logits : buffers_[buffer].get();
  }
  // An odd number of cache lines, lest the rows of a tile fall into the same few sets of the cache.
  int64_t stride(int32_t buffer) const {
    return is_logits(buffer) ? plan_.vocabulary : (whole_lines(widths_[buffer]) / kLine | 1) * kLine;
  }
  int64_t rows(const Op& op) const {
    return op.sampled ? input_->sampled_count : input_->token_count;
  }
  float* cosines(int32_t table) const { return angles_[table].get(); }
  float* sines(int32_t table) const {
    return angles_[table].get() + capacity_ * rotations_[table].pairs;
  }
  void* layer_of_pool(int32_t layer) const {
    const int64_t item = plan_.pairs ? sizeof(uint16_t) : sizeof(float);
    return static_cast<char*>(input_->pool) + layer * plan_.layer_stride * item;
  }

  const Plan plan_;
  Team team_;
  std::vector<Op> ops_;
  std::vector<char> gated_;  // Of each operation: is_gated().
  std::vector<std::atomic<int64_t>> taken_;  // Pieces of each operation of this step, so far.
  std::vector<int32_t> widths_, spreads_;
  std::vector<Rotation> rotations_;
  std::vector<Room<float>> buffers_, angles_;
  Room<float> scratch_, partials_;
  Room<uint16_t> rounded_;
  Room<int64_t> slots_;
  Room<int32_t> positions_, counters_;
  Mixture mixture_;
  int32_t most_experts_ = 0, most_chosen_ = 0;
  int64_t scratch_floats_ = 0, rounded_values_ = 0, capacity_ = 0;
  const StepInput* input_ = nullptr;
};

}  // namespace baton
