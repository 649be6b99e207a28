"""A request goes on at its next token on another decode instance, and its reader never knows."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from baton.api.gateway import Gateway
from baton.api.journey import Journey
from baton.api.validate import TextRequest, completion_call
from baton.core.errors import (
    DeadlineExceeded,
    Draining,
    InstanceLost,
    InternalError,
    Overloaded,
    Unavailable,
    WrongKV,
)
from baton.core.ids import Incarnation
from baton.core.lease import Beat, Leave, Report, Standing
from baton.core.topology import Membership, MembershipBoard
from baton.core.trace import HandoverTrace
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as pb_grpc
from baton.proto.grpc_runtime import WorkerServer
from baton.proto.lease_service import add_lease_service

TEXT = "one two three four five six"
SOON = 30  # a deadline for events that are expected at once


@pytest.fixture
def request_for(served_model) -> Callable[..., TextRequest]:
    def make(**fields: object) -> TextRequest:
        call = {"prompt": "count", "seed": 1, "max_tokens": 50, **fields}
        return completion_call(call, served_model).requests[0]

    return make


@pytest.fixture
async def leaders(make_leader) -> list[Any]:
    """Both would say the same; the first holds after its second token."""
    return [await make_leader("decode-0", TEXT, hold_after=2), await make_leader("decode-1", TEXT)]


@pytest.fixture
def board(leaders) -> MembershipBoard:
    return MembershipBoard(Membership(1, tuple(leader.info() for leader in leaders)))


async def collect(gateway: Gateway, request: TextRequest) -> list[Any]:
    async with asyncio.timeout(SOON):
        return [piece async for piece in gateway.generate(request)]


def text_of(pieces: list[Any]) -> str:
    return "".join(piece.text for piece in pieces)


@pytest.fixture
def held(gateway, leaders, request_for, until) -> Callable[..., Any]:
    """Begin a request that the first leader holds after two tokens."""

    async def begin(**fields: object) -> tuple[TextRequest, asyncio.Task[list[Any]]]:
        request = request_for(**fields)
        task = asyncio.create_task(collect(gateway, request))
        await until(lambda: any(run.sent == 2 for run in _runs(leaders[0])))
        return request, task

    return begin


def _runs(leader: Any) -> list[Any]:
    return [run for stream in leader._streams for run in stream.running.values()]


async def test_the_reader_of_a_lost_instance_sees_one_stream(gateway, leaders, held, tokenizer):
    request, task = await held()
    await leaders[0].close()
    pieces = await task
    assert text_of(pieces) == TEXT
    assert [t for piece in pieces for t in piece.tokens] == tokenizer.encode(TEXT)
    (told,) = leaders[1].submits
    prompt = request.generate.prompt
    assert tuple(told.request.prompt) == prompt + tuple(tokenizer.encode(TEXT)[:2])
    assert (told.request.resumed, told.request.max_tokens) == (2, 50)
    assert told.request.seed == leaders[0].submits[0].request.seed
    assert 0 < told.timeout_s < gateway.config.request_timeout_s


async def test_the_trace_and_the_metrics_name_the_move(gateway, leaders, held, text_script):
    ok = HandoverTrace("prefill-0", 0, "ok")
    leaders[1].script = text_script(TEXT, handovers=(ok,), cached_tokens=48)
    request, task = await held()
    await leaders[0].close()
    await task
    trace = gateway.trace(request.generate.request_id)
    (move,) = trace.migrations
    assert (move.instance, move.error, move.output_tokens) == ("decode-0", "instance_lost", 2)
    assert move.wait_s >= 0
    assert (trace.decode_instance, trace.handovers) == ("decode-1", (ok,))
    assert trace.prompt_tokens == len(request.generate.prompt), "output is no prompt"
    assert trace.cached_tokens == 0, "what a cache has of a resumed request is not the prompt's"
    assert trace.as_dict()["migrations"][0]["instance"] == "decode-0"
    text = gateway.metrics.render().decode()
    assert 'baton_migrations_total{reason="instance_lost"} 1.0' in text
    assert 'baton_requests_total{model="demo",outcome="length"} 1.0' in text


@pytest.mark.parametrize(("backed_up", "next_"), [(48, "decode-2"), (0, "decode-1")])
async def test_it_goes_on_where_it_was_backed_up_to(
    make_gateway, make_leader, text_script, request_for, until, backed_up, next_
):
    """Of three, the second is the less loaded, and the third has the KV."""
    one = await make_leader("decode-0", TEXT, hold_after=2, backed_up_tokens=backed_up)
    two = await make_leader("decode-1", TEXT, hold_after=1)
    three = await make_leader("decode-2", TEXT, cached_tokens=32)
    board = MembershipBoard(Membership(1, (one.info(), three.info())))
    async with make_gateway(board=board) as gateway:
        request = request_for()
        task = asyncio.create_task(collect(gateway, request))
        await until(lambda: any(run.sent == 2 for run in _runs(one)))
        assert one.submits[0].backup.instance_id == "decode-2"
        everybody = Membership(2, (one.info(), two.info(), three.info()))
        board.publish(everybody)
        await until(lambda: sum(s.ready for s in gateway.stats().sessions) == 3)
        two.resume()
        await one.close()
        assert text_of(await task) == TEXT
    gateway.check()
    trace = gateway.trace(request.generate.request_id)
    (move,) = trace.migrations
    assert (trace.decode_instance, move.backed_up_tokens) == (next_, backed_up)
    assert move.cached_tokens == (32 if backed_up else 0)
    assert trace.cached_tokens == 0


async def test_a_stop_string_that_straddles_the_break_is_found(gateway, held, leaders):
    _, task = await held(stop=["two three"])
    await leaders[0].close()
    pieces = await task
    assert (text_of(pieces), pieces[-1].finish) == ("one ", "stop")


async def test_logprobs_go_on_over_the_break(leaders, held):
    _, task = await held(logprobs=1)
    await leaders[0].close()
    pieces = await task
    assert sum(len(p.logprobs) for p in pieces) == sum(len(p.tokens) for p in pieces) > 2


async def test_a_request_without_a_token_yet_begins_anew(gateway, leaders, request_for, until):
    leaders[0].script = _holding_at_once(leaders[1].script)
    task = asyncio.create_task(collect(gateway, request_for()))
    await until(lambda: leaders[0].running == 1)
    await leaders[0].close()
    assert text_of(await task) == TEXT
    assert leaders[1].submits[0].request.resumed == 0


def _holding_at_once(script: Any) -> Any:
    return lambda request: replace(script(request), hold_after=0)


async def test_nothing_is_asked_for_where_only_the_last_word_was_lost(
    gateway, leaders, held, request_for
):
    _, task = await held(max_tokens=2)
    await leaders[0].close()
    pieces = await task
    assert [len(p.tokens) for p in pieces if p.tokens] == [1, 1]
    assert pieces[-1].finish == "length"
    assert not leaders[1].submits


async def test_an_instance_that_drains_costs_no_migration(
    make_gateway, leaders, request_for, text_script
):
    refused = Draining("decode-0 is about to leave")
    leaders[0].script = text_script("", error=refused)
    async with make_gateway(max_migrations=0) as gateway:
        for _ in range(3):
            request = request_for()
            assert text_of(await collect(gateway, request)) == TEXT
        assert len(leaders[0].submits) == 1, "it is asked no more"
        assert gateway.trace(request.generate.request_id).migrations == ()
        assert 'reason="draining"} 1.0' in gateway.metrics.render().decode()
    gateway.check()


@pytest.mark.parametrize("error", [InternalError("a bug"), WrongKV("it differs")])
async def test_other_errors_end_the_request(gateway, leaders, request_for, text_script, error):
    leaders[0].script = text_script("", error=error)
    with pytest.raises(type(error), match=str(error)):
        await collect(gateway, request_for())
    assert not leaders[1].submits


async def test_too_many_losses_end_in_one_clear_error(
    make_gateway, leaders, request_for, text_script
):
    for leader in leaders:
        leader.script = text_script("", error=InstanceLost("a rank is gone"))
    async with make_gateway(max_migrations=1) as gateway:
        with pytest.raises(InstanceLost, match=r"lost 2 times.*a rank is gone"):
            await collect(gateway, request_for())
        assert [len(leader.submits) for leader in leaders] == [1, 1]
    gateway.check()


async def test_a_full_instance_is_asked_again_for_a_request_that_was_admitted(
    leaders, held, text_script
):
    answers = iter([text_script("", error=Overloaded("full", 0.01)), leaders[1].script])
    leaders[1].script = lambda request: next(answers)(request)
    _, task = await held()
    await leaders[0].close()
    assert text_of(await task) == TEXT
    assert len(leaders[1].submits) == 2


async def test_when_to_come_back_is_told_by_the_decode_instance(
    gateway, leaders, request_for, text_script
):
    leaders[0].script = text_script("", error=Overloaded("full", 17.5))
    with pytest.raises(Overloaded) as caught:
        await collect(gateway, request_for())
    assert caught.value.retry_after_s == 17.5


async def test_with_nobody_there_it_waits_for_the_pool_to_heal(
    make_gateway, board, leaders, make_leader, request_for, until
):
    board.publish(Membership(2, (leaders[0].info(),)))
    async with make_gateway() as gateway:
        task = asyncio.create_task(collect(gateway, request_for()))
        await until(lambda: any(run.sent == 2 for run in _runs(leaders[0])))
        await leaders[0].close()
        await until(lambda: gateway.health() != [])
        board.publish(Membership(3, ()))
        reborn = await make_leader("decode-0", TEXT)
        board.publish(Membership(4, (reborn.info(),)))
        assert text_of(await task) == TEXT
    gateway.check()


class _LeaseHolder:
    """Stands as it is told to."""

    def __init__(self, incarnation: Incarnation) -> None:
        self.incarnation = incarnation
        self.standing = Standing.HELD

    def beat(self, beat: Beat) -> Report:
        return Report(self.standing, epoch=beat.epoch)

    def left(self, last: Beat, leave: Leave) -> None:
        pass


async def test_it_goes_on_with_the_only_instance_once_that_has_its_lease_again(
    make_gateway, board, leaders, request_for, until
):
    """Its session is ready again before its lease is: both must wake who waits for it."""
    holder = _LeaseHolder(leaders[0].incarnation)
    await _serve_leases(leaders[0], holder)
    info = leaders[0].info()
    board.publish(Membership(2, (info,)))
    async with make_gateway(lease_s=1.0) as gateway:
        await until(lambda: gateway.models.by_name("demo")._leases.report(info) is not None)
        task = asyncio.create_task(collect(gateway, request_for()))
        await until(lambda: any(run.sent == 2 for run in _runs(leaders[0])))
        leaders[0].script = leaders[1].script
        holder.standing = Standing.FENCED
        await until(lambda: gateway.health() != [])
        await until(lambda: any(s.ready for s in gateway.stats().sessions))
        assert gateway.health() != []
        holder.standing = Standing.HELD
        assert text_of(await task) == TEXT
    gateway.check()


async def _serve_leases(leader: Any, holder: _LeaseHolder) -> None:
    """Start a leader again, now with the Lease service."""
    await leader.close()

    def register(server: Any) -> None:
        pb_grpc.add_DecodeServicer_to_server(leader, server)
        add_lease_service(server, holder)

    leader._server = await WorkerServer.start("127.0.0.1", 0, register)


async def test_with_nobody_in_time_it_ends(make_gateway, board, leaders, request_for, until):
    board.publish(Membership(2, (leaders[0].info(),)))
    async with make_gateway(migration_wait_s=0.05) as gateway:
        task = asyncio.create_task(collect(gateway, request_for()))
        await until(lambda: any(run.sent == 2 for run in _runs(leaders[0])))
        await leaders[0].close()
        with pytest.raises(InstanceLost, match=r"within 0\.05 s; it ended with: decode-0"):
            await task
    gateway.check()


async def test_a_reader_that_leaves_calls_the_search_off(
    make_gateway, board, leaders, request_for, until
):
    board.publish(Membership(2, (leaders[0].info(),)))
    async with make_gateway() as gateway:
        request = request_for()
        async with aclosing(gateway.generate(request)) as pieces:
            await anext(pieces)
            await leaders[0].close()
            await until(lambda: gateway.health() != [])
        async with asyncio.timeout(SOON):
            await gateway.idle()
        assert gateway.trace(request.generate.request_id).finish == "cancelled"
    gateway.check()


async def test_the_search_ends_with_the_deadline_of_the_request(
    make_gateway, board, leaders, request_for
):
    board.publish(Membership(2, (leaders[0].info(),)))

    async def lose_it(gateway: Gateway) -> None:
        async with aclosing(gateway.generate(request_for())) as pieces:
            await anext(pieces)
            await leaders[0].close()
            async for _ in pieces:
                pass

    async with make_gateway(request_timeout_s=1.0) as gateway:
        with pytest.raises(DeadlineExceeded, match="longer than 1 s"):
            await lose_it(gateway)
    gateway.check()


async def test_a_gateway_that_closes_ends_the_search(
    make_gateway, board, leaders, request_for, until
):
    board.publish(Membership(2, (leaders[0].info(),)))
    gateway = make_gateway()
    await gateway.start()
    task = asyncio.create_task(collect(gateway, request_for()))
    await until(lambda: any(run.sent == 2 for run in _runs(leaders[0])))
    await leaders[0].close()
    await until(lambda: gateway.health() != [])
    await gateway.close()
    with pytest.raises(Unavailable, match="shutting down"):
        await task
    gateway.check()


async def test_a_bug_in_the_search_ends_the_request(gateway, leaders, held, monkeypatch):
    async def broken(self: Journey, error: Exception) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(Journey, "_find", broken)
    _, task = await held()
    await leaders[0].close()
    with pytest.raises(InternalError, match="a bug"):
        await task
    assert len(gateway._tasks.crashed) == 1
    gateway._tasks.crashed.clear()


async def test_keys_of_the_wire(leaders, held):
    """What a decode instance must know to go on is in one message."""
    _, task = await held(frequency_penalty=0.5, temperature=0.7)
    await leaders[0].close()
    await task
    first, second = leaders[0].submits[0].request, leaders[1].submits[0].request
    told = pb.Request()
    told.CopyFrom(second)
    del told.prompt[-2:]
    told.resumed = 0
    assert told == first


async def test_only_the_request_that_is_answered_wrongly_ends(
    gateway, leaders, held, request_for, text_script, until
):
    """It breaks the stream off; what else was on it goes on elsewhere."""
    good = leaders[0].script
    bad = replace(text_script(TEXT)(pb.Request(max_tokens=50)), tokens=[1] * 9)
    leaders[0].script = lambda request: bad if request.max_tokens == 3 else good(request)
    leaders[1].script = good  # holds too, and by its longer prompt stays the one with more load
    _, task = await held()
    longer = request_for(prompt="count " * 40)
    one_more = asyncio.create_task(collect(gateway, longer))
    await until(lambda: any(run.sent == 2 for run in _runs(leaders[1])))
    with pytest.raises(InternalError, match="decode-0 sent too many tokens"):
        await collect(gateway, request_for(max_tokens=3))
    leaders[1].resume()
    assert text_of(await task) == text_of(await one_more) == TEXT
