"""Qwen2 (biases on q, k, v), Qwen3 (norms of q and k instead) and its mixture of experts."""

from dataclasses import replace

from baton.core.errors import InvalidConfig
from baton.models.config_file import Fields
from baton.models.decoder_spec import (
    DecoderSpec,
    ExpertNames,
    MlpSpec,
    MoeSpec,
    RoutingSpec,
)
from baton.models.families.parts import Windows, read_attention, read_mlp, read_windows, stack


def read_qwen2(config: Fields, max_length: int) -> DecoderSpec:
    """Read Qwen2ForCausalLM."""
    attention = replace(read_attention(config, max_length), bias=True)
    windows = _windows(config)
    return DecoderSpec(
        layers=stack(attention, windows, [read_mlp(config)] * len(windows)),
        norm_eps=config.positive("rms_norm_eps", 1e-6),
        tie=config.flag("tie_word_embeddings", False),
    )


def read_qwen3(config: Fields, max_length: int) -> DecoderSpec:
    """Read Qwen3ForCausalLM."""
    return _read_qwen3(config, max_length, _windows(config), None)


def read_qwen3_moe(config: Fields, max_length: int) -> DecoderSpec:
    """Read Qwen3MoeForCausalLM: a sliding window, if there is one, is that of all layers."""
    layers = config.integer("num_hidden_layers")
    window = None
    if config.flag("use_sliding_window", False):
        window = config.integer("sliding_window", 4096)
    return _read_qwen3(config, max_length, (window,) * layers, _read_moe(config))


def _read_qwen3(
    config: Fields, max_length: int, windows: Windows, moe: MoeSpec | None
) -> DecoderSpec:
    bias = config.flag("attention_bias", False)
    plain = read_attention(config, max_length, head_dim=None if moe else 128)
    attention = replace(plain, bias=bias, out_bias=bias, qk_norm=True)
    dense = read_mlp(config)
    mlps: list[MlpSpec | MoeSpec] = [
        moe if moe and _is_sparse(config, layer) else dense for layer in range(len(windows))
    ]
    return DecoderSpec(
        layers=stack(attention, windows, mlps),
        norm_eps=config.positive("rms_norm_eps", 1e-6),
        tie=config.flag("tie_word_embeddings", False),
    )


def _windows(config: Fields) -> Windows:
    used = config.flag("use_sliding_window", False)
    first = config.integer("max_window_layers", 28, least=0)
    return read_windows(config, lambda layer: used and layer >= first, 4096 if used else None)


def _is_sparse(config: Fields, layer: int) -> bool:
    dense = config.value("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(one) is int for one in dense):
        raise InvalidConfig(config.name("mlp_only_layers"), dense, "a list of layers")
    return layer not in dense and (layer + 1) % config.integer("decoder_sparse_step", 1) == 0


def _read_moe(config: Fields) -> MoeSpec:
    field = "num_experts" if config.has("num_experts") else "num_local_experts"
    experts = config.integer(field, 128)
    return MoeSpec(
        routing=RoutingSpec(
            experts=experts,
            top_k=config.at_most("num_experts_per_tok", experts, 8),
            normalise=config.flag("norm_topk_prob", False),
        ),
        intermediate=config.integer("moe_intermediate_size", 768),
        names=ExpertNames(),
    )
