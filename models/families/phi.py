"""Phi-3 and Phi-4-mini: Llama with its matrices fused on disk and rotations of part of a head."""

from baton.models.config_file import Fields
from baton.models.decoder_spec import AttentionSpec, DecoderSpec
from baton.models.families.parts import read_heads, read_mlp, read_window, stack
from baton.models.rope_spec import RopeRequest, read_rope


def read_phi3(config: Fields, max_length: int) -> DecoderSpec:
    """Read Phi3ForCausalLM."""
    rope = config.section("rope_parameters") or config.section("rope_scaling")
    if rope is not None:  # what others mean by yarn is not what Phi-3 once meant by it
        kind = "rope_type" if rope.has("rope_type") else "type"
        rope.choice(kind, "default", ("default", "longrope", "su"))
    sizes = read_heads(config)
    attention = AttentionSpec(
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        rope=read_rope(config, RopeRequest(sizes.head_dim, max_length, partial=True)),
        scale=sizes.head_dim**-0.5,
    )
    windows = read_window(config)
    return DecoderSpec(
        layers=stack(attention, windows, [read_mlp(config)] * len(windows)),
        norm_eps=config.positive("rms_norm_eps", 1e-5),
        tie=config.flag("tie_word_embeddings", False),
    )
