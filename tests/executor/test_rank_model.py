"""Where the ranks of an instance meet, as its config says it."""

from pathlib import Path

import pytest

from baton.core.config import LeaderRef, ParallelConfig, WorkerConfig
from baton.core.errors import InvalidConfig
from baton.core.topology import Role
from baton.executor.rank_model import check_library, meeting_of
from baton.parallel.mesh import Mesh


def config(**fields: object) -> WorkerConfig:
    found = WorkerConfig(
        instance_id="decode-0", role=Role.DECODE, model_dir=Path("model"), model_name="m"
    )
    return found.model_copy(update=fields)


def test_the_mesh_and_its_limits_are_those_of_the_config() -> None:
    parallel = ParallelConfig(pp=2, tp=3, step_timeout_s=7, int8_reduce_kib=64)
    meeting = meeting_of(config(parallel=parallel), 99)
    assert meeting.mesh == Mesh(pp=2, tp=3)
    assert (meeting.host, meeting.port, meeting.deadline_s) == ("127.0.0.1", 99, 7)
    assert meeting.int8_from_bytes == 64 << 10


def test_sums_stay_exact_unless_int8_is_asked_for() -> None:
    assert meeting_of(config(parallel=ParallelConfig(tp=2)), 99).int8_from_bytes is None


@pytest.mark.parametrize("rank", [1, 2])
def test_the_others_meet_at_the_leaders_host(rank: int) -> None:
    leader = LeaderRef(host="10.0.0.7", port=5, incarnation=1)
    assert meeting_of(config(rank=rank, leader=leader), 99).host == "10.0.0.7"


def test_a_rank_computes_where_its_leader_does() -> None:
    given = config(parallel=ParallelConfig(tp=2))
    own = meeting_of(given, 99)
    check_library(given, own, "gloo")
    with pytest.raises(InvalidConfig, match=r"device: 'auto'.*the leader found the other"):
        check_library(given, own, "nccl")
