"""Configs as they are published, against the same ones as transformers 5 rewrites them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from baton.core.errors import InvalidConfig
from baton.core.kv_layout import KVLayout
from baton.models.spec import ARCHITECTURES, FAMILIES, ModelSpec, read_spec

COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}


def config(
    model_type: str, hidden: int, wide: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    [name] = [name for name, kind in ARCHITECTURES.items() if kind == model_type]
    sizes = {
        "architectures": [name],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    return COMMON | sizes | more


LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + i / 100 for i in range(48)],
    "long_factor": [1.0 + i for i in range(48)],
}
DEEPSEEK_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
LATENT = {
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "moe_layer_freq": 1,
}
GPT_OSS_YARN = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "rope_type": "yarn",
    "truncate": False,
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7B": config("llama", 4096, 11008, 32, 32, 32, max_position_embeddings=4096),
    "Mistral-7B-v0.1": config(
        "mistral", 4096, 14336, 32, 32, 8,
        max_position_embeddings=32768, rope_theta=10000.0, sliding_window=4096,
    ),
    "Qwen2.5-7B": config(
        "qwen2", 3584, 18944, 28, 28, 4,
        max_position_embeddings=131072, rope_theta=1e6,
        sliding_window=131072, use_sliding_window=False, max_window_layers=28,
    ),
    "Qwen2.5, long": config(
        "qwen2", 3584, 18944, 28, 28, 4,
        max_position_embeddings=32768, rope_theta=1e6, sliding_window=4096,
        use_sliding_window=True, max_window_layers=21,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    ),
    "Qwen3-8B": config(
        "qwen3", 4096, 12288, 36, 32, 8,
        head_dim=128, max_position_embeddings=40960, rope_theta=1000000, rope_scaling=None,
        attention_bias=False, sliding_window=None, use_sliding_window=False, max_window_layers=36,
    ),
    "Qwen3-30B-A3B": config(
        "qwen3_moe", 2048, 6144, 48, 32, 4,
        head_dim=128, max_position_embeddings=40960, rope_theta=1e6, decoder_sparse_step=1,
        mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True, num_experts=128,
        num_experts_per_tok=8, use_sliding_window=False, sliding_window=None,
    ),
    "Gemma-2-2B": config(
        "gemma2", 2304, 9216, 26, 8, 4,
        hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", head_dim=256,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, query_pre_attn_scalar=256,
        sliding_window=4096, max_position_embeddings=8192, rope_theta=10000.0,
        eos_token_id=[1, 107],
    ),
    "Gemma-3-1B": config(
        "gemma3_text", 1152, 6912, 26, 4, 1,
        hidden_activation="gelu_pytorch_tanh", head_dim=256, query_pre_attn_scalar=256,
        sliding_window=512, sliding_window_pattern=6, rope_theta=1000000,
        rope_local_base_freq=10000, rope_scaling={"factor": 8.0, "rope_type": "linear"},
        max_position_embeddings=32768, eos_token_id=[1, 106],
        attn_logit_softcapping=None, final_logit_softcapping=None,
    ),
    "Phi-3-mini-4k": config(
        "phi3", 3072, 8192, 32, 32, 32,
        max_position_embeddings=4096, original_max_position_embeddings=4096,
        rope_scaling=None, rope_theta=10000.0, sliding_window=2047,
    ),
    "Phi-3-mini-128k": config(
        "phi3", 3072, 8192, 32, 32, 32,
        max_position_embeddings=131072, original_max_position_embeddings=4096,
        rope_scaling=LONGROPE, rope_theta=10000.0, sliding_window=262144,
    ),
    "Phi-4-mini": config(
        "phi3", 3072, 8192, 32, 24, 8,
        max_position_embeddings=131072, original_max_position_embeddings=4096,
        rope_scaling=LONGROPE, rope_theta=10000.0, partial_rotary_factor=0.75,
        tie_word_embeddings=True,
    ),
    "Mixtral-8x7B": config(
        "mixtral", 4096, 14336, 32, 32, 8,
        max_position_embeddings=32768, rope_theta=1e6, sliding_window=None,
        num_local_experts=8, num_experts_per_tok=2,
    ),
    "DeepSeek-V2-Lite": config(
        "deepseek_v2", 2048, 10944, 27, 16, 16, **LATENT,
        first_k_dense_replace=1, moe_intermediate_size=1408, n_group=1, topk_group=1,
        n_routed_experts=64, n_shared_experts=2, norm_topk_prob=False, num_experts_per_tok=6,
        routed_scaling_factor=1.0, scoring_func="softmax", topk_method="greedy",
        rope_scaling=DEEPSEEK_YARN,
    ),
    "DeepSeek-V3, dequantised": config(
        "deepseek_v3", 7168, 18432, 61, 128, 128, **(LATENT | {"q_lora_rank": 1536}),
        first_k_dense_replace=3, moe_intermediate_size=2048, n_group=8, topk_group=4,
        n_routed_experts=256, n_shared_experts=1, norm_topk_prob=True, num_experts_per_tok=8,
        routed_scaling_factor=2.5, scoring_func="sigmoid", topk_method="noaux_tc",
        num_nextn_predict_layers=1, rope_scaling=DEEPSEEK_YARN | {"mscale": 1, "mscale_all_dim": 1},
    ),
    "gpt-oss-20b": config(
        "gpt_oss", 2880, 2880, 24, 64, 8,
        attention_bias=True, experts_per_token=4, head_dim=64, initial_context_length=4096,
        layer_types=["sliding_attention", "full_attention"] * 12, max_position_embeddings=131072,
        num_experts_per_tok=4, num_local_experts=32, rope_scaling=GPT_OSS_YARN,
        rope_theta=150000, sliding_window=128, swiglu_limit=7.0,
    ),
}  # fmt: skip


def write(folder: Path, fields: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_forms_of_a_config_say_the_same(tmp_path: Path, name: str) -> None:
    published = write(tmp_path / "published", PUBLISHED[name])
    AutoConfig.from_pretrained(published).save_pretrained(tmp_path / "rewritten")
    rewritten = json.loads((tmp_path / "rewritten" / "config.json").read_text())
    assert "rope_parameters" in rewritten
    assert "rope_scaling" not in rewritten
    spec = read_spec(published)
    assert read_spec(tmp_path / "rewritten") == spec
    assert spec.family == PUBLISHED[name]["model_type"]
    assert hash(spec) == hash(read_spec(published))


@pytest.fixture
def spec_of(tmp_path: Path) -> Callable[..., ModelSpec]:
    def spec_of(name: str, max_length: int | None = None, **changes: Any) -> ModelSpec:
        return read_spec(write(tmp_path, PUBLISHED[name] | changes), max_length=max_length)

    return spec_of


def test_every_family_is_published_here() -> None:
    assert {one["model_type"] for one in PUBLISHED.values()} == set(FAMILIES)
    assert set(ARCHITECTURES.values()) == set(FAMILIES)


def test_windows_lie_where_they_should(spec_of: Callable[..., ModelSpec]) -> None:
    def windows(name: str) -> list[int | None]:
        return [layer.attention.window for layer in spec_of(name).decoder.layers]

    assert windows("Mistral-7B-v0.1") == [4096] * 32
    assert windows("Qwen2.5-7B") == [None] * 28
    assert windows("Qwen2.5, long") == [None] * 21 + [4096] * 7
    assert windows("Gemma-2-2B") == [4096, None] * 13
    assert windows("Gemma-3-1B") == ([512] * 5 + [None]) * 4 + [512] * 2
    assert spec_of("Gemma-3-1B").windows == (512, None)
    assert windows("gpt-oss-20b") == [128, None] * 12


def test_gemma_3_turns_local_and_whole_layers_apart(spec_of: Callable[..., ModelSpec]) -> None:
    layers = spec_of("Gemma-3-1B").decoder.layers
    local, whole = layers[4].attention.rope, layers[5].attention.rope
    assert local.frequencies[64] == pytest.approx(10000.0**-0.5)
    assert whole.frequencies[64] == pytest.approx(1e6**-0.5 / 8)


def test_a_latent_layout_has_one_part(spec_of: Callable[..., ModelSpec]) -> None:
    spec = spec_of("DeepSeek-V3, dequantised")
    assert spec.kv_layout(16, "bfloat16") == KVLayout(61, 1, 16, 576, "bfloat16", parts=1)
    sparse = [hasattr(layer.mlp, "routing") for layer in spec.decoder.layers]
    assert sparse == [False] * 3 + [True] * 58
    sharpened = 192**-0.5 * (0.1 * math.log(40) + 1) ** 2
    assert spec.decoder.layers[0].attention.scale == pytest.approx(sharpened)


@pytest.mark.parametrize(("served", "length"), [(4096, 4096), (4097, 5000), (None, 5000)])
def test_longrope_is_chosen_by_the_longest_sequence_served(
    spec_of: Callable[..., ModelSpec], tmp_path: Path, served: int | None, length: int
) -> None:
    spec = spec_of("Phi-4-mini", max_length=served)
    rope = spec.decoder.layers[0].attention.rope
    theirs = Phi3RotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    cos, _ = theirs(torch.zeros(1), torch.tensor([[length - 1]]))
    torch.testing.assert_close(torch.tensor(rope.frequencies), theirs.inv_freq, rtol=3e-6, atol=0)
    assert rope.magnitude == pytest.approx(theirs.attention_scaling)
    assert cos.shape[-1] == 2 * len(rope.frequencies) == 96
    assert (spec.rope_digest() == spec_of("Phi-4-mini").rope_digest()) == (length == 5000)


@pytest.mark.parametrize(
    ("name", "changes", "field", "allowed"),
    [
        ("Mistral-7B-v0.1", {"layer_types": ["full_attention"] * 32}, "layer_types", "same window"),
        ("Mistral-7B-v0.1", {"sliding_window": 0}, "sliding_window", "at least 1"),
        ("Qwen3-8B", {"layer_types": ["linear_attention"] * 36}, "layer_types", "full_attention"),
        ("Qwen3-8B", {"layer_types": ["full_attention"]}, "layer_types", "36 words"),
        ("Qwen3-30B-A3B", {"num_experts_per_tok": 129}, "num_experts_per_tok", "at most 128"),
        ("Qwen3-30B-A3B", {"mlp_only_layers": 3}, "mlp_only_layers", "list of layers"),
        ("Gemma-2-2B", {"hidden_activation": "relu"}, "hidden_activation", "gelu_pytorch_tanh"),
        ("Gemma-2-2B", {"use_bidirectional_attention": True}, "use_bidirectional", "false"),
        ("Gemma-3-1B", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping", "none"),
        ("Phi-4-mini", {"rope_scaling": DEEPSEEK_YARN}, "type", "longrope"),
        ("Phi-4-mini", {"partial_rotary_factor": 1.5}, "partial_rotary_factor", "up to 1.0"),
        ("Phi-4-mini", {"partial_rotary_factor": 0.5}, "short_factor|long_factor", "32 numbers"),
        ("DeepSeek-V2-Lite", {"norm_topk_prob": True}, "norm_topk_prob", "false"),
        ("DeepSeek-V2-Lite", {"scoring_func": "sigmoid"}, "scoring_func", "softmax"),
        ("DeepSeek-V2-Lite", {"moe_layer_freq": 2}, "moe_layer_freq", "1"),
        ("DeepSeek-V3, dequantised", {"n_group": 7}, "n_group", "divisor of 256"),
        ("DeepSeek-V3, dequantised", {"topk_group": 9}, "topk_group", "at most 8"),
        (
            "DeepSeek-V3, dequantised",
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config",
            "bfloat16",
        ),
        (
            "Mixtral-8x7B",
            {"quantization_config": {"quant_method": "mxfp4"}},
            "quantization_config",
            "GPT-OSS",
        ),
    ],
)
def test_refuses_by_name(
    spec_of: Callable[..., ModelSpec], name: str, changes: dict[str, Any], field: str, allowed: str
) -> None:
    with pytest.raises(InvalidConfig) as error:
        spec_of(name, **changes)
    assert any(word in error.value.field for word in field.split("|"))
    assert allowed in error.value.allowed


def test_published_gpt_oss_may_be_in_mxfp4(spec_of: Callable[..., ModelSpec]) -> None:
    spec_of("gpt-oss-20b", quantization_config={"quant_method": "mxfp4"})
