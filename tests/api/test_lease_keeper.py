"""Leases over real gRPC: kept, lost, and left in each way."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from baton.api import lease_keeper
from baton.api.lease_keeper import LeaseKeeper, Terms
from baton.core.errors import InstanceLost
from baton.core.ids import Incarnation, InstanceId
from baton.core.lease import Beat, Lease, Leave, Report, Standing
from baton.core.topology import InstanceInfo, Membership, MembershipBoard, Role
from baton.proto.grpc_runtime import WorkerServer
from baton.proto.lease_service import add_lease_service

SECONDS = 60
LEASE_S = 2.0


class Instance:
    """A lease holder behind a real server."""

    def __init__(self, incarnation: int = 1) -> None:
        self._incarnation = Incarnation(incarnation)
        self.asked = 0
        """Times that a beat came, refused ones too: each is held against the incarnation."""
        self.lease = Lease()
        self.beats = 0
        self.leaves: list[Leave] = []
        self.standing: Standing | None = None
        self.draining = False
        self.server: WorkerServer | None = None

    @property
    def incarnation(self) -> Incarnation:
        self.asked += 1
        return self._incarnation

    def beat(self, beat: Beat) -> Report:
        self.beats += 1
        self.lease.beat(beat, 0.0)
        standing = self.standing or self.lease.standing(0.0)
        return Report(standing, epoch=beat.epoch, problems=("p",), draining=self.draining)

    def left(self, last: Beat, leave: Leave) -> None:
        assert last.granter == "gateway-0/9"
        self.leaves.append(leave)
        self.lease.left(last, leave, 0.0)

    async def serve(self, port: int = 0) -> None:
        self.server = await WorkerServer.start(
            "127.0.0.1",
            port,
            lambda server: add_lease_service(server, self),
        )

    def info(self, incarnation: int | None = None) -> InstanceInfo:
        assert self.server is not None
        return InstanceInfo(
            instance_id=InstanceId("decode-0"),
            role=Role.DECODE,
            address=self.server.address,
            incarnation=Incarnation(incarnation or self._incarnation),
            pid=1,
            model="m",
            compatibility="c",
            max_model_len=10,
            kv_tokens=10,
            max_sequences=1,
            load_s=0.0,
        )


class Granter:
    """A keeper, its board and what it has heard."""

    def __init__(self) -> None:
        self.board = MembershipBoard()
        self.lost: list[InstanceLost] = []
        terms = Terms("gateway-0/9", lease_s=LEASE_S, beat_s=0.01)
        self.now = 0.0
        self.keeper = LeaseKeeper(
            self.board,
            terms,
            on_lost=lambda _, e: self.lost.append(e),
            clock=lambda: self.now,
        )

    def list(self, *instances: InstanceInfo) -> None:
        self.board.publish(Membership(self.board.current.version + 1, instances))


@asynccontextmanager
async def granting() -> AsyncIterator[Granter]:
    granter = Granter()
    running = asyncio.create_task(granter.keeper.run())
    try:
        async with asyncio.timeout(SECONDS):
            yield granter
    finally:
        running.cancel()
        await asyncio.wait({running})
        assert running.cancelled(), running.exception()


@pytest.fixture
async def instance() -> AsyncIterator[Instance]:
    instance = Instance()
    await instance.serve()
    yield instance
    assert instance.server is not None
    await instance.server.close(0)


async def until(seen: Callable[[], object]) -> None:
    while not seen():  # noqa: ASYNC110  (what it waits for sets no event)
        await asyncio.sleep(0.005)


async def test_a_lease_is_kept_and_reports_come_back(instance: Instance) -> None:
    async with granting() as granter:
        info = instance.info()
        assert granter.keeper.report(info) is None
        granter.list(info)
        await until(lambda: instance.beats > 3)
        await until(lambda: granter.keeper.report(info))
        report = granter.keeper.report(info)
        assert report == Report(Standing.HELD, epoch=1, problems=("p",))
        granter.list(info)  # another version, the same instance: the stream goes on
        await until(lambda: instance.lease.epoch == 2)
        assert not granter.lost
        await granter.keeper.close()
        assert instance.leaves == [Leave.GOODBYE]
        assert instance.lease.standing(0.0) is Standing.FREE


async def test_an_instance_that_is_gone_is_lost_once_and_found_again(instance: Instance) -> None:
    async with granting() as granter:
        info = instance.info()
        granter.list(info)
        await until(lambda: granter.keeper.report(info))
        assert instance.server is not None
        await instance.server.close(0)
        await until(lambda: granter.lost)
        assert granter.keeper.report(info) is None
        await instance.serve(int(info.address.rpartition(":")[2]))
        await until(lambda: granter.keeper.report(info))
        assert len(granter.lost) == 1


async def test_who_does_not_answer_while_a_lease_lasts_is_lost(instance: Instance) -> None:
    async with granting() as granter:
        info = instance.info()
        granter.list(info)
        await until(lambda: granter.keeper.report(info))
        silent = asyncio.Event()

        def hang(beat: Beat) -> Report:
            silent.set()
            raise asyncio.CancelledError  # the handler ends without an answer

        instance.beat = hang  # type: ignore[method-assign]
        await silent.wait()
        await until(lambda: granter.lost)


async def test_a_fenced_instance_is_lost_until_it_serves_again(instance: Instance) -> None:
    async with granting() as granter:
        info = instance.info()
        granter.list(info)
        await until(lambda: granter.keeper.report(info))
        instance.standing = Standing.FENCED
        await until(lambda: granter.lost)
        assert str(granter.lost[0]) == "decode-0 is fenced: p"
        assert granter.keeper.flaps == 0
        instance.standing = None
        await until(lambda: granter.keeper.report(info))
        assert granter.keeper.flaps == 1


async def test_who_is_lost_or_drains_takes_no_requests(instance: Instance) -> None:
    async with granting() as granter:
        info, takes = instance.info(), granter.keeper.takes_requests
        assert takes(info), "nobody has heard of it"
        granter.list(info)
        await until(lambda: granter.keeper.report(info))
        assert takes(info)
        instance.draining = True
        await until(lambda: not takes(info))
        assert granter.keeper.report(info)
        instance.draining = False
        await until(lambda: takes(info))
        instance.standing = Standing.FENCED
        await until(lambda: not takes(info))
        assert not granter.keeper.report(info)


async def test_who_may_be_cut_off_grants_nothing_and_loses_nobody_for_it(
    instance: Instance,
) -> None:
    async with granting() as granter:
        info, keeper = instance.info(), granter.keeper
        granter.list(info)
        await until(lambda: keeper.report(info))
        keeper.pause()
        await until(lambda: keeper.report(info) is None)
        beats = instance.beats
        instance.standing = Standing.FENCED  # as it is, once nobody has renewed its lease
        keeper.resume()
        await until(lambda: instance.beats > beats + 1)
        assert keeper.report(info) is None
        instance.standing = None
        await until(lambda: keeper.report(info))
        assert not granter.lost, "it was our pause"
        assert instance.leaves == []


async def test_one_that_stays_fenced_after_a_pause_is_lost(instance: Instance) -> None:
    async with granting() as granter:
        info, keeper = instance.info(), granter.keeper
        granter.list(info)
        await until(lambda: keeper.report(info))
        keeper.pause()
        await until(lambda: keeper.report(info) is None)
        beats = instance.beats
        instance.standing = Standing.FENCED
        keeper.resume()
        await until(lambda: instance.beats > beats + 1)
        assert not granter.lost
        granter.now += LEASE_S + 1
        await until(lambda: granter.lost)


async def test_another_incarnation_at_the_address_is_never_live(instance: Instance) -> None:
    async with granting() as granter:
        info = instance.info(incarnation=5)
        granter.list(info)
        granter.list(info, info)
        await until(lambda: instance.asked > 2)
        assert granter.keeper.report(info) is None
        assert instance.beats == 0
        assert not granter.lost  # what has never been there is not lost


@pytest.mark.parametrize(("successor", "expected"), [(False, Leave.WITHDRAW), (True, Leave.REVOKE)])
async def test_who_is_no_member_any_more_hears_of_it(
    instance: Instance, successor: bool, expected: Leave
) -> None:
    async with granting() as granter:
        info = instance.info()
        granter.list(info)
        await until(lambda: granter.keeper.report(info))
        granter.list(*[instance.info(incarnation=2)] * successor)
        await until(lambda: instance.leaves)
        assert instance.leaves == [expected]
        assert instance.lease.standing(0.0) is Standing.FENCED


async def test_a_beat_that_makes_no_sense_is_refused(instance: Instance) -> None:
    granter = Granter()
    granter.keeper.terms = Terms("gateway-0/9", lease_s=float("nan"), beat_s=0.01)
    info = instance.info()
    granter.list(info)
    running = asyncio.create_task(granter.keeper.run())
    async with asyncio.timeout(SECONDS):
        await until(lambda: instance.asked > 2)
    assert instance.beats == 0
    running.cancel()
    await asyncio.wait({running})


async def test_a_bug_in_one_lease_costs_no_other(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Instance(incarnation=2)
    await other.serve()
    beaten = lease_keeper._Stream._beaten

    async def broken(stream: Any, call: Any) -> None:
        if stream._instance.incarnation == 2:
            raise ZeroDivisionError
        await beaten(stream, call)

    monkeypatch.setattr(lease_keeper._Stream, "_beaten", broken)
    async with granting() as granter:
        granter.list(instance.info(), replace(other.info(), instance_id=InstanceId("decode-1")))
        await until(lambda: instance.beats > 3)
        assert other.beats == 0
    assert other.server is not None
    await other.server.close(0)
