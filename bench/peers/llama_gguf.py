"""Writes a Llama checkpoint of Hugging Face's layout as GGUF, without a vocabulary."""

import json
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors import safe_open

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def write(checkpoint: Path, target: Path, format_name: str) -> None:
    """Write all matrices as `format_name` (F32 or Q8_0), and norms as float32."""
    config = json.loads((checkpoint / "config.json").read_text())
    quantised = GGMLQuantizationType[format_name]
    writer = GGUFWriter(target, "llama")
    _add_config(writer, config)
    file = "model.safetensors"
    with safe_open(checkpoint / file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118, it is no mapping
            values = tensors.get_tensor(name).float().numpy()
            if ".q_proj" in name:
                values = interleaved(values, config["num_attention_heads"])
            elif ".k_proj" in name:
                values = interleaved(values, config["num_key_value_heads"])
            if values.ndim == 2 and quantised is not GGMLQuantizationType.F32:
                data = gguf.quants.quantize(values, quantised)
                writer.add_tensor(gguf_name(name), data, raw_dtype=quantised)
            else:
                writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder each head's rows: GGUF's rotary pairs are neighbours, Hugging Face's are halves."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def gguf_name(name: str) -> str:
    """Translate a tensor's name."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.weight"
    number, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{number}.{NAMES[part]}.weight"


def _add_config(writer: GGUFWriter, config: dict) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
