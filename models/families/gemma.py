"""Gemma 2 and the text part of Gemma 3: windows that alternate, and a norm on either side."""

from dataclasses import replace

from baton.models.config_file import Fields
from baton.models.decoder_spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec
from baton.models.families.parts import FULL, SLIDING, read_heads, read_windows, stack
from baton.models.rope_spec import RopeRequest, RopeSpec, read_rope, rope_of


def read_gemma2(config: Fields, max_length: int) -> DecoderSpec:
    """Read Gemma2ForCausalLM: every other layer has a window, the first one among them."""
    windows = read_windows(config, lambda layer: layer % 2 == 0, 4096)
    head_dim = read_heads(config, 256).head_dim
    attention = replace(
        _attention(config, read_rope(config, RopeRequest(head_dim, max_length))),
        softcap=config.cap("attn_logit_softcapping", 50.0),
    )
    layers = stack(attention, windows, [_mlp(config)] * len(windows))
    return _decoder(config, layers, config.cap("final_logit_softcapping", 30.0))


def read_gemma3(config: Fields, max_length: int) -> DecoderSpec:
    """Read Gemma3ForCausalLM: five layers with a window to one without, each with its own rope."""
    every = config.integer("sliding_window_pattern", 6)
    windows = read_windows(config, lambda layer: (layer + 1) % every != 0, 4096)
    config.without("attn_logit_softcapping", None, "none")
    local, whole = _ropes(config, RopeRequest(read_heads(config, 256).head_dim, max_length))
    layers = tuple(
        layer
        for window in windows
        for layer in stack(
            replace(_attention(config, local if window else whole), qk_norm=True),
            (window,),
            [_mlp(config)],
        )
    )
    return _decoder(config, layers, config.cap("final_logit_softcapping", None))


def _ropes(config: Fields, wanted: RopeRequest) -> tuple[RopeSpec, RopeSpec]:
    """Return the rotations of layers with a window and of those without."""
    local, whole = replace(wanted, theta=10000.0), replace(wanted, theta=1e6)
    by_kind = config.section("rope_parameters")
    if by_kind is not None:
        none = Fields({}, by_kind.name("rope_type"))
        return (
            rope_of(none, by_kind.section(SLIDING) or none, local),
            rope_of(config, by_kind.section(FULL) or none, whole),
        )
    frequency = config.positive("rope_local_base_freq", local.theta)
    plain = Fields({"rope_theta": frequency}, "config.json")
    return rope_of(plain, plain, local), read_rope(config, whole)


def _attention(config: Fields, rope: RopeSpec) -> AttentionSpec:
    config.without("use_bidirectional_attention", False, "false: tokens see earlier ones only")
    sizes = read_heads(config, 256)
    bias = config.flag("attention_bias", False)
    return AttentionSpec(
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        rope=rope,
        scale=config.positive("query_pre_attn_scalar", 256.0) ** -0.5,
        bias=bias,
        out_bias=bias,
    )


def _mlp(config: Fields) -> MlpSpec:
    config.choice("hidden_activation", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
    return MlpSpec(config.integer("intermediate_size"), activation="gelu_tanh")


def _decoder(config: Fields, layers: tuple[LayerSpec, ...], softcap: float | None) -> DecoderSpec:
    return DecoderSpec(
        layers=tuple(replace(layer, sandwich=True) for layer in layers),
        norm_eps=config.positive("rms_norm_eps", 1e-6),
        unit_offset_norms=True,
        embedding_scale=config.integer("hidden_size") ** 0.5,
        logit_softcap=softcap,
        tie=config.flag("tie_word_embeddings", True),
    )
