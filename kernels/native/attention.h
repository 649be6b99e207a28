// Attention of a ragged batch over the paged KV pool, decodes and chunks of prompts alike.
//
// The queries of a sequence that share a KV head are (row, head) pairs; a tile of them goes over
// the keys it sees, tile by tile, with an online softmax (FlashAttention, Dao et al., 2022). Keys
// are gathered in spans of fixed size, and spans are put together in the order of the sequence, so
// that a long decode's spans may be computed by several threads without a change in any bit.
#pragma once

#include <algorithm>

#include "attention_columns.h"
#include "attention_float.h"
#include "attention_pairs.h"

namespace baton {

// Gathers what a unit's queries see of a span, numbered from the start of the sequence.
template <class Scratch>
static inline void attend_span(const Attention& job, const Unit& unit, int32_t span,
                               const Scratch& scratch, const Gathered& into) {
  std::fill_n(into.sums, whole_tiles(unit.queries) * sums_stride(job.value_dim), 0.0f);
  std::fill_n(into.highest, unit.queries, -kInfinity);
  std::fill_n(into.totals, unit.queries, 0.0f);
  const int32_t begin = std::max(unit.begin, span * kSpanKeys);
  const int32_t end = std::min(unit.end, (span + 1) * kSpanKeys);
  for (int32_t tile = begin / kTileKeys * kTileKeys; tile < end; tile += kTileKeys) {
    attend_tile(job, unit, tile, scratch, into);
  }
  finish_span(job, unit, scratch, into);
}

// ---- From spans to outputs

static inline void merge(const Gathered& into, const Gathered& span, int64_t queries,
                         int64_t stride) {
  for (int64_t query = 0; query < queries; ++query) {
    const float a = into.highest[query], b = span.highest[query];
    const float highest = b > a ? b : a;
    const float fade = fade_of(a, highest), gain = fade_of(b, highest);
    float* sums = into.sums + query * stride;
    const float* more = span.sums + query * stride;
    for (int64_t at = 0; at < stride; at += kWidth) {
      const Vec faded = load(sums + at) * fade;
      store(sums + at, load(more + at) * gain + faded);
    }
    const float faded = into.totals[query] * fade;
    into.totals[query] = span.totals[query] * gain + faded;
    into.highest[query] = highest;
  }
}

static inline void write_out(const Attention& job, const Unit& unit, const Gathered& all) {
  const int64_t stride = sums_stride(job.value_dim);
  for (int32_t query = 0; query < unit.queries; ++query) {
    const int32_t head = unit.kv_head * unit.group + (unit.first + query) % unit.group;
    float factor = 1.0f, total = all.totals[query];
    if (job.sinks) {
      const float before = all.highest[query], sink = job.sinks[head];
      const float highest = sink > before ? sink : before;
      factor = fade_of(before, highest);
      total = total * factor + fade_of(sink, highest);
    }
    factor /= total;
    const float* sums = all.sums + query * stride;
    float* out = job.out + (unit.sequence->row + unit.row(query)) * job.out_stride +
                 static_cast<int64_t>(head) * job.value_dim;
    for (int64_t at = 0; at < job.value_dim; at += kWidth) {
      const int lanes = static_cast<int>(std::min<int64_t>(kWidth, job.value_dim - at));
      store_lanes(out + at, load(sums + at) * factor, lanes);
    }
  }
}

template <class Scratch>
static inline void attend_whole(const Attention& job, const Unit& unit,
                                const Scratch& scratch) {
  take_queries(job, unit, scratch);
  attend_span(job, unit, unit.first_span(), scratch, scratch.all);
  for (int32_t span = 1; span < unit.spans(); ++span) {
    attend_span(job, unit, unit.first_span() + span, scratch, scratch.span);
    merge(scratch.all, scratch.span, unit.queries, sums_stride(job.value_dim));
  }
  write_out(job, unit, scratch.all);
}

// Computes one span of a split unit; who comes last puts all spans together.
template <class Scratch>
static inline void attend_part(const Attention& job, const Unit& unit, int32_t span,
                               float* partials, const Scratch& scratch) {
  const int64_t size = gathered_floats(unit.queries, job.value_dim);
  const auto part = [&](int32_t number) {
    return gathered_at(partials + number * size, unit.queries, job.value_dim);
  };
  take_queries(job, unit, scratch);
  attend_span(job, unit, unit.first_span() + span, scratch, part(span));
  int32_t* counter =
      job.counters + (unit.sequence - job.sequences) * job.shape.kv_heads + unit.kv_head;
  if (__atomic_add_fetch(counter, 1, __ATOMIC_ACQ_REL) < unit.spans()) return;
  __atomic_store_n(counter, 0, __ATOMIC_RELAXED);
  for (int32_t other = 1; other < unit.spans(); ++other) {
    merge(part(0), part(other), unit.queries, sums_stride(job.value_dim));
  }
  write_out(job, unit, part(0));
}

// Floats of scratch memory that each thread needs.
static inline int64_t attention_scratch(int64_t head_dim, int64_t value_dim, bool pairs) {
  if (!pairs) return FloatScratch(nullptr, head_dim, value_dim).floats;
  int64_t floats = PairScratch(nullptr, head_dim, value_dim).floats;
#if defined(BATON_AMX)
  floats = std::max(floats, TileScratch(nullptr, head_dim, value_dim).floats);
#endif
  return floats;
}

// Which pieces of the work are a thread's: dealt out by their cost, or, if there is much to do, taken
// by who is free first.
template <class Take>
class Turns {
 public:
  Turns(int64_t total, int thread, int threads, const Take& take)
      : share_(share_of(total, thread, threads)),
        take_(take),
        taken_(threads > 1 && total > kMuch),
        next_(taken_ ? take() : 0) {}

