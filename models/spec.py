"""What a checkpoint folder says of its model, read and checked once."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.core.errors import InvalidConfig
from baton.core.kv_layout import ITEM_BYTES, KVLayout
from baton.models.config_file import Fields, read_json
from baton.models.decoder_spec import AttentionSpec, DecoderSpec
from baton.models.families.deepseek import read_deepseek_v2, read_deepseek_v3
from baton.models.families.gemma import read_gemma2, read_gemma3
from baton.models.families.gpt_oss import read_gpt_oss
from baton.models.families.llama import read_llama, read_mistral
from baton.models.families.mixtral import read_mixtral
from baton.models.families.phi import read_phi3
from baton.models.families.qwen import read_qwen2, read_qwen3, read_qwen3_moe

FAMILIES: dict[str, Callable[[Fields, int], DecoderSpec]] = {
    "llama": read_llama,
    "mistral": read_mistral,
    "qwen2": read_qwen2,
    "qwen3": read_qwen3,
    "qwen3_moe": read_qwen3_moe,
    "gemma2": read_gemma2,
    "gemma3_text": read_gemma3,
    "phi3": read_phi3,
    "mixtral": read_mixtral,
    "deepseek_v2": read_deepseek_v2,
    "deepseek_v3": read_deepseek_v3,
    "gpt_oss": read_gpt_oss,
}
"""The families that Baton computes, by `model_type`."""

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Phi3ForCausalLM": "phi3",
    "MixtralForCausalLM": "mixtral",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "GptOssForCausalLM": "gpt_oss",
}
"""Their names in `architectures`."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The sizes and switches of one model; nothing of where it lies or what it is called."""

    family: str
    """A key of FAMILIES."""
    decoder: DecoderSpec
    hidden: int
    vocab_size: int
    max_position: int
    """Tokens of a sequence at most, prompt and output together."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a text; may be empty."""
    dtype: str
    """Of the weights on disk as the config says it, a key of ITEM_BYTES."""

    @property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.decoder.layers)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding windows that layers have, each once; None for no window."""
        return tuple(dict.fromkeys(layer.attention.window for layer in self.decoder.layers))

    def kv_layout(self, block_size: int, dtype: str) -> KVLayout:
        """Return the layout of the model's KV in blocks of `block_size` tokens of `dtype`."""
        attention = self.decoder.layers[0].attention
        if isinstance(attention, AttentionSpec):
            parts, kv_heads, dims = 2, attention.kv_heads, attention.head_dim
        else:
            parts, kv_heads, dims = 1, 1, attention.kv_rank + attention.rope_dim
        return KVLayout(self.layers, kv_heads, block_size, dims, dtype, parts)

    def rope_digest(self) -> str:
        """Return 16 hex digits that name all layers' rotations."""
        digests = [layer.attention.rope.digest() for layer in self.decoder.layers]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]


def read_spec(model_dir: Path, *, max_length: int | None = None) -> ModelSpec:
    """Read and check config.json and generation_config.json.

    `max_length` is the tokens that a sequence may have where the model is served; some rotations
    depend on it. Raises InvalidConfig that names the file or field: no such folder or file, an
    architecture or a feature that is not supported, a value out of range, or sizes that do not
    fit each other.
    """
    config = Fields(read_json(model_dir, "config.json"), "config.json")
    family = _family(config)
    _check_quantisation(config, family)
    vocab_size = config.integer("vocab_size")
    max_position = config.integer("max_position_embeddings", 2048, least=2)
    return ModelSpec(
        family=family,
        hidden=config.integer("hidden_size"),
        vocab_size=vocab_size,
        max_position=max_position,
        eos_token_ids=_eos_token_ids(model_dir, config, vocab_size),
        dtype=_dtype(config),
        decoder=FAMILIES[family](config, min(max_length or max_position, max_position)),
    )


def _family(config: Fields) -> str:
    named = config.value("architectures")
    if named is None and (kind := config.value("model_type")) in FAMILIES:
        return str(kind)
    for architecture in named if isinstance(named, list) else []:
        if str(architecture) in ARCHITECTURES:
            return ARCHITECTURES[str(architecture)]
    raise InvalidConfig(config.name("architectures"), named, ", ".join(ARCHITECTURES))


def _check_quantisation(config: Fields, family: str) -> None:
    section = config.section("quantization_config")
    if section is None or (family == "gpt_oss" and section.value("quant_method") == "mxfp4"):
        return
    allowed = "none: weights in float32, bfloat16 or float16, or GPT-OSS in mxfp4"
    method = section.value("quant_method") or config.value("quantization_config")
    raise InvalidConfig(config.name("quantization_config"), method, allowed)


def _dtype(config: Fields) -> str:
    field = "dtype" if config.has("dtype") else "torch_dtype"
    return config.choice(field, "float32", ITEM_BYTES)


def _eos_token_ids(model_dir: Path, config: Fields, vocab_size: int) -> tuple[int, ...]:
    """Return the EOS tokens: those of generation_config.json where it names any."""
    source = config
    if (model_dir / "generation_config.json").is_file():
        generation = read_json(model_dir, "generation_config.json")
        if generation.get("eos_token_id") is not None:
            source = Fields(generation, "generation_config.json")
    value: Any = source.value("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise InvalidConfig(
            source.name("eos_token_id"), value, f"token ids from 0 to {vocab_size - 1}"
        )
    return tuple(dict.fromkeys(ids))
