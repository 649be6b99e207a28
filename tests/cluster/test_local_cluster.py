"""The life of a cluster, with a real Ray and stand-in workers."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from baton.cluster import ray_calls
from baton.cluster.local_cluster import LocalCluster
from baton.cluster.placement import Room
from baton.cluster.processes import wait_gone
from baton.core.errors import BatonError, DeadlineExceeded, InstanceLost, InvalidConfig, Unavailable
from baton.core.ids import InstanceId
from baton.core.topology import InstanceInfo, Role

DECODE = InstanceId("decode-0")

MakeCluster = Callable[..., LocalCluster]


def alive(pids: tuple[int, ...]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def by_id(cluster: LocalCluster) -> dict[str, InstanceInfo]:
    return {info.instance_id: info for info in cluster.board.current.instances}


async def test_instances_come_get_lost_come_back_and_leave_nothing(
    make_cluster: MakeCluster, progress: list[str]
) -> None:
    async with make_cluster(prefill=1, decode=1, threads=3) as cluster:
        before = by_id(cluster)
        assert {i.role for i in before.values()} == {Role.PREFILL, Role.DECODE}
        assert before[DECODE].pid != before[InstanceId("prefill-0")].pid != os.getpid()
        assert (await cluster.instance_stats(DECODE))["omp"] == "3"
        room = Room(({"CPU": 3.0},))
        group = await ray_calls.reserve(room, node_id=None, name=None, timeout_s=30)
        with pytest.raises(Unavailable, match="Ray found no room in 0"):
            await ray_calls.await_places(group, 0.1)
        cluster.check()

        version = cluster.board.current.version
        os.kill(before[DECODE].pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            without = await cluster.board.newer_than(version)
            assert [i.instance_id for i in without.instances] == ["prefill-0"]
            await cluster.board.newer_than(without.version)
        after = by_id(cluster)
        assert after[DECODE].incarnation != before[DECODE].incarnation
        assert after[DECODE].pid != before[DECODE].pid
        assert after[InstanceId("prefill-0")] == before[InstanceId("prefill-0")]
        assert cluster.stats().losses == 1
        cluster.check()

        with pytest.raises(InstanceLost):
            await cluster.instance_stats(InstanceId("decode-1"))
        pids, temp_dir = cluster.processes(), cluster.temp_dir
        assert set(alive(pids)) == set(pids)
    assert alive(pids) == []
    assert not temp_dir.exists()
    assert cluster.board.current.instances == ()
    with pytest.raises(BatonError):
        await cluster.instance_stats(DECODE)
    assert not ray_calls.ray.is_initialized(), "asking after the end started another Ray"
    assert any("decode-0 is lost" in line for line in progress)
    assert any("decode-0 is back" in line for line in progress)


async def test_a_stopped_instance_is_replaced(
    make_cluster: MakeCluster, progress: list[str]
) -> None:
    async with make_cluster(prefill=0, decode=2) as cluster:
        before = by_id(cluster)
        hung, version = InstanceId("mixed-0"), cluster.board.current.version
        os.kill(before[hung].pid, signal.SIGSTOP)
        async with asyncio.timeout(90):
            without = await cluster.board.newer_than(version)
            assert [i.instance_id for i in without.instances] == ["mixed-1"]
            await cluster.board.newer_than(without.version)
            after = by_id(cluster)
            assert after[hung].pid != before[hung].pid
            assert after[InstanceId("mixed-1")] == before[InstanceId("mixed-1")]
            await wait_gone([before[hung].pid], 60)
        assert alive((before[hung].pid,)) == []
        assert cluster.stats().losses == 1
    assert any("mixed-0 is lost (it does not answer)" in line for line in progress)


@pytest.mark.parametrize(
    ("worker", "timeout_s", "error", "words"),
    [
        ("Refusing", 90.0, InvalidConfig, ["kv_memory_mib: 7 is not allowed; allowed: 8 or more"]),
        ("Crashing", 90.0, InstanceLost, ["-0 failed to start: its process ended", "last words"]),
        (
            "Hanging",
            30.0,  # to begin to hang: the processes of both instances must have started by then
            DeadlineExceeded,
            ["was not ready after 30 s", "last progress: hanging", "a line in the log"],
        ),
    ],
)
async def test_a_start_that_fails_says_why_and_leaves_nothing(
    make_cluster: MakeCluster,
    monkeypatch: pytest.MonkeyPatch,
    short_temp_dir: Path,
    worker: str,
    timeout_s: float,
    error: type[BatonError],
    words: list[str],
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(short_temp_dir))
    with pytest.raises(error) as caught:
        async with make_cluster(worker, prefill=1, decode=1, start_timeout_s=timeout_s):
            pytest.fail("it started")
    for part in words:
        assert part in str(caught.value)
    assert os.listdir(short_temp_dir) == []
