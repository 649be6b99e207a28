"""Mixtral (Jiang et al., 2024): Mistral with a mixture of experts in every layer."""

from baton.models.config_file import Fields
from baton.models.decoder_spec import DecoderSpec, ExpertNames, MoeSpec, RoutingSpec
from baton.models.families.parts import read_attention, read_mlp, read_window, stack

_NAMES = ExpertNames("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2")


def read_mixtral(config: Fields, max_length: int) -> DecoderSpec:
    """Read MixtralForCausalLM."""
    experts = config.integer("num_local_experts", 8)
    moe = MoeSpec(
        routing=RoutingSpec(
            experts, config.at_most("num_experts_per_tok", experts, 2), normalise=True
        ),
        intermediate=read_mlp(config).intermediate,
        names=_NAMES,
    )
    windows = read_window(config)
    return DecoderSpec(
        layers=stack(read_attention(config, max_length, theta=1e6), windows, [moe] * len(windows)),
        norm_eps=config.positive("rms_norm_eps", 1e-5),
        tie=config.flag("tie_word_embeddings", False),
    )
