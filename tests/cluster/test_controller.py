"""The controller over a real Ray, with stand-in workers: it plans, dies, comes back and adopts."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from baton.cluster import ray_calls, ray_environment, store
from baton.cluster.control import Control
from baton.cluster.controller import Controller
from baton.cluster.processes import wait_gone
from baton.cluster.ray_head import RayHead
from baton.cluster.state import ControlState
from baton.cluster.status import InstanceStatus
from baton.cluster.surroundings import Surroundings
from baton.core.control_reading import ControlReading
from baton.core.errors import BatonError, InvalidConfig, InvalidRequest, Unavailable
from baton.core.topology import Membership
from tests.cluster.controllers import PATIENCE_S, Cluster, spec


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, short_temp_dir: Path) -> Callable[[], Any]:
    """Return a context: a Ray of our own with room for five, and a controller with no spec yet."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")

    @asynccontextmanager
    async def running() -> AsyncIterator[Cluster]:
        head = await RayHead.start(
            short_temp_dir, slots=5, environment=ray_environment.head_environment(1), timeout_s=120
        )
        try:
            await ray_calls.connect(head.address, 60)
            try:
                found = Cluster(short_temp_dir / "logs")
                await found.start()
                yield found
            finally:
                await ray_calls.disconnect(60)
        finally:
            await head.stop(grace_s=20)

    return running


def with_gateway(model_dir: Path) -> dict[str, Any]:
    return {"dir": model_dir, "gateways": {"http_port": 0, "grpc_port": 0}}


def incarnations(instances: dict[str, InstanceStatus]) -> dict[str, int | None]:
    return {name: instance.incarnation for name, instance in instances.items()}


@pytest.mark.timeout(400)
async def test_a_controller_keeps_what_is_wanted_and_outlives_its_own_death(
    cluster: Callable[[], Any],
) -> None:
    async with cluster() as control:
        with pytest.raises(Unavailable, match="nothing is up"):
            await control.ask("status")
        with pytest.raises(Unavailable, match="all pools take CPU 7; all nodes have 5"):
            await control.ask("apply", spec(decode=6))
        assert await control.ask("apply", spec())
        first = await control.instances()
        assert sorted(first) == ["decode-0", "prefill-0"]
        assert not await control.ask("apply", spec()), "the same again"

        assert await control.ask("scale", "decode", 2)
        assert not await control.ask("scale", "decode", 2)
        two = await control.instances()
        assert sorted(two) == ["decode-0", "decode-1", "prefill-0"]
        with pytest.raises(InvalidRequest, match="one of prefill, decode"):
            await control.ask("scale", "mixed", 2)

        # One dies with the controller: the next one adopts the others, and replaces that one.
        before = await control.pid()
        os.kill(before, signal.SIGKILL)
        os.kill(two["decode-1"].pid, signal.SIGKILL)
        third = await control.instances()
        assert await control.pid() != before
        assert third["decode-1"].incarnation != two["decode-1"].incarnation
        kept = ("decode-0", "prefill-0")
        assert {n: third[n].incarnation for n in kept} == {n: two[n].incarnation for n in kept}
        assert await control.whats("decode-0") == ["adopt"]
        membership: Membership = await control.ask("membership", -1, 0.0)
        assert membership.version > 1000, "no version of the dead controller is used again"
        assert len(membership.instances) == 3

        told: ControlReading = await control.ask("reading")
        pools = [(pool.name, pool.desired, pool.ready) for pool in told.pools]
        assert pools == [("decode", 2, 2), ("prefill", 1, 1)]
        assert told.recoveries == told.losses == told.actions["start"] == 1

        # SIGTERM closes an instance in order; it comes back.
        os.kill(third["decode-0"].pid, signal.SIGTERM)
        await control.until("decode-0", "lost")
        fourth = await control.instances()
        assert fourth["decode-0"].pid != third["decode-0"].pid
        assert control.log("decode-0") == ["drained", "closed in order"]

        await control.ask("flip", "decode-1")
        assert sorted(await control.instances()) == ["decode-0", "prefill-0", "prefill-1"]
        assert control.log("decode-1")[-2:] == ["drained", "closed in order"]
        await control.ask("drain", "prefill-1")
        assert sorted(await control.instances()) == ["decode-0", "prefill-0"]

        assert await control.ask("apply", spec(engine={"kv_memory_mib": 7}))
        replaced = await control.instances()
        assert len(replaced) == 2
        assert not set(incarnations(fourth).values()) & set(incarnations(replaced).values())

        await control.ask("down")
        pids = [i.pid for i in replaced.values() if i.pid is not None]
        await wait_gone(pids, PATIENCE_S)
        assert not any(map(running, pids))
        with pytest.raises(BatonError, match="nothing is up"):
            await control.ask("status")


