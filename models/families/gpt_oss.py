"""GPT-OSS: attention sinks, windows that alternate, experts with biases and a clamped SwiGLU."""

from dataclasses import replace

from baton.models.config_file import Fields
from baton.models.decoder_spec import DecoderSpec, ExpertNames, MoeSpec, RoutingSpec
from baton.models.families.parts import read_attention, read_windows, stack

_NAMES = ExpertNames("mlp.router", "mlp.experts", stacked=True)


def read_gpt_oss(config: Fields, max_length: int) -> DecoderSpec:
    """Read GptOssForCausalLM."""
    config.choice("hidden_act", "silu", ("silu",))
    bias = config.flag("attention_bias", True)
    plain = read_attention(config, max_length, theta=150000.0, head_dim=64)
    attention = replace(plain, bias=bias, out_bias=bias, sinks=True)
    experts = config.integer("num_local_experts", 128)
    moe = MoeSpec(
        routing=RoutingSpec(
            experts,
            config.at_most("num_experts_per_tok", experts, 4),
            scoring="top_softmax",
            bias=True,
        ),
        intermediate=config.integer("intermediate_size"),
        names=_NAMES,
        swiglu_limits=(
            config.positive("swiglu_alpha", 1.702),
            config.positive("swiglu_limit", 7.0),
        ),
    )
    windows = read_windows(config, lambda layer: layer % 2 == 0, 128)
    return DecoderSpec(
        layers=stack(attention, windows, [moe] * len(windows)),
        norm_eps=config.positive("rms_norm_eps", 1e-5),
        tie=config.flag("tie_word_embeddings", False),
    )
