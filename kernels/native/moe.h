// A mixture of experts around its linear layers: who goes where, and what comes back.
//
//     route            each token's experts and weights, from the router's scores
//     group_pairs      (token, choice) pairs by expert, so that an expert's rows are in one piece
//     (gather, the experts' own layers on rows [starts[e], starts[e + 1]), both not here)
//     combine          each token's sum over its choices
//
// A token's sum goes by the order of its own choices, the best first, so that it does not depend on
// the rest of the batch.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "elementwise.h"

namespace baton {

// ---- Routing

enum class Scoring : int32_t {
  kSoftmax,     // over all experts
  kSigmoid,     // of each expert by itself (DeepSeek-V3)
  kTopSoftmax,  // over the chosen experts (GPT-OSS)
};

struct Route {
  const float* logits;  // [tokens, experts]
  int64_t logits_stride;
  int64_t tokens;
  int32_t experts, top_k;
  Scoring scoring;
  bool normalise;  // The chosen weights are made to sum to 1; not of kTopSoftmax.
  float scale;     // Of the weights, after that; not of kTopSoftmax.
  int32_t groups, top_groups;  // A token's experts come from so many groups of equal size.
  const float* correction;     // [experts] or null: counts in the choice and not in the weight.
  int32_t* chosen;             // [tokens, top_k], the best first
  float* weights;              // [tokens, top_k]
};

// Values and where they stood.
using Ranking = std::vector<std::pair<float, int32_t>>;

// Brings the `count` best of a ranking to its front, in order.
//
// Of equal values those come first that come first in torch.topk on a CPU, whose algorithm this is.
static inline void bring_best(Ranking& ranking, int32_t count) {
  const auto before = [](const auto& a, const auto& b) {
    return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
  };
  const auto begin = ranking.begin();
  if (static_cast<size_t>(count) * 64 <= ranking.size()) {
    std::partial_sort(begin, begin + count, ranking.end(), before);
    return;
  }
  std::nth_element(begin, begin + count - 1, ranking.end(), before);
  std::sort(begin, begin + count - 1, before);
}

static inline void rank(const float* values, int32_t count, Ranking& ranking) {
  ranking.resize(count);
  for (int32_t index = 0; index < count; ++index) ranking[index] = {values[index], index};
}

// values = e^value / sum of e^value
static inline void softmax(float* values, int32_t count) {
  const float highest = *std::max_element(values, values + count);
  float total = 0.0f;
  for (int32_t index = 0; index < count; ++index) {
    values[index] = std::exp(values[index] - highest);
    total += values[index];
  }
  for (int32_t index = 0; index < count; ++index) values[index] /= total;
}

// Sets the choice to -inf for experts that are in none of the best groups.
//
// A group is as good as its best expert, or, with a correction, as its two best together.
static inline void limit_to_groups(const Route& job, float* choice, Ranking& ranking) {
  const int32_t size = job.experts / job.groups;
  std::vector<float> quality(job.groups);
  for (int32_t group = 0; group < job.groups; ++group) {
    rank(choice + group * size, size, ranking);
    bring_best(ranking, job.correction ? 2 : 1);
    quality[group] = ranking[0].first + (job.correction ? ranking[1].first : 0.0f);
  }
  rank(quality.data(), job.groups, ranking);
  bring_best(ranking, job.top_groups);
  for (auto place = ranking.begin() + job.top_groups; place != ranking.end(); ++place) {
    std::fill_n(choice + place->second * size, size, -kInfinity);
  }
}

// What a thread needs to route one token after the other.
struct RoutingScratch {
  std::vector<float> scores, choice;
  Ranking ranking;
};

static inline void score(const Route& job, const float* logits, std::vector<float>& scores) {
  scores.assign(logits, logits + job.experts);
  if (job.scoring == Scoring::kSoftmax) softmax(scores.data(), job.experts);
  if (job.scoring == Scoring::kSigmoid) {
    for (float& value : scores) value = 1.0f / (1.0f + std::exp(-value));
  }
}

static inline void choose(const Route& job, RoutingScratch& scratch) {
  scratch.choice = scratch.scores;
  if (job.correction) {
    for (int32_t e = 0; e < job.experts; ++e) scratch.choice[e] += job.correction[e];
  }
  if (job.groups > 1) limit_to_groups(job, scratch.choice.data(), scratch.ranking);
  rank(scratch.choice.data(), job.experts, scratch.ranking);
  bring_best(scratch.ranking, job.top_k);
}

static inline void weigh(const Route& job, float* weights) {
  if (job.scoring == Scoring::kTopSoftmax) return softmax(weights, job.top_k);
  float total = 1.0f;
  if (job.normalise) {
    total = 0.0f;
    for (int32_t place = 0; place < job.top_k; ++place) total += weights[place];
  }
  for (int32_t place = 0; place < job.top_k; ++place) {
    weights[place] = weights[place] / total * job.scale;
  }
}

static inline void route(const Route& job, int thread, int threads) {
  RoutingScratch scratch;
  const Share share = share_of(job.tokens, thread, threads);
  for (int64_t token = share.begin; token < share.end; ++token) {
    score(job, job.logits + token * job.logits_stride, scratch.scores);
    choose(job, scratch);
    int32_t* chosen = job.chosen + token * job.top_k;
    float* weights = job.weights + token * job.top_k;
    for (int32_t place = 0; place < job.top_k; ++place) {
      chosen[place] = scratch.ranking[place].second;
      weights[place] = scratch.scores[chosen[place]];
    }
    weigh(job, weights);
  }
}

// ---- Pairs of (token, choice) by expert

struct GroupPairs {
  const int32_t* chosen;  // [tokens, top_k]
  int64_t tokens;
  int32_t experts, top_k;
  int32_t* starts;  // [experts + 1]: expert e has the rows [starts[e], starts[e + 1])
  int32_t* rows;    // [tokens * top_k]: the token of each row, for gather()
  int32_t* places;  // [tokens, top_k]: the row of each choice, for combine()
};

// A counting sort, by one thread: it is short beside the barrier that follows.
static inline void group_pairs(const GroupPairs& job, int thread, int) {
  if (thread != 0) return;
  const int64_t pairs = job.tokens * job.top_k;
  std::fill_n(job.starts, job.experts + 1, 0);
  for (int64_t pair = 0; pair < pairs; ++pair) ++job.starts[job.chosen[pair] + 1];
  for (int32_t e = 0; e < job.experts; ++e) job.starts[e + 1] += job.starts[e];
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int32_t row = job.starts[job.chosen[pair]]++;
    job.rows[row] = static_cast<int32_t>(pair / job.top_k);
    job.places[pair] = row;
  }
  for (int32_t e = job.experts; e > 0; --e) job.starts[e] = job.starts[e - 1];
  job.starts[0] = 0;
}

