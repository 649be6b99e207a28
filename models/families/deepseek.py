"""DeepSeek-V2 and V3: latent attention, dense layers first, then experts with shared ones."""

from baton.core.errors import InvalidConfig
from baton.models.config_file import Fields
from baton.models.decoder_spec import (
    DecoderSpec,
    ExpertNames,
    LatentAttentionSpec,
    LayerSpec,
    MlpSpec,
    MoeSpec,
    RoutingSpec,
)
from baton.models.families.parts import read_mlp
from baton.models.rope_spec import RopeRequest, read_rope, yarn_mscale


def read_deepseek_v2(config: Fields, max_length: int) -> DecoderSpec:
    """Read DeepseekV2ForCausalLM: softmax routing, groups by their best expert."""
    config.choice("scoring_func", "softmax", ("softmax",))
    config.without("norm_topk_prob", False, "false, as all published DeepSeek-V2 have it")
    method = config.choice("topk_method", "greedy", ("greedy", "group_limited_greedy"))
    routing = _routing(config, "softmax", grouped=method != "greedy")
    return _decoder(config, max_length, routing, first_sparse=0)


def read_deepseek_v3(config: Fields, max_length: int) -> DecoderSpec:
    """Read DeepseekV3ForCausalLM: sigmoid routing, a correction per expert, groups by their two."""
    config.choice("scoring_func", "sigmoid", ("sigmoid",))
    config.choice("topk_method", "noaux_tc", ("noaux_tc",))
    return _decoder(config, max_length, _routing(config, "sigmoid", grouped=True), first_sparse=3)


def _routing(config: Fields, scoring: str, *, grouped: bool) -> RoutingSpec:
    sigmoid = scoring == "sigmoid"
    experts = config.integer("n_routed_experts", 256 if sigmoid else 64)
    groups = config.integer("n_group", 8 if sigmoid else 1) if grouped else 1
    if experts % groups:
        raise InvalidConfig(config.name("n_group"), groups, f"a divisor of {experts} experts")
    if sigmoid and experts // groups < 2:
        raise InvalidConfig(config.name("n_group"), groups, f"at most {experts // 2}")
    top_groups = config.at_most("topk_group", groups, min(4, groups)) if grouped else 1
    within = experts // groups * top_groups
    return RoutingSpec(
        experts=experts,
        top_k=config.at_most("num_experts_per_tok", within, min(8, within)),
        scoring=scoring,
        normalise=sigmoid and config.flag("norm_topk_prob", True),
        scale=config.positive("routed_scaling_factor", 2.5 if sigmoid else 1.0),
        groups=groups,
        top_groups=top_groups,
        correction=sigmoid,
    )


def _decoder(
    config: Fields, max_length: int, routing: RoutingSpec, *, first_sparse: int
) -> DecoderSpec:
    if config.integer("moe_layer_freq", 1) != 1:
        raise InvalidConfig(config.name("moe_layer_freq"), config.value("moe_layer_freq"), "1")
    attention = _attention(config, max_length)
    dense = read_mlp(config, bias=config.flag("mlp_bias", False))
    width = config.integer("moe_intermediate_size")
    shared = config.integer("n_shared_experts", 1 if routing.correction else 2)
    moe = MoeSpec(routing, width, ExpertNames(), shared=MlpSpec(width * shared, bias=dense.bias))
    first_sparse = config.integer("first_k_dense_replace", first_sparse, least=0)
    layers = config.integer("num_hidden_layers")
    spare = "num_nextn_predict_layers"
    return DecoderSpec(
        layers=tuple(
            LayerSpec(attention, dense if layer < first_sparse else moe) for layer in range(layers)
        ),
        norm_eps=config.positive("rms_norm_eps", 1e-6),
        tie=config.flag("tie_word_embeddings", False),
        spare_layers=config.integer(spare, 0, least=0) if config.has(spare) else 0,
    )


def _attention(config: Fields, max_length: int) -> LatentAttentionSpec:
    nope, turned = config.integer("qk_nope_head_dim", 128), config.integer("qk_rope_head_dim", 64)
    if turned % 2:
        raise InvalidConfig(config.name("qk_rope_head_dim"), turned, "an even number")
    return LatentAttentionSpec(
        heads=config.integer("num_attention_heads"),
        query_rank=config.integer("q_lora_rank") if config.has("q_lora_rank") else None,
        kv_rank=config.integer("kv_lora_rank", 512),
        nope_dim=nope,
        rope_dim=turned,
        value_dim=config.integer("v_head_dim", 128),
        rope=read_rope(config, RopeRequest(turned, max_length)),
        scale=(nope + turned) ** -0.5 * _sharpening(config),
        bias=config.flag("attention_bias", False),
        interleaved=config.flag("rope_interleave", True),
    )


def _sharpening(config: Fields) -> float:
    """Return the factor of the scores in a lengthened context."""
    rope = config.section("rope_parameters") or config.section("rope_scaling")
    if rope is None or not rope.number("mscale_all_dim", 0.0):
        return 1.0
    return yarn_mscale(rope.positive("factor"), rope.positive("mscale_all_dim")) ** 2
