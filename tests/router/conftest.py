from collections.abc import Callable, Iterator

import pytest

from baton.core.clock import ManualClock
from baton.core.ids import Incarnation, InstanceId
from baton.core.topology import InstanceInfo, Role
from baton.router.router import Router

MakeInstance = Callable[..., InstanceInfo]


@pytest.fixture
def make_instance() -> MakeInstance:
    def make(name: str, role: Role = Role.DECODE, **changes: object) -> InstanceInfo:
        values: dict[str, object] = {
            "instance_id": InstanceId(name),
            "role": role,
            "address": "127.0.0.1:1",
            "incarnation": Incarnation(1),
            "pid": 1,
            "model": "m",
            "compatibility": "same",
            "max_model_len": 1000,
            "kv_tokens": 10_000,
            "max_sequences": 8,
            "load_s": 0.0,
        }
        return InstanceInfo(**{**values, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(100.0)


@pytest.fixture
def router(clock: ManualClock) -> Iterator[Router]:
    router = Router(max_open_requests=4, clock=clock)
    yield router
    router.check()
