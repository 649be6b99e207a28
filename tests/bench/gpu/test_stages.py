"""The stages themselves, tiny, on the CPU: real models, real executor, a real second process."""

import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bench.gpu import campaign
from bench.gpu.campaign import STAGES, run_stages
from bench.gpu.drawn import DrawnCheckpoint, config_of, draw, shapes_of
from bench.gpu.executor import tables_of
from bench.gpu.floors import LLAMA_8B
from bench.gpu.records import Records, cases, figures, is_complete
from bench.gpu.scale import TINY
from bench.gpu.stage_run import StageRun
from bench.gpu.stages import correctness, decode, handover, prefill


def run(stage: ModuleType, tmp_path: Path) -> dict[str, Any]:
    """Run a stage in this process; return its figures, of which none may be missing."""
    tmp_path.mkdir(exist_ok=True)
    records = Records(tmp_path / "found.jsonl")
    stage.run(StageRun("one", TINY, records, time.perf_counter() + 1000))
    found = cases(records.read(), "one")
    assert found
    assert not [record["error"] for record in found.values() if "error" in record]
    return dict(figures(records.read(), "one"))


def test_logits_are_transformers(tmp_path):
    found = run(correctness, tmp_path)
    assert len(found) == len(TINY.checked)
    assert all(f["error"] < 1e-5 and f["same_best"] == 1 for f in found.values())


def test_a_wrong_model_is_found(tmp_path, monkeypatch):
    def other(config: Any, weights: Any) -> Any:
        name = "model.layers.1.post_attention_layernorm.weight"
        return real(config, weights | {name: weights[name] * 1.01})

    real = correctness.decoder
    monkeypatch.setattr(correctness, "decoder", other)
    records = Records(tmp_path / "found.jsonl")
    correctness.run(StageRun("one", TINY, records, time.perf_counter() + 1000))
    errors = [record.get("error", "") for record in cases(records.read(), "one").values()]
    assert len(errors) == len(TINY.checked)
    assert all("transformers' own" in error for error in errors)


def test_steps_and_prompts_run_through_the_executor(tmp_path):
    steps = run(decode, tmp_path / "decode")
    assert [(f["batch"], f["context"]) for f in steps.values()] == list(TINY.decode)
    assert all(f["step_s"] > 0 and f["distinct"] for f in steps.values())
    prompts = run(prefill, tmp_path / "prefill")
    assert [(f["tokens"], f["pieces"]) for f in prompts.values()] == [
        (24, False),
        (40, False),
        (24, True),
    ]


def test_two_processes_hand_over_and_have_the_tokens_of_one(tmp_path):
    found = run(handover, tmp_path)
    assert len(found) == 2
    assert all(f["identical"] for f in found.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_run_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "GRACE_S", 300.0)
    out = tmp_path / "found.jsonl"
    records = Records(out)
    run_stages(STAGES, records, out, "tiny", minutes=60)
    found = records.read()
    missing = [stage.name for stage in STAGES if not is_complete(found, stage.name)]
    assert not missing, [r for r in found if "error" in r or r.get("ended", "") != "complete"]


def test_sequences_share_blocks_only_where_the_pool_is_too_small():
    tables, distinct = tables_of(3, tokens=40, blocks=9)
    assert distinct
    assert sorted(block for table in tables for block in table) == list(range(9))
    tables, distinct = tables_of(3, tokens=40, blocks=7)
    assert not distinct
    lasts = [table[-1] for table in tables]
    assert len(set(lasts)) == 3, "each writes to a block of its own"
    assert not set(lasts) & {block for table in tables for block in table[:-1]}
    assert all(len(set(table)) == 3 for table in tables)


def test_drawn_weights_are_the_same_for_every_process():
    config = config_of(TINY.shape)
    first, again = (draw(config, torch.device("cpu"), torch.float32) for _ in range(2))
    assert all(first[name].equal(again[name]) for name in first)
    assert not first["lm_head.weight"].equal(
        draw(config, torch.device("cpu"), torch.float32, seed=1)["lm_head.weight"]
    )


def test_a_checkpoint_of_drawn_weights_has_all_of_a_model_and_cuts_it():
    config = config_of(LLAMA_8B, layers=1)
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for name, shape in shapes_of(config).items()
    }
    assert sum(w.numel() for w in weights.values()) == (
        LLAMA_8B.layer_weights + 2 * LLAMA_8B.head_weights + 3 * LLAMA_8B.hidden
    )
    checkpoint = DrawnCheckpoint(weights)
    assert checkpoint.take("lm_head.weight", 128256, 4096).shape == (128256, 4096)
    cut = checkpoint.take("lm_head.weight", 128256, 4096, cut=(slice(0, 16),))
    assert cut.shape == (16, 4096)
