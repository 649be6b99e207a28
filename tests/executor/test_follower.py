"""A rank that cannot follow says why; what it does otherwise is in integration/test_parallel.py."""

import socket
from pathlib import Path
from typing import Any

import pytest

from baton.core.config import HandoverConfig, LeaderRef, ParallelConfig, WorkerConfig
from baton.core.errors import InvalidConfig, TransportError
from baton.core.topology import Role
from baton.executor.follower import Follower

SECRET = "a secret of this cluster"


def config(**changes: Any) -> WorkerConfig:
    fields: dict[str, Any] = {
        "rank": 1,
        "leader": LeaderRef(host="127.0.0.1", port=1, incarnation=7),
        "parallel": ParallelConfig(tp=2),
        "handover": HandoverConfig(secret=SECRET),
    }
    return WorkerConfig(
        instance_id="decode-0",
        role=Role.DECODE,
        model_dir=Path("none"),
        model_name="none",
        **(fields | changes),
    )


@pytest.mark.parametrize("changes", [{"rank": 0}, {"rank": 2}, {"leader": None}])
async def test_a_follower_has_a_rank_and_a_leader(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match=r"rank: . is not allowed; allowed: 1 to 1, and a lea"):
        await Follower.start(config(**changes), on_progress=print)


async def test_a_follower_needs_the_secret() -> None:
    with pytest.raises(InvalidConfig, match=r"handover.secret.*more than one rank"):
        await Follower.start(config(handover=HandoverConfig()), on_progress=print)


async def test_a_leader_that_is_not_there_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    leader = LeaderRef(host="127.0.0.1", port=port, incarnation=7)
    with pytest.raises(TransportError, match=f"the leader at 127.0.0.1:{port}"):
        await Follower.start(config(leader=leader), on_progress=print)
