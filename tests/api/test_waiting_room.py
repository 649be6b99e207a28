"""Requests that wait at a gateway, in front of an instance that takes sixteen and a few more."""

import asyncio
from contextlib import aclosing

import pytest

from baton.api.peers import Ended
from baton.api.validate import TextRequest, completion_call
from baton.core.errors import Cancelled, Overloaded, Unavailable
from baton.core.tenants import ANYBODY, Caller, Tenant
from baton.core.topology import Membership, Role

SOON = 60


@pytest.fixture
def request_for(served_model):
    def make(prompt="hello", **fields: object) -> TextRequest:
        return completion_call({"prompt": prompt, "seed": 1, **fields}, served_model).requests[0]

    return make


async def collect(gateway, request):
    async with aclosing(gateway.generate(request)) as pieces:
        return "".join([piece.text async for piece in pieces])


@pytest.fixture
def held(leader, text_script):
    """A leader that stops after one token of each request until it is told to go on."""
    leader.script = text_script("one two three", hold_after=1)
    return leader


@pytest.fixture
async def crowd(make_gateway, held, request_for, until):
    """A gateway with two requests open, which is all it may have, and one that waits."""
    async with make_gateway(max_open_requests=2, max_queued_requests=2) as gateway:
        tasks = [asyncio.create_task(collect(gateway, request_for())) for _ in range(2)]
        await until(lambda: held.running == 2)
        waiting = asyncio.create_task(collect(gateway, request_for()))
        await until(lambda: gateway.stats().queued == 1)
        yield gateway, waiting
        held.resume()
        assert await asyncio.gather(*tasks) == ["one two three"] * 2
    gateway.check()


async def test_who_waits_is_served_when_another_ends(crowd, held):
    gateway, waiting = crowd
    assert b'baton_queued_requests{model="demo"} 1.0' in gateway.metrics.render()
    held.resume()
    assert await waiting == "one two three"
    request = held.submits[2].request.request_id
    trace = gateway.trace(request)
    assert 0 < trace.queue_s <= trace.ttft_s <= trace.e2e_s
    assert trace.served_ttft_s == pytest.approx(trace.ttft_s - trace.queue_s)
    text = gateway.metrics.render()
    assert b'baton_queued_requests{model="demo"} 0.0' in text
    assert b"baton_queue_seconds_count" in text


async def test_who_is_cancelled_while_it_waits_leaves_nothing_behind(crowd, until):
    gateway, waiting = crowd
    waiting.cancel()
    await until(lambda: gateway.stats().queued == 0)
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_who_waits_can_be_cancelled_by_its_tenant_and_by_nobody_else(
    make_gateway, held, request_for, until
):
    async with make_gateway(max_open_requests=1) as gateway:
        first = asyncio.create_task(collect(gateway, request_for()))
        await until(lambda: held.running == 1)
        request = request_for()
        waiting = asyncio.create_task(collect(gateway, request))
        last = asyncio.create_task(collect(gateway, request_for()))
        await until(lambda: gateway.stats().queued == 2)
        name = request.generate.request_id
        assert gateway.cancel(name, Caller(Tenant(name="stranger"))) == Ended(0, 0)
        assert gateway.cancel(name, ANYBODY) == Ended(requests=1, waiting=1)
        assert gateway.cancel(name, ANYBODY) == Ended(0, 0)
        with pytest.raises(Cancelled, match="while it waited"):
            await waiting
        held.resume()
        assert await asyncio.gather(first, last) == ["one two three"] * 2
        assert len(held.submits) == 2, "nothing was computed for it"
    gateway.check()


async def test_no_more_wait_than_may(crowd, request_for, until, held):
    gateway, waiting = crowd
    second = asyncio.create_task(collect(gateway, request_for()))
    await until(lambda: gateway.stats().queued == 2)
    with pytest.raises(Overloaded, match="2 requests wait") as refused:
        await collect(gateway, request_for())
    assert refused.value.reason == "queue_full"
    assert refused.value.retry_after_s >= 1
    assert (
        b'baton_refused_requests_total{model="demo",reason="queue_full"} 1.0'
        in gateway.metrics.render()
    )
    held.resume()
    assert await asyncio.gather(waiting, second) == ["one two three"] * 2


async def test_who_waits_is_refused_when_the_gateway_goes(crowd):
    gateway, waiting = crowd
    drain = asyncio.create_task(gateway.drain(SOON))
    with pytest.raises(Unavailable, match="shutting down"):
        await waiting
    drain.cancel()


async def test_nobody_waits_for_longer_than_its_deadline(make_gateway, held, request_for, until):
    async with make_gateway(max_open_requests=1, queue_timeout_s=0.05) as gateway:
        first = asyncio.create_task(collect(gateway, request_for()))
        await until(lambda: held.running == 1)
        with pytest.raises(Overloaded, match="no place came free") as refused:
            await collect(gateway, request_for())
        assert refused.value.reason == "queue_timeout"
        assert len(held.submits) == 1, "nothing was computed for it"
        held.resume()
        await first
    gateway.check()


async def test_no_more_is_sent_to_an_instance_than_keeps_it_busy(
    make_gateway, held, request_for, until
):
    async with make_gateway(decode_fill=0.25) as gateway:
        tasks = [asyncio.create_task(collect(gateway, request_for())) for _ in range(6)]
        await until(lambda: gateway.stats().queued == 2 and held.running == 4)
        stats = gateway.stats().models["demo"]
        assert stats.queue_for is Role.DECODE
        assert stats.queue_s > 0
        held.resume()
        assert await asyncio.gather(*tasks) == ["one two three"] * 6
    gateway.check()


async def test_who_waits_goes_to_an_instance_that_comes(
    make_gateway, board, held, make_leader, request_for, until
):
    async with make_gateway(decode_fill=0.0625) as gateway:
        first = asyncio.create_task(collect(gateway, request_for()))
        await until(lambda: held.running == 1)
        second = asyncio.create_task(collect(gateway, request_for()))
        await until(lambda: gateway.stats().queued == 1)
        other = await make_leader("decode-1", "elsewhere")
        board.publish(Membership(2, (*board.current.instances, other.info())))
        assert await second == "elsewhere"
        held.resume()
        assert await first == "one two three"
    gateway.check()


async def test_who_does_not_read_keeps_no_room_of_an_instance(
    make_gateway, leader, text_script, request_for, until
):
    leader.script = text_script("one two three")
    async with (
        make_gateway(decode_fill=0.0625) as gateway,
        aclosing(gateway.generate(request_for())) as slow,
    ):
        await anext(slow)
        await until(lambda: leader.running == 0)
        assert await collect(gateway, request_for()) == "one two three"
    gateway.check()


async def test_a_bug_in_front_of_an_instance_ends_that_request_alone(
    gateway, request_for, monkeypatch
):
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(gateway.models.by_name("demo")._router, "open", broken)
        with pytest.raises(Exception, match="a bug"):
            await collect(gateway, request_for())
    assert await collect(gateway, request_for()) == "def add(a, b):"
