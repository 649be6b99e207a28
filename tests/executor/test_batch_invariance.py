"""Bitwise the same logits for a request, whatever it is batched with; see kernels/native."""

from pathlib import Path
from typing import Any

import pytest
import torch

from baton.core.config import EngineConfig
from baton.core.errors import InvalidConfig
from baton.executor.instance import _executor
from baton.models.loader import load_model

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 40, "sliding_window": 20},
    "mixtral": {"num_local_experts": 4},
    "deepseek_v2": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 48,
        "q_lora_rank": None,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
}
TEXTS = [[(7 * i + 3 * j) % 900 for j in range(n)] for i, n in enumerate((1, 5, 16, 33, 70, 150))]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_same_bits_in_any_batch(
    write_model: Any, make_driver: Any, tmp_path: Path, family: str
) -> None:
    folder = write_model(tmp_path, family, **FAMILIES[family])
    driver = make_driver(load_model(folder, executor="native"), num_blocks=512)
    alone = [driver.logits([text], chunk=1000)[0] for text in TEXTS]
    for chunk in (1000, 16, 7, 1):
        together = driver.logits(TEXTS, chunk=chunk)
        assert all(map(torch.equal, together, alone)), f"in chunks of {chunk}"
    more = make_driver(load_model(folder, executor="native", threads=3), num_blocks=512)
    assert all(map(torch.equal, more.logits(TEXTS[::-1], chunk=32)[::-1], alone)), "3 threads"


def test_it_is_refused_where_it_cannot_be_had() -> None:
    assert _executor(EngineConfig(batch_invariant=True)) == "native"
    assert _executor(EngineConfig(executor="torch")) == "torch"
    with pytest.raises(InvalidConfig, match="batch_invariant: 'true'"):
        _executor(EngineConfig(batch_invariant=True, executor="torch"))