  // Pieces are asked for in order; the next is taken once `done` was called for one that is mine.
  bool mine(int64_t cost) {
    if (taken_) return piece_++ == next_;
    const int64_t middle = before_ + cost / 2;
    before_ += cost;
    return share_.begin <= middle && middle < share_.end;
  }

  void done() {
    if (taken_) next_ = take_();
  }

 private:
  static constexpr int64_t kMuch = 1 << 20;  // Some hundred microseconds: far more than it takes.

  const Share share_;
  const Take& take_;
  const bool taken_;
  int64_t next_, piece_ = 0, before_ = 0;
};

template <class Scratch, class Take>
static inline void attend_by(const Attention& job, int thread, int threads, const Take& take) {
  const int64_t dim = job.shape.head_dim;
  const int64_t floats = attention_scratch(dim, job.value_dim, job.pairs);
  Scratch scratch(job.scratch + thread * floats, dim, job.value_dim);
  scratch.clear(dim);
  const int64_t total = total_cost(job);
  Turns turns(total, thread, threads, take);
  float* partials = job.partials;
  for_units(job, [&](const Unit& unit) {
    if (!is_split(unit, total, threads)) {
      if (!turns.mine(unit.cost())) return;
      attend_whole(job, unit, scratch);
      return turns.done();
    }
    const int32_t spans = unit.spans();
    for (int32_t span = 0; span < spans; ++span) {
      const Share part = share_of(unit.cost(), span, spans);
      if (!turns.mine(part.end - part.begin)) continue;
      attend_part(job, unit, span, partials, scratch);
      turns.done();
    }
    partials += spans * gathered_floats(unit.queries, job.value_dim);
  });
}

// Not inlined, so that no arithmetic moves out of the part where small numbers are flushed.
template <class Take>
__attribute__((noinline)) static void attend_in_pairs(const Attention& job, int thread,
                                                      int threads, const Take& take) {
  const FlushDenormals flush;
#if defined(BATON_AMX)
  if (has_amx()) {
    const Tiles tiles;
    return attend_by<TileScratch>(job, thread, threads, take);
  }
#endif
  attend_by<PairScratch>(job, thread, threads, take);
}

// `take` counts from 0, for all threads together.
template <class Take>
static inline void attend(const Attention& job, int thread, int threads, const Take& take) {
  if (job.pairs) return attend_in_pairs(job, thread, threads, take);
  attend_by<FloatScratch>(job, thread, threads, take);
}

}  // namespace baton
