"""Models on meshes of real processes give what one rank gives: logits, greedy tokens and KV."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from baton.core.errors import InvalidConfig
from baton.models.loader import load_model
from baton.models.share import Share
from baton.parallel.expert_placement import Placement
from baton.parallel.group import Ranks, SoloGroup
from baton.parallel.mesh import Mesh
from tests.executor.rank_driver import BLOCKS_EACH, Job, Outcome, alone, prompts_of, run

VOCABULARY = 203
"""Odd, so that ranks have parts of different sizes."""
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96}
SOFTCAPPED = {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 24}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", {"attention_bias": True, "tie_word_embeddings": True, "mlp_bias": True}),
    "dense, fused on disk": ("phi3", {}),
    "dense, windows": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 20,
            "attn_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 24,
        },
    ),
    "experts": (
        "qwen3_moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    ),
    "experts, sinks": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 18},
    ),
    "latent": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 24,
            "q_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "attention_bias": True,
        },
    ),
}
RUNS = [
    ("dense", Mesh(tp=2)),
    ("dense", Mesh(tp=4)),  # with 2 KV heads
    ("dense", Mesh(pp=2)),
    ("dense", Mesh(pp=2, tp=2)),
    ("dense", Mesh(cp=2)),
    ("dense", Mesh(dp=2, tp=2)),
    ("dense, fused on disk", Mesh(tp=2)),
    ("dense, windows", Mesh(tp=2)),
    ("dense, windows", Mesh(cp=2, tp=2)),
    ("experts", Mesh(tp=2)),
    ("experts", Mesh(ep=2)),
    ("experts", Mesh(ep=3)),
    ("experts", Mesh(ep=2, tp=2)),
    ("experts", Mesh(dp=2, ep=2)),
    ("experts, sinks", Mesh(ep=2)),
    ("experts, sinks", Mesh(cp=2, tp=2)),
    ("latent", Mesh(tp=2)),
    ("latent", Mesh(pp=2, ep=2)),
    ("latent", Mesh(cp=2)),
    ("latent", Mesh(pp=2, ep=2, tp=2)),
]
LENGTHS = (5, 1, 90, 33)
OUTPUT = 12

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, write_model: Write) -> dict[str, Job]:
    folder = tmp_path_factory.mktemp("models")
    prompts = prompts_of(LENGTHS, VOCABULARY)
    return {
        name: Job(write_model(folder / name, kind, **(SMALL | config)), prompts, OUTPUT)
        for name, (kind, config) in MODELS.items()
    }


@pytest.fixture(scope="module")
def references(jobs: dict[str, Job]) -> dict[str, Outcome]:
    return {name: alone(job) for name, job in jobs.items()}


def test_the_references_say_something(references: dict[str, Outcome]) -> None:
    """Outputs that loop would hide mistakes."""
    for name, reference in references.items():
        assert sum(len(set(tokens)) for tokens in reference.tokens.values()) > 20, name


@pytest.mark.parametrize(("name", "mesh"), RUNS, ids=lambda value: str(value))
def test_ranks_together_give_what_one_gives(
    processes: Any,
    jobs: dict[str, Job],
    references: dict[str, Outcome],
    name: str,
    mesh: Mesh,
) -> None:
    outcomes = processes.run(mesh, run, jobs[name])
    assert_same(mesh, outcomes, references[name])


def assert_same(mesh: Mesh, outcomes: list[Outcome], reference: Outcome) -> None:
    seen = set()
    for outcome, place in zip(outcomes, mesh.places, strict=True):
        for prompt, tokens in outcome.tokens.items():
            assert prompt % (mesh.dp * mesh.ep) == place.dp * mesh.ep + place.ep
            assert tokens == reference.tokens[prompt]
        for prompt, logits in outcome.logits.items():
            np.testing.assert_allclose(logits, reference.logits[prompt], rtol=0, atol=1e-4)
            seen.add(prompt)
        layers, heads = outcome.shard.layers, outcome.shard.heads
        held = reference.kv[:, layers.start : layers.end, :, heads.start : heads.end]
        for prompt in outcome.tokens:
            blocks = slice(prompt * BLOCKS_EACH, (prompt + 1) * BLOCKS_EACH)
            np.testing.assert_allclose(outcome.kv[blocks], held[blocks], rtol=0, atol=1e-4)
    assert seen == set(reference.tokens)


def test_a_place_without_tokens_joins_the_others(
    processes: Any, jobs: dict[str, Job], references: dict[str, Outcome]
) -> None:
    """There are as many prompts as places but one, and steps with none at all."""
    job = replace(jobs["latent"], prompts=jobs["latent"].prompts[-1:], idle=1)
    outcomes = processes.run(Mesh(ep=2), run, job)
    assert outcomes[0].tokens == {0: references["latent"].tokens[3]}
    assert outcomes[1].tokens == {}


def test_experts_may_be_anywhere_and_at_several_places(
    processes: Any, jobs: dict[str, Job], references: dict[str, Outcome]
) -> None:
    job = replace(jobs["experts"], placement=Placement(((5, 1, 0), (1, 2, 3, 4, 5))))
    mesh, reference = Mesh(ep=2), references["experts"]
    outcomes = processes.run(mesh, run, job)
    assert_same(mesh, outcomes, reference)
    tokens = sum(LENGTHS) + len(LENGTHS) * (OUTPUT - 1)
    last = max(reference.loads)
    for layer, loads in reference.loads.items():
        together = [sum(counts) for counts in zip(*(o.loads[layer] for o in outcomes), strict=True)]
        assert together == loads
        # Of the last layer, only the rows that are sampled are computed.
        assert sum(loads) == 2 * (len(LENGTHS) * OUTPUT if layer == last else tokens)


@pytest.mark.parametrize("name", ["experts", "experts, sinks"])
def test_experts_move_to_where_they_are_needed(
    processes: Any, jobs: dict[str, Job], references: dict[str, Outcome], name: str
) -> None:
    """The second run, with the experts placed by the loads of the first, gives the same."""
    reference = references[name]
    each = len(reference.loads[0]) // 2 + 1
    mesh = Mesh(ep=2, tp=2)
    outcomes = processes.run(mesh, run, replace(jobs[name], rebalanced=each))
    assert_same(mesh, outcomes, reference)
    for layer, loads in reference.loads.items():
        counted = [outcomes[rank].loads[layer] for rank in (0, 2)]  # one of each pair along tp
        assert [sum(counts) for counts in zip(*counted, strict=True)] == loads


def test_native_code_says_that_it_computes_on_one_rank(jobs: dict[str, Job]) -> None:
    class Pair(SoloGroup):
        size = 2

    share = Share(Ranks(tp=Pair()))
    with pytest.raises(InvalidConfig, match=r"executor.*torch here: .*one rank, not on tp2"):
        load_model(jobs["dense"].folder, executor="native", share=share)
