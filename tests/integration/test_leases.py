"""A worker whose lease ends gives everything back, and serves again when it is renewed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.core.lease import Beat, Leave, Report, Standing
from baton.core.topology import InstanceInfo
from baton.proto.convert_lease import beat_proto, report_core
from baton.proto.lease_pb2_grpc import LeaseStub
from baton.proto.worker_pb2_grpc import DecodeStub

PATIENCE_S = 60.0
FOR_EVER_S = 3600.0


class Granter:
    """Beats by hand."""

    def __init__(self, call: Any, incarnation: int) -> None:
        self._call = call
        self._incarnation = incarnation

    async def beat(self, lease_s: float) -> Report:
        await self._call.write(self._message(lease_s))
        return report_core(await asyncio.wait_for(self._call.read(), PATIENCE_S))

    async def leave(self, leave: Leave) -> None:
        await self._call.write(self._message(FOR_EVER_S, leave))

    async def until(self, standing: Standing, lease_s: float) -> None:
        """Beat until the worker stands so."""
        async with asyncio.timeout(PATIENCE_S):
            while (await self.beat(lease_s)).standing is not standing:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def _message(self, lease_s: float, leave: Leave | None = None) -> Any:
        return beat_proto(Beat("controller/1", 3, lease_s, controls=True), self._incarnation, leave)


@asynccontextmanager
async def granting(info: InstanceInfo) -> AsyncIterator[Granter]:
    async with grpc.aio.insecure_channel(info.address) as channel:
        yield Granter(LeaseStub(channel).Hold(), info.incarnation)


async def test_decode_ends_its_requests_when_its_lease_ends(
    start_pair: Any, demo_model_dir: Path, tools: Any
) -> None:
    pair = await start_pair(demo_model_dir)
    prompt = tools.prompt(tuple(range(100, 140)), 3000)
    async with granting(pair.decode.info) as granter:
        report = await granter.beat(FOR_EVER_S)
        assert report.standing is Standing.HELD
        assert report.epoch == 3
        answer = await pair.session.submit(prompt, [pair.ref])
        await asyncio.wait_for(answer.first.wait(), PATIENCE_S)
        busy = await granter.beat(FOR_EVER_S)
        assert (busy.open_requests, busy.running) == (1, 1)
        assert 0 < busy.blocks_used < busy.blocks_total
        await granter.beat(0.0)
        await answer.wait()
        assert answer.reason == "error"
        assert answer.finish.error.code == "instance_lost"
        assert "fenced" in answer.finish.error.message
        refused = await (await pair.session.submit(prompt)).wait()
        assert refused.finish.error.code == "instance_lost"
        assert not refused.tokens
        await granter.until(Standing.HELD, FOR_EVER_S)
        pair.decode.check()
        [again] = await pair.session.run([tools.prompt(prompt.tokens, 8)], [pair.ref])
        assert len(again.tokens) == 8


async def test_decode_greets_no_gateway_while_it_is_fenced(
    start_pair: Any, demo_model_dir: Path
) -> None:
    pair = await start_pair(demo_model_dir)
    async with granting(pair.decode.info) as granter:
        await granter.until(Standing.FENCED, 0.0)
        async with grpc.aio.insecure_channel(pair.decode.info.address) as channel:
            hello = asyncio.create_task(DecodeStub(channel).Session().read())
            for _ in range(50):  # as many answers, and none of them is a greeting
                assert (await granter.beat(0.0)).standing is Standing.FENCED
            assert not hello.done()
            await granter.until(Standing.HELD, FOR_EVER_S)
            frame = await asyncio.wait_for(hello, PATIENCE_S)
            assert frame.hello.instance_id == pair.decode.info.instance_id


async def test_prefill_that_is_fenced_costs_no_request(
    start_pair: Any, demo_model_dir: Path, tools: Any
) -> None:
    pair = await start_pair(demo_model_dir)
    prompt = tools.prompt(tuple(range(100, 140)), 8)
    [right] = await pair.session.run([prompt], [pair.ref])
    async with granting(pair.prefill.info) as granter:
        await granter.until(Standing.FENCED, 0.0)
        [answer] = await pair.session.run([prompt], [pair.ref])
        assert answer.tokens == right.tokens
        assert answer.finish.local_prefill
        assert [trace.outcome for trace in answer.finish.handovers] == ["unavailable"]
        await granter.until(Standing.HELD, FOR_EVER_S)
        [answer] = await pair.session.run([prompt], [pair.ref])
        assert not answer.finish.local_prefill


async def test_who_is_replaced_never_serves_again(
    start_pair: Any, demo_model_dir: Path, tools: Any
) -> None:
    pair = await start_pair(demo_model_dir)
    async with granting(pair.decode.info) as granter:
        await granter.beat(FOR_EVER_S)
        await granter.leave(Leave.REVOKE)
    async with granting(pair.decode.info) as granter:
        await granter.until(Standing.FENCED, FOR_EVER_S)
        answer = await (await pair.session.submit(tools.prompt((1, 2, 3), 8))).wait()
        assert answer.finish.error.code == "instance_lost"


async def test_a_worker_that_nobody_leases_serves(
    start_pair: Any, demo_model_dir: Path, tools: Any
) -> None:
    pair = await start_pair(demo_model_dir)
    async with granting(pair.decode.info) as granter:
        await granter.beat(FOR_EVER_S)
        await granter.leave(Leave.GOODBYE)
    [answer] = await pair.session.run([tools.prompt((1, 2, 3), 8)])
    assert len(answer.tokens) == 8


async def test_another_incarnation_is_not_leased(start_pair: Any, demo_model_dir: Path) -> None:
    pair = await start_pair(demo_model_dir)
    async with grpc.aio.insecure_channel(pair.decode.info.address) as channel:
        granter = Granter(LeaseStub(channel).Hold(), 1)
        with pytest.raises((grpc.aio.AioRpcError, AttributeError)):
            await granter.beat(FOR_EVER_S)
