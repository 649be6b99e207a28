"""Instances of many ranks over real Ray: one actor a rank, one life for all of them."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from baton.cluster.local_cluster import LocalCluster
from baton.core.config import ClusterConfig, EngineConfig, ParallelConfig
from baton.core.ids import InstanceId

PATIENCE_S = 150.0


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_rank_that_is_killed_takes_its_instance_along_and_both_come_back(
    demo_model_dir: Path,
) -> None:
    config = ClusterConfig.checked(
        model_dir=demo_model_dir,
        model_name="demo",
        prefill_parallel=ParallelConfig(tp=2),
        decode_parallel=ParallelConfig(pp=2),
        engine=EngineConfig(kv_memory_mib=16),
    )
    name = InstanceId("decode-0")
    async with LocalCluster(config, lambda line: None) as cluster:
        first = {i.instance_id: i for i in cluster.board.current.instances}
        assert len(first) == 2
        ranks = await cluster.rank_stats(name)
        assert [stats.get("rank", 0) for stats in ranks] == [0, 1]
        version = cluster.board.current.version
        os.kill(int(ranks[1]["pid"]), signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_S):
            membership = await cluster.board.newer_than(version)
            assert [i.instance_id for i in membership.instances] == ["prefill-0"]
            while len(membership.instances) < 2:
                membership = await cluster.board.newer_than(membership.version)
        second = {i.instance_id: i for i in membership.instances}
        assert second[name].incarnation != first[name].incarnation
        assert second[InstanceId("prefill-0")] == first[InstanceId("prefill-0")]
        assert cluster.stats().losses == 1
