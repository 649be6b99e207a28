"""Checkpoint folders that every test may use."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# On a busy machine one example may take any time; each test has pytest's own limit.
settings.register_profile(
    "baton", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("baton")

ROOT = Path(__file__).parents[1]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

STACKED = ("gpt_oss",)
"""Families whose experts lie with their inputs before their outputs."""

WriteLlama = Callable[..., Path]


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The trained demo model that Baton ships."""
    folder = ROOT / "demo_model" / "main"
    assert (folder / "config.json").is_file(), f"{folder} is missing: the repo ships it"
    return folder


@pytest.fixture(scope="session")
def write_llama() -> WriteLlama:
    """A function that writes a random GQA Llama as transformers writes it."""
    return _write_llama


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """A function that writes a random model of a family as transformers writes it."""
    return _write_model


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory, demo_model_dir: Path) -> Path:
    """A random Llama (4 layers, 4096 tokens) with the demo model's tokenizer: a complete folder."""
    folder = _write_llama(tmp_path_factory.mktemp("tiny") / "llama", vocab_size=4096)
    for name in TOKENIZER_FILES:
        shutil.copy(demo_model_dir / name, folder / name)
    return folder


def _write_llama(
    folder: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str = "1GB",
    **config: Any,
) -> Path:
    """Write config.json and safetensors; `config` overrides fields of LlamaConfig.

    The weights are wide and the norms and biases random, so that greedy output does not collapse
    into a loop and a norm that is left out shows.
    """
    sizes: dict[str, Any] = {
        "intermediate_size": 288,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    return _write_model(
        folder, "llama", seed=seed, dtype=dtype, max_shard_size=max_shard_size, **(sizes | config)
    )


def _write_model(
    folder: Path,
    model_type: str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str = "1GB",
    **config: Any,
) -> Path:
    """Write config.json and safetensors of a random model of any family, as transformers does."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **(sizes | config)), dtype=torch.float32
    )
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *_kept_buffers(model)]:
            if name.endswith("norm.weight"):
                middle = 0.0 if "gemma" in model_type else 1.0
                weight.uniform_(middle - 0.5, middle + 0.5, generator=random)
            elif weight.ndim == 1 or name.endswith("bias"):
                weight.normal_(0, 0.3, generator=random)
            elif "embed_tokens" in name:
                # Gemma's are scaled up: left wide, the next token would be the last one again.
                weight.normal_(0, 0.02 if "gemma" in model_type else 0.2, generator=random)
            else:
                fan_in = weight.shape[1 if model_type in STACKED and weight.ndim == 3 else -1]
                weight.normal_(0, 1.6 * fan_in**-0.5, generator=random)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def _kept_buffers(model: Any) -> list[tuple[str, Any]]:
    """Return the buffers that are weights: those that a checkpoint holds."""
    kept = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]
