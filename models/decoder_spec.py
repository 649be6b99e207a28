"""What a decoder is made of: one frozen record per kind of part, whatever the family.

DecoderSpec ── LayerSpec ─┬─ AttentionSpec | LatentAttentionSpec
                          └─ MlpSpec | MoeSpec (with RoutingSpec and perhaps a shared MlpSpec)
"""

from dataclasses import dataclass

from baton.models.rope_spec import RopeSpec


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped-query attention with a K and a V per KV head."""

    heads: int
    kv_heads: int
    """`heads` is a multiple of it."""
    head_dim: int
    rope: RopeSpec
    scale: float
    """Of the scores."""
    bias: bool = False
    """Of the projections to q, k and v."""
    out_bias: bool = False
    qk_norm: bool = False
    """Each head of q and k is normalised before it is turned."""
    sinks: bool = False
    """Each head has a score that takes its share of the softmax and gives nothing."""
    softcap: float | None = None
    window: int | None = None
    """Tokens that a token sees at most, its own included."""


@dataclass(frozen=True, slots=True)
class LatentAttentionSpec:
    """Multi-head latent attention (DeepSeek-V2): one vector per token serves all heads."""

    heads: int
    query_rank: int | None
    """Width that queries are squeezed through, if they are."""
    kv_rank: int
    """Width of the latent from which keys and values are made."""
    nope_dim: int
    """Dimensions of a head's q and k that are not turned."""
    rope_dim: int
    value_dim: int
    rope: RopeSpec
    scale: float
    bias: bool
    interleaved: bool
    """On disk, turned dimensions stand pair by pair and not half by half."""
    window: None = None


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """A gated feed-forward layer."""

    intermediate: int
    activation: str = "silu"
    """Of the gate: silu or gelu_tanh."""
    bias: bool = False


@dataclass(frozen=True, slots=True)
class RoutingSpec:
    """How a token chooses its experts and their weights."""

    experts: int
    top_k: int
    scoring: str = "softmax"
    """softmax over all experts, sigmoid of each, or softmax over the chosen (top_softmax)."""
    normalise: bool = False
    """The chosen weights are made to sum to 1."""
    scale: float = 1.0
    """Of the weights, after that."""
    groups: int = 1
    top_groups: int = 1
    """A token's experts come from so many of the groups."""
    bias: bool = False
    correction: bool = False
    """A bias per expert that counts in the choice and not in the weight (DeepSeek-V3)."""


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Where a checkpoint keeps a layer's experts."""

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    stacked: bool = False
    """All experts in one tensor, gate and up interleaved, inputs before outputs (GPT-OSS)."""


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """A mixture of gated feed-forward experts."""

    routing: RoutingSpec
    intermediate: int
    """Of one expert."""
    names: ExpertNames
    swiglu_limits: tuple[float, float] | None = None
    """Alpha and limit of a clamped SwiGLU with biases; else plain SwiGLU without."""
    shared: MlpSpec | None = None
    """An expert that every token visits."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer."""

    attention: AttentionSpec | LatentAttentionSpec
    mlp: MlpSpec | MoeSpec
    sandwich: bool = False
    """Attention and feed-forward are normalised on their way out as well (Gemma)."""


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """All layers, and what the family does around them."""

    layers: tuple[LayerSpec, ...]
    norm_eps: float
    unit_offset_norms: bool = False
    """Norms multiply by 1 + weight (Gemma)."""
    embedding_scale: float = 1.0
    logit_softcap: float | None = None
    tie: bool = False
    """The output matrix is the embedding."""
    spare_layers: int = 0
    """Layers that checkpoints have after the last one, for other ends, and that are not read."""