@pytest.mark.slow  # one more Ray
@pytest.mark.timeout(400)
async def test_logs_on_a_disk_that_stands_still_keep_nobody_from_their_work(
    cluster: Callable[[], Any], stuck: Callable[[Path], None], demo_model_dir: Path
) -> None:
    async with cluster() as control:
        for name in ("decode-0", "gateway-0"):
            stuck(control.log_dir / f"{name}.log")
        assert await control.ask("apply", spec(**with_gateway(demo_model_dir)))
        first, gateway = await control.instances(), await control.gateway(not_=0)
        stuck(control.log_dir / "controller.log")
        before = await control.pid()
        os.kill(before, signal.SIGKILL)
        second = await control.instances()
        assert await control.pid() != before, "this one's log is stuck from its first line"
        assert incarnations(second) == incarnations(first)
        os.kill(second["decode-0"].pid, signal.SIGKILL)
        await control.until("decode-0", "lost")
        third = await control.instances()
        assert third["decode-0"].incarnation != first["decode-0"].incarnation
        assert await control.gateway(not_=0) == gateway
        await control.ask("down")


@pytest.mark.slow  # one more Ray
@pytest.mark.timeout(400)
async def test_who_hangs_is_replaced_and_one_that_was_replaced_does_nothing_more(
    cluster: Callable[[], Any], demo_model_dir: Path
) -> None:
    async with cluster() as control:
        assert await control.ask("apply", spec(**with_gateway(demo_model_dir)))
        first, gateway = await control.instances(), await control.gateway(not_=0)
        async with hung(gateway):
            await control.gateway(not_=gateway)
        await control.until("gateway-0", "lost")

        before, epoch = await control.pid(), control.epoch
        async with hung(before):
            after = await control.pid(not_=before)
            second = await control.instances()
        assert control.epoch > epoch
        assert incarnations(second) == incarnations(first), "they have served all the time"
        assert await control.whats("decode-0") == ["adopt"]

        # One that hung where no watchdog saw it finds another owner of the state when it goes on.
        await store.claim()
        await control.pid(not_=after)
        assert incarnations(await control.instances()) == incarnations(first)
        await control.ask("down")


@asynccontextmanager
async def hung(pid: int) -> AsyncIterator[None]:
    """Stop a process, until another has its place; then it is to have been ended, not stopped."""
    os.kill(pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    assert not running(pid)


@pytest.fixture
def stuck() -> Iterator[Callable[[Path], None]]:
    """Return a function that makes a file of which writers wait for ever: a full pipe."""
    ends: list[int] = []

    def make(path: Path) -> None:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        ends.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        ends.append(writing := os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, b"x" * 4096)

    yield make
    for end in ends:
        os.close(end)


async def test_down_is_nothing_to_do_where_nothing_is_up(tmp_path: Path) -> None:
    await Controller(tmp_path, {}).down()


async def test_the_same_spec_again_starts_a_gateway_that_is_missing(tmp_path: Path) -> None:
    """One may not have started, or not been found, the last time."""
    tries: list[int] = []

    class Keeper:
        async def ensure(self) -> None:
            tries.append(1)

    wanted = spec().with_secrets()
    controller = Controller(tmp_path, {})
    controller._control = Control(ControlState.of(wanted), Surroundings(log_dir=tmp_path))
    controller._gateways = Keeper()  # type: ignore[assignment]
    assert not await controller.apply(spec())
    assert tries == [1]


async def test_a_gateway_that_ends_for_good_is_looked_for_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.cluster.controller._GATEWAYS_EVERY_S", 0.001)
    ensured, looked = asyncio.Event(), asyncio.Event()
    troubles = iter(["Ray does not answer", "Ray does not answer", ""])

    class Keeper:
        async def ensure(self) -> None:
            if trouble := next(troubles, ""):
                raise Unavailable(trouble)
            ensured.set()

        async def look(self) -> None:
            if ensured.is_set():
                looked.set()

    controller = Controller(tmp_path, {})
    controller._control = Control(
        ControlState.of(spec().with_secrets()), Surroundings(log_dir=tmp_path)
    )
    keeping = asyncio.create_task(controller._keep_gateways(Keeper()))  # type: ignore[arg-type]
    async with asyncio.timeout(PATIENCE_S):
        await looked.wait()
    keeping.cancel()
    told = [event.reason for event in controller._control.journal.after(0)]
    assert told == ["Ray does not answer"], "once"


async def test_a_state_that_cannot_be_read_is_told_to_whoever_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def claim() -> str:
        return "me"

    async def load(now: float) -> ControlState | None:
        return ControlState.from_json('{"format": 9}', now)

    monkeypatch.setattr(store, "claim", claim)
    monkeypatch.setattr(store, "load", load)
    controller = Controller(tmp_path, {})
    async with asyncio.timeout(PATIENCE_S):
        await controller.recover()
        for asked in (controller.status(), controller.apply(spec()), controller.down()):
            with pytest.raises(InvalidConfig, match="format of the cluster's state: 9 is not"):
                await asked


def running(pid: int) -> bool:
    """Whether a process runs; one that has exited stays in /proc until its parent looks."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
