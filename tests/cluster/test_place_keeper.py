"""Places of instances that start at once."""

import asyncio
from typing import Any

import pytest

from baton.cluster import ray_calls
from baton.cluster.place_keeper import PlaceKeeper
from baton.cluster.placement import Node
from baton.cluster.state import Handles
from tests.cluster.controllers import spec


async def test_instances_of_a_pool_that_start_at_once_are_spread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody has a place yet when the last one is asked for."""
    free = {"CPU": 4.0}
    all_asked = asyncio.Event()
    asked: list[str | None] = []

    async def nodes(timeout_s: float) -> list[Node]:
        await asyncio.sleep(0)
        return [Node(name, f"10.0.0.{name}", free, free) for name in "123"]

    async def reserve(*_: object, node_id: str | None, **__: object) -> Any:
        asked.append(node_id)
        if len(asked) == 3:
            all_asked.set()
        return node_id

    async def await_places(group: Any, timeout_s: float) -> list[str]:
        await all_asked.wait()
        return [group]

    for function in (nodes, reserve, await_places):
        monkeypatch.setattr(ray_calls, function.__name__, function)
    keeper, wanted = PlaceKeeper(detached=False), spec(decode=3)
    async with asyncio.timeout(60):
        await asyncio.gather(
            *(keeper.get(Handles(f"decode-{i}.1", "", 1), "decode", wanted) for i in range(3))
        )
    assert sorted(filter(None, asked)) == ["1", "2", "3"]
