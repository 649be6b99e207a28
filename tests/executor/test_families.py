"""Every family of models gives, token for token, what transformers gives in float32."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from baton.models.loader import Model, load_model

LENGTHS = (5, 33, 90)
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 96}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
SHARDED = {"max_shard_size": "300KB"}
GEMMA = {"head_dim": 40, "sliding_window": 20, "query_pre_attn_scalar": 24}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": 24, "head_dim": 48}),
    "mistral, no window, yarn": (
        "mistral",
        {"sliding_window": None, "rope_parameters": YARN, "tie_word_embeddings": True},
    ),
    "llama, dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0}},
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True} | SHARDED),
    "qwen2, windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 48, "tie_word_embeddings": True} | SHARDED),
    "gemma 2": ("gemma2", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 0.5}),
    "gemma 3": (
        "gemma3_text",
        GEMMA | {"rope_parameters": TWO_ROPES, "layer_types": ALTERNATING} | SHARDED,
    ),
    "phi-3": ("phi3", {"sliding_window": 31}),
    "phi-4-mini, part of a head": (
        "phi3",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0 + i / 8 for i in range(12)],
                "long_factor": [2.0 + i for i in range(12)],
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
            },
            "original_max_position_embeddings": 1024,
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": 40} | SHARDED),
    "qwen3 moe": (
        "qwen3_moe",
        EXPERTS | {"num_experts": 8, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "deepseek-v2-lite": ("deepseek_v2", LATENT | EXPERTS | {"q_lora_rank": None}),
    "deepseek-v2": (
        "deepseek_v2",
        LATENT
        | EXPERTS
        | {
            "q_lora_rank": 32,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
        },
    ),
    "deepseek-v3": (
        "deepseek_v3",
        LATENT
        | EXPERTS
        | {
            "q_lora_rank": 32,
            "n_group": 4,
            "topk_group": 2,
            "attention_bias": True,
            "rope_parameters": YARN | {"mscale": 1.3, "mscale_all_dim": 0.8},
        }
        | SHARDED,
    ),
    "gpt-oss": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 32,
            "sliding_window": 18,
            "swiglu_limit": 1.1,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
}


@pytest.fixture(scope="module", params=list(CASES))
def family(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    write_model: Callable[..., Path],
    make_reference: Callable[..., Any],
) -> tuple[Path, Any]:
    model_type, config = CASES[request.param]
    folder = write_model(tmp_path_factory.mktemp("family") / model_type, model_type, **config)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == ("max_shard_size" in config)
    return folder, make_reference(folder, LENGTHS)


@pytest.fixture(scope="module")
def case(family: tuple[Path, Any], executor: str) -> tuple[Model, Any]:
    folder, reference = family
    return load_model(folder, executor=executor), reference


def test_the_reference_says_something(case: tuple[Model, Any]) -> None:
    """Outputs that loop would hide mistakes."""
    assert sum(len(set(output)) for output in case[1].outputs) > 3 * 10


@pytest.mark.parametrize(("block_size", "chunk"), [(8, 1000), (16, 21)])
def test_logits_of_a_ragged_batch(
    case: tuple[Model, Any], make_driver: Any, block_size: int, chunk: int
) -> None:
    model, reference = case
    texts = [p + o for p, o in zip(reference.prompts, reference.outputs, strict=True)]
    for text, found in zip(
        texts, make_driver(model, block_size=block_size).logits(texts, chunk=chunk), strict=True
    ):
        expected = reference.logits(text)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(
            found.log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=2e-4
        )


def test_greedy_tokens_together_and_alone(case: tuple[Model, Any], make_driver: Any) -> None:
    model, reference = case
    assert make_driver(model).generate(reference.prompts, chunk=24) == reference.outputs
    longest = make_driver(model, block_size=8).generate(reference.prompts[-1:], chunk=1000)
    assert longest == reference.outputs[-1:]


@pytest.mark.parametrize("name", ["gemma 2", "qwen3 moe", "deepseek-v3", "gpt-oss"])
def test_computes_in_half_precision(
    tmp_path: Path,
    write_model: Callable[..., Path],
    make_driver: Any,
    make_reference: Any,
    name: str,
) -> None:
    """Roughly: a router's choice between two experts may turn on a rounding."""
    model_type, config = CASES[name]
    folder = write_model(tmp_path / model_type, model_type, **(config | {"dtype": "bfloat16"}))
    reference = make_reference(folder, ())
    model, text = load_model(folder, dtype="bfloat16"), [(37 * i) % 1000 for i in range(70)]
    found, expected = make_driver(model).logits([text], chunk=40)[0], reference.logits(text)
    off = (found - expected).abs().mean() / expected.abs().mean()
    assert 1e-4 < off < 0.25


def test_longrope_beyond_the_first_length(
    tmp_path: Path, write_model: Callable[..., Path], make_driver: Any, make_reference: Any
) -> None:
    """Prompts that are longer than the short form's reach, as transformers switches by length."""
    config = CASES["phi-4-mini, part of a head"][1] | {"original_max_position_embeddings": 40}
    folder = write_model(tmp_path / "phi3", "phi3", **config)
    reference, model = make_reference(folder, (41, 90)), load_model(folder)
    assert make_driver(model).generate(reference.prompts, chunk=16) == reference.outputs
    short = make_reference(folder, (5,))
    texts = [(short.prompts[0] + short.outputs[0])[:40]]
    found = make_driver(load_model(folder, max_length=40)).logits(texts, chunk=16)[0]
    torch.testing.assert_close(found, short.logits(texts[0]), rtol=0, atol=1e-4)


def test_rope_interleaved_or_not(
    tmp_path: Path, write_model: Callable[..., Path], make_driver: Any, make_reference: Any
) -> None:
    config = CASES["deepseek-v3"][1] | {"rope_interleave": False}
    folder = write_model(tmp_path / "deepseek", "deepseek_v3", **config)
    reference = make_reference(folder, LENGTHS[:2])
    outputs = make_driver(load_model(folder)).generate(reference.prompts, chunk=16)
    assert outputs == reference.outputs


def test_gpt_oss_in_its_published_format(
    tmp_path: Path, write_model: Callable[..., Path], make_driver: Any
) -> None:
    """Experts in MXFP4 compute what their values in floats compute."""
    config = CASES["gpt-oss"][1]
    folder = write_model(tmp_path / "gpt", "gpt_oss", **config)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    packed: dict[str, torch.Tensor] = {}
    random = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, rows = tensors.pop(name).shape
        shape = (experts, rows, width // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=random, dtype=torch.uint8)
        scales = torch.randint(122, 126, shape, generator=random, dtype=torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(tensors, file)
    prompts = [[7, 8, 9] * 11, [5]]
    expected = make_driver(load_model(folder)).generate(prompts)
    unpacked = {name: one for name, one in tensors.items() if f"{name}_blocks" not in packed}
    save_file(unpacked | packed, file)
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(settings))
    assert make_driver(load_model(folder)).generate(prompts) == expected
