"""Llama 2 and 3 (Touvron et al., 2023), and Mistral, which adds a sliding window."""

from dataclasses import replace

from baton.models.config_file import Fields
from baton.models.decoder_spec import DecoderSpec
from baton.models.families.parts import read_attention, read_mlp, read_window, stack


def read_llama(config: Fields, max_length: int) -> DecoderSpec:
    """Read LlamaForCausalLM."""
    bias = config.flag("attention_bias", False)
    attention = replace(read_attention(config, max_length), bias=bias, out_bias=bias)
    mlp = read_mlp(config, bias=config.flag("mlp_bias", False))
    layers = config.integer("num_hidden_layers")
    return DecoderSpec(
        layers=stack(attention, (None,) * layers, [mlp] * layers),
        norm_eps=config.positive("rms_norm_eps", 1e-6),
        tie=config.flag("tie_word_embeddings", False),
    )


def read_mistral(config: Fields, max_length: int) -> DecoderSpec:
    """Read MistralForCausalLM."""
    windows = read_window(config)
    return DecoderSpec(
        layers=stack(
            read_attention(config, max_length), windows, [read_mlp(config)] * len(windows)
        ),
        norm_eps=config.positive("rms_norm_eps", 1e-6),
        tie=config.flag("tie_word_embeddings", False),
    )
