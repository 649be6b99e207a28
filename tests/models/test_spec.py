"""What read_spec reads from both forms of config.json, and what it refuses by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from baton.core.errors import InvalidConfig
from baton.core.kv_layout import KVLayout
from baton.models.decoder_spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec
from baton.models.spec import ModelSpec, read_spec

PUBLISHED: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA3 = PUBLISHED["rope_scaling"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A function that writes the published config with some fields changed or (None) left out."""

    def write(generation: dict[str, Any] | None = None, **changes: Any) -> Path:
        config = {k: v for k, v in (PUBLISHED | changes).items() if v is not None}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return tmp_path

    return write


def test_reads_every_field_of_a_published_config(write: Write) -> None:
    spec = read_spec(write())
    rope = spec.decoder.layers[0].attention.rope
    attention = AttentionSpec(heads=32, kv_heads=8, head_dim=64, rope=rope, scale=64**-0.5)
    assert spec == ModelSpec(
        family="llama",
        decoder=DecoderSpec((LayerSpec(attention, MlpSpec(8192)),) * 16, 1e-5, tie=True),
        hidden=2048,
        vocab_size=128256,
        max_position=131072,
        eos_token_ids=(128009,),
        dtype="bfloat16",
    )
    assert (spec.layers, spec.windows) == (16, (None,))
    assert spec.kv_layout(32, "float16") == KVLayout(16, 8, 32, 64, "float16")


def test_the_form_of_transformers_5_says_the_same(write: Write, tmp_path: Path) -> None:
    published = read_spec(write())
    LlamaConfig(**PUBLISHED).save_pretrained(tmp_path)
    rewritten = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in rewritten
    assert "rope_theta" not in rewritten
    rewritten["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(rewritten))
    assert read_spec(tmp_path) == published


def test_defaults_of_an_old_config(write: Write) -> None:
    spec = read_spec(
        write(
            num_key_value_heads=None,
            rope_scaling=None,
            rope_theta=None,
            torch_dtype=None,
            architectures=None,
            eos_token_id=None,
            tie_word_embeddings=None,
        )
    )
    attention = spec.decoder.layers[0].attention
    assert isinstance(attention, AttentionSpec)
    assert (attention.kv_heads, spec.dtype) == (32, "float32")
    assert attention.rope.frequencies[16] == pytest.approx(10000.0 ** (-32 / 64))
    assert (spec.eos_token_ids, spec.decoder.tie) == ((), False)


def test_eos_comes_from_the_generation_config_first(write: Write) -> None:
    assert read_spec(write({"eos_token_id": [128001, 128009]})).eos_token_ids == (128001, 128009)
    assert read_spec(write({"temperature": 0.6})).eos_token_ids == (128009,)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"type": "linear", "factor": 4.0},
        {"rope_type": "linear", "factor": 2.5},
        LLAMA3,
        LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 256},
        {"rope_type": "dynamic", "factor": 4.0},
        YARN,
        YARN | {"attention_factor": 1.7, "beta_fast": 20, "beta_slow": 2, "truncate": False},
        YARN | {"mscale": 1.2, "mscale_all_dim": 0.7},
        YARN | {"mscale": 1.2, "mscale_all_dim": 0},
    ],
)
def test_frequencies_are_those_of_transformers(write: Write, scaling: dict[str, Any]) -> None:
    rope = read_spec(write(rope_scaling=scaling)).decoder.layers[0].attention.rope
    fields = {"rope_scaling": scaling} if scaling else {"rope_scaling": None}
    expected = LlamaRotaryEmbedding(LlamaConfig(**(PUBLISHED | fields)))
    frequencies = torch.tensor(rope.frequencies)
    torch.testing.assert_close(frequencies, expected.inv_freq, rtol=3e-6, atol=0)
    assert rope.magnitude == pytest.approx(expected.attention_scaling)


@pytest.mark.parametrize(
    ("changes", "field", "allowed"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures", "LlamaForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "architectures", "LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act", "silu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config", "float32"),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 4.0}}, "rope_type", "linear, llama3"),
        ({"rope_scaling": YARN | {"factor": "4"}}, "factor", "over 0"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor", "over 0"),
        ({"rope_scaling": {"type": "linear"}}, "factor", "over 0"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor", "over low"),
        ({"rope_scaling": "linear"}, "rope_scaling", "object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor", "1.0"),
        ({"rope_theta": -1, "rope_scaling": None}, "rope_theta", "over 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers", "at least 1"),
        ({"num_hidden_layers": None}, "num_hidden_layers", "at least 1"),
        ({"vocab_size": "many"}, "vocab_size", "whole number"),
        ({"num_attention_heads": True}, "num_attention_heads", "whole number"),
        ({"num_key_value_heads": 5}, "num_key_value_heads", "divisor of 32"),
        ({"hidden_size": 2049}, "hidden_size", "multiple of 32"),
        ({"head_dim": 63}, "head_dim", "even"),
        ({"rms_norm_eps": 0}, "rms_norm_eps", "over 0"),
        ({"torch_dtype": "int8"}, "torch_dtype", "bfloat16"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings", "true or false"),
        ({"eos_token_id": 200000}, "eos_token_id", "128255"),
        ({"eos_token_id": [1, None]}, "eos_token_id", "token ids"),
    ],
)
def test_refuses_by_name(write: Write, changes: dict[str, Any], field: str, allowed: str) -> None:
    with pytest.raises(InvalidConfig) as error:
        read_spec(write(**changes))
    assert error.value.field.startswith("config.json: ")
    assert error.value.field.endswith(field)
    assert allowed in error.value.allowed


def test_refuses_a_folder_that_lacks_the_file_or_is_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"model_dir.*config\.json"):
        read_spec(tmp_path)
    with pytest.raises(InvalidConfig, match=r"model_dir.*checkpoint folder"):
        read_spec(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_refuses_a_config_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidConfig, match=r"config\.json"):
        read_spec(tmp_path)