// ---- Sums

struct Combine {
  const float* x;  // [tokens * top_k, width]: what the experts made of each row
  int64_t x_stride;
  const int32_t* places;  // [tokens, top_k]
  const float* weights;   // [tokens, top_k]
  int32_t top_k;
  const float* shared;  // [tokens, width] or null: what all tokens get besides; may be out.
  int64_t shared_stride;
  float* out;  // [tokens, width]
  int64_t out_stride;
  int64_t tokens, width;
};

static inline void combine(const Combine& job, int thread, int threads) {
  const Share share = share_of(job.tokens, thread, threads);
  for (int64_t token = share.begin; token < share.end; ++token) {
    const int32_t* places = job.places + token * job.top_k;
    const float* weights = job.weights + token * job.top_k;
    const float* shared = job.shared ? job.shared + token * job.shared_stride : nullptr;
    float* out = job.out + token * job.out_stride;
    for_vectors(job.width, [&](int64_t at, int lanes) {
      Vec sum = shared ? load_lanes(shared + at, lanes) : Vec{};
      for (int32_t choice = 0; choice < job.top_k; ++choice) {
        sum = load_lanes(job.x + places[choice] * job.x_stride + at, lanes) * weights[choice] + sum;
      }
      store_lanes(out + at, sum, lanes);
    });
  }
}

}  // namespace baton
