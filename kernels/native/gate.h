// Gates of feed-forward layers.
#pragma once

#include <cstdint>

#include "vec_math.h"

namespace baton {

enum class GateKind : int32_t {
  kSilu,          // SwiGLU (Shazeer, 2020): silu(gate) * up
  kGeluTanh,      // GeGLU: gelu(gate) * up, GELU by tanh
  kClampedSwiglu  // GPT-OSS: g * sigmoid(alpha * g) * (u + 1), g = min(gate, limit), |u| <= limit
};

struct Gate {
  GateKind kind;
  float alpha, limit;  // Of kClampedSwiglu.
};

// Calls body(function), where function(gate, up) is what the layer goes on with.
template <class Body>
static inline void by_gate(const Gate& gate, const Body& body) {
  switch (gate.kind) {
    case GateKind::kSilu:
      return body([](Vec g, Vec u) { return silu_of(g) * u; });
    case GateKind::kGeluTanh:
      return body([](Vec g, Vec u) { return gelu_of(g) * u; });
    case GateKind::kClampedSwiglu:
      return body([&](Vec g, Vec u) {
        g = smaller(g, splat(gate.limit));
        u = larger(smaller(u, splat(gate.limit)), splat(-gate.limit));
        return g * sigmoid_of(g * gate.alpha) * (u + 1.0f);
      });
  }
}

}  // namespace baton
