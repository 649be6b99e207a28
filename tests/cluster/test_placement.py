"""Where instances go: every decision, without Ray."""

from baton.cluster.placement import Node, Room, best_node, cpus_of, fits, lacking, room_of
from baton.cluster.spec import spec_of
from baton.core.cluster_spec import PoolSpec, RankResources
from baton.core.config import ClusterConfig, ParallelConfig
from baton.core.topology import Role


def node(name: str, total: dict[str, float], free: dict[str, float] | None = None) -> Node:
    return Node(name, f"10.0.0.{name}", total, total if free is None else free)


def pool(resources: RankResources, **parallel: int) -> PoolSpec:
    layout = ParallelConfig.checked(**parallel)
    return PoolSpec(role=Role.DECODE, parallel=layout, resources=resources)


GPU = RankResources(cpus=2, gpus=1, custom={"gpu-h200": 0.5})


def test_each_stage_is_one_bundle_for_all_its_ranks() -> None:
    room = room_of(pool(GPU, tp=2, pp=3, ep=2))
    assert room.bundles == ({"CPU": 8.0, "GPU": 4.0, "gpu-h200": 2.0},) * 3
    assert room.strategy == "PACK"
    single = room_of(pool(RankResources()))
    assert (single.bundles, single.strategy) == (({"CPU": 1.0},), "STRICT_PACK")


def test_the_cpus_of_a_spec_are_those_of_all_ranks(tmp_path: object) -> None:
    config = ClusterConfig.checked(
        model_dir="m", model_name="m", prefill=2, prefill_parallel=ParallelConfig(tp=2, pp=2)
    )
    assert cpus_of(spec_of(config)) == 9.0


def test_room_is_where_every_stage_finds_some() -> None:
    room = Room(({"GPU": 2.0},) * 2)
    assert fits(room, [node("1", {"GPU": 4.0})])
    assert fits(room, [node("1", {"GPU": 2.0}), node("2", {"GPU": 3.0})])
    assert not fits(room, [node("1", {"GPU": 3.0}), node("2", {"GPU": 1.0})])
    assert not fits(room, [node("1", {"GPU": 4.0}, free={"GPU": 3.0})])
    assert not fits(room, [])


def test_instances_of_a_pool_are_spread() -> None:
    nodes = [node("1", {"CPU": 4.0}, {"CPU": 3.0}), node("2", {"CPU": 4.0}, {"CPU": 1.0})]
    room = Room(({"CPU": 1.0},))
    assert best_node(room, nodes, {}) == "1", "the one with most room"
    assert best_node(room, nodes, {"1": 1}) == "2", "the one with none of its pool"
    assert best_node(Room(({"CPU": 2.0},)), nodes, {"1": 1}) == "1", "the only one with room"
    assert best_node(Room(({"CPU": 9.0},)), nodes, {}) is None
    assert best_node(Room(({"CPU": 1.0},) * 2), nodes, {}) is None


def test_what_waiting_cannot_bring_is_told() -> None:
    wide = pool(RankResources(gpus=1), tp=4)
    two = [node("1", {"CPU": 8.0, "GPU": 2.0}), node("2", {"CPU": 8.0})]
    said = lacking({"decode": (wide, 1)}, two)
    assert said == (
        "4 ranks of decode belong on one node with CPU 4, GPU 4; there is none: "
        "CPU 8, GPU 2 at 10.0.0.1; CPU 8, GPU 0 at 10.0.0.2"
    )
    assert lacking({"decode": (wide, 0)}, two) is None
    narrow = pool(RankResources(gpus=1))
    assert lacking({"prefill": (narrow, 1), "decode": (narrow, 1)}, two) is None
    said = lacking({"prefill": (narrow, 1), "decode": (narrow, 2)}, two)
    assert said == "all pools take GPU 3; all nodes have 2"
    assert "no node is alive" in (lacking({"decode": (narrow, 1)}, []) or "")


def test_what_is_taken_now_may_be_free_later() -> None:
    busy = [node("1", {"CPU": 1.0}, free={})]
    assert lacking({"decode": (pool(RankResources()), 1)}, busy) is None
