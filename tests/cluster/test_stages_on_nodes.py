"""The stages of an instance on nodes of their own: what goes between them crosses a network."""

from pathlib import Path

import pytest

from .nodes import why_not
from .three_nodes import ThreeNodes, catalogue

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(600),
]
PROMPTS = catalogue(4, longest=60)


def spec(**pools: tuple[int, int]) -> str:
    """Return a spec of one instance a pool, by CPUs of a rank and stages; a node has two CPUs."""
    lines = [
        f"      {role}: {{instances: 1, resources: {{cpus: {cpus}}}, parallel: {{pp: {stages}}}}}"
        for role, (cpus, stages) in pools.items()
    ]
    return "\n".join(
        [
            "models:",
            "  - name: demo",
            "    dir: MODEL_DIR",
            "    engine: {kv_memory_mib: 32, executor: torch}",
            "    handover: {local_prefill: fallback}",
            "    gateways: {count: 0}",
            "    pools:",
            *lines,
        ]
    )


def nodes_of_ranks(cluster: ThreeNodes, name: str) -> list[int]:
    """Return the nodes with logs of an instance's ranks beside its leader."""
    return [
        k
        for k in range(1, len(cluster.ray.nodes) + 1)
        if list(cluster.ray.nodes[k].files.glob(f"baton-*/{name}*.rank1*.log"))
    ]


async def test_a_roll_out_to_stages_on_two_nodes_gives_the_tokens_of_one(
    tmp_path: Path, demo_model_dir: Path
) -> None:
    """Prefill in two stages on two nodes, to decode on the third: each stage fills its node.

    The old instances leave halves of nodes, so the new ones have room only if some leave first.
    """
    small, large = spec(prefill=(1, 1), decode=(1, 1)), spec(prefill=(2, 2), decode=(2, 1))
    async with ThreeNodes(tmp_path, demo_model_dir, small) as cluster:
        right = await cluster.answers(PROMPTS)
        await cluster.up(large)
        found = await cluster.whole()
        (prefill,) = (name for name in found if name.startswith("prefill"))
        leader = cluster.ray.index_of(found[prefill]["address"])
        assert nodes_of_ranks(cluster, prefill) not in ([], [leader]), "a node for each stage"
        assert await cluster.answers(PROMPTS) == right
        await cluster.all_given_back()
        leader_stats, *_ = await cluster.ask("stats", prefill)
        assert leader_stats["handover_ok"] == len(PROMPTS), "decode computed prompts itself"
