// The native operations as the tests call them: each by a team of threads that is started for it.
#include <atomic>
#include <thread>
#include <vector>

#include "attention.h"
#include "elementwise.h"
#include "moe.h"

using namespace baton;

namespace {

template <class Call>
void by_team(int threads, const Call& call) {
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(call, thread);
  call(0);
  for (std::thread& other : others) other.join();
}

}  // namespace

#define OPERATION(name, Job, function) \
  extern "C" void name(const Job* job, int threads) { \
    by_team(threads, [=](int thread) { function(*job, thread, threads); }); \
  }

OPERATION(test_rms_norm, RmsNorm, rms_norm)
OPERATION(test_rope_table, RopeTable, rope_table)
OPERATION(test_place_tokens, PlaceTokens, place_tokens)
OPERATION(test_prepare_heads, PrepareHeads, prepare_heads)
OPERATION(test_gate_mul, GateMul, gate_mul)
OPERATION(test_add, Add, add)
OPERATION(test_softcap, Softcap, softcap)
OPERATION(test_gather_floats, Gather<float>, gather)
OPERATION(test_gather_bf16, Gather<Bf16>, gather)
OPERATION(test_route, Route, route)
OPERATION(test_group_pairs, GroupPairs, group_pairs)
OPERATION(test_combine, Combine, combine)

extern "C" void test_attend(const Attention* job, int threads) {
  std::atomic<int64_t> taken{0};
  const auto take = [&taken] { return taken.fetch_add(1); };
  by_team(threads, [&](int thread) { attend(*job, thread, threads, take); });
}

extern "C" int64_t test_attention_scratch(int64_t head_dim, int64_t value_dim, bool pairs) {
  return attention_scratch(head_dim, value_dim, pairs);
}

extern "C" int64_t test_attention_partials(const Attention* job, int threads) {
  return attention_partials(*job, threads);
}

extern "C" void test_narrow(const float* x, int64_t count, uint16_t* out) {
  narrow_some(x, count, out);
}

extern "C" void test_functions(const float* x, float* exps, float* tanhs, float* below, int64_t count) {
  for_vectors(count, [&](int64_t at, int lanes) {
    const Vec value = load_lanes(x + at, lanes);
    store_lanes(exps + at, exp_of(value), lanes);
    store_lanes(tanhs + at, tanh_of(value), lanes);
    store_lanes(below + at, exp_below(value), lanes);
  });
}
