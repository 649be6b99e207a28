"""The cost of a layer on paper against what real models' groups count."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baton.parallel.cost import LayerShape, bytes_per_token, layer_costs
from baton.parallel.counted_group import Moved
from baton.parallel.mesh import Axis, Mesh
from tests.executor.rank_driver import Job, prompts_of, run_counted

LAYERS, HIDDEN, KV_HEADS, HEAD, TOP_K, EXPERTS = 3, 128, 2, 32, 2, 8
ROW_BYTES = HIDDEN * 4
TOKENS = 96
LENGTHS = (TOKENS, TOKENS)
NEVER = 1 << 30
SPREAD = [
    (Mesh(tp=2), False),
    (Mesh(tp=2), True),
    (Mesh(tp=4), False),
    (Mesh(tp=4), True),
    (Mesh(cp=2), False),
    (Mesh(cp=2, tp=2), False),
]

Write = Callable[..., Path]
Count = dict[tuple[Axis, str], tuple[int, int]]
"""Calls and bytes, by axis and kind."""


def shape_of(mesh: Mesh, top_k: int = 0) -> LayerShape:
    return LayerShape(LAYERS, ROW_BYTES, 2 * (KV_HEADS // min(mesh.tp, KV_HEADS)) * HEAD * 4, top_k)


def job_of(folder: Path, scattered: bool) -> Job:
    """One step with all tokens of two prompts."""
    prompts = prompts_of(LENGTHS, 1024)
    return Job(folder, prompts, 1, chunk=TOKENS, scatter_from=0 if scattered else NEVER)


def counts(stats: Mapping[Axis, Mapping[str, Moved]]) -> Count:
    return {
        (axis, kind): (moved.calls, moved.bytes)
        for axis, kinds in stats.items()
        for kind, moved in kinds.items()
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, write_model: Write) -> dict[str, Path]:
    to = tmp_path_factory.mktemp("models")
    sizes: dict[str, Any] = {"head_dim": HEAD, "hidden_size": HIDDEN}
    moe = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": 32}
    return {
        "dense": write_model(to / "dense", "llama", num_hidden_layers=LAYERS, **sizes),
        "deeper": write_model(to / "deeper", "llama", num_hidden_layers=LAYERS + 1, **sizes),
        "experts": write_model(
            to / "experts", "qwen3_moe", num_hidden_layers=LAYERS, **moe, **sizes
        ),
    }


@pytest.mark.parametrize(("mesh", "scattered"), SPREAD, ids=str)
def test_one_layer_more_costs_what_the_paper_says(
    processes: Any, folders: dict[str, Path], mesh: Mesh, scattered: bool
) -> None:
    """The ends of a model and its last layer, which is for the sampled rows, are in both."""
    job = job_of(folders["dense"], scattered)
    fewer = processes.run(mesh, run_counted, job)
    more = processes.run(mesh, run_counted, replace(job, folder=folders["deeper"]))
    tokens = sum(LENGTHS) // mesh.cp
    expected = {
        (cost.axis, cost.kind): (cost.calls, cost.bytes_per_token * tokens)
        for cost in layer_costs(shape_of(mesh), mesh, scattered)
    }
    for (_, before), (_, after) in zip(fewer, more, strict=True):
        less, found = counts(before), counts(after)
        grown = {
            at: (calls - less[at][0], moved - less[at][1]) for at, (calls, moved) in found.items()
        }
        assert {at: grew for at, grew in grown.items() if grew != (0, 0)} == expected


@pytest.mark.parametrize("scattered", [False, True])
def test_a_stage_hands_its_stream_on_once(
    processes: Any, folders: dict[str, Path], scattered: bool
) -> None:
    mesh = Mesh(pp=2, tp=2)
    found = processes.run(mesh, run_counted, job_of(folders["deeper"], scattered))
    shape = replace(shape_of(mesh), layers=LAYERS + 1)
    send, receive = (c for c in layer_costs(shape, mesh, scattered) if c.axis == "pp")
    stage = (LAYERS + 1) / mesh.pp
    for (_, stats), place in zip(found, mesh.places, strict=True):
        cost, kind = ((send, "send"), (receive, "receive"))[place.pp]
        moved = counts(stats)["pp", kind]
        assert moved == (cost.calls * stage, cost.bytes_per_token * stage * sum(LENGTHS))


def test_experts_cost_two_rows_for_every_choice_of_one_elsewhere(
    processes: Any, folders: dict[str, Path]
) -> None:
    """What is on paper if they were chosen evenly; here they are chosen as they are."""
    mesh = Mesh(ep=2)
    [cost] = layer_costs(shape_of(mesh, TOP_K), mesh)
    found = processes.run(mesh, run_counted, job_of(folders["experts"], False))
    half = EXPERTS // 2
    sent = [
        [sum(loads[half:] if place == 0 else loads[:half]) for loads in outcome.loads.values()]
        for place, (outcome, _) in enumerate(found)
    ]
    busier = sum(max(there, back) for there, back in zip(*sent, strict=True))
    per_choice = cost.bytes_per_token / (TOP_K * (mesh.ep - 1) / mesh.ep)
    counted = LAYERS * half * 8  # how many rows come for each expert
    for _, stats in found:
        assert counts(stats)["ep", "all_to_all"] == (
            cost.calls * LAYERS,
            busier * per_choice + counted,
        )


def test_in_and_out_of_a_stage_count_once() -> None:
    mesh = Mesh(pp=4)
    assert bytes_per_token(layer_costs(LayerShape(8, 1000, 100), mesh)) == 500
