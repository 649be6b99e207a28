import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from baton.api import decode_session
from baton.api.open_request import OpenRequest
from baton.api.validate import completion_call
from baton.core.errors import InstanceLost, InternalError
from baton.core.topology import Membership
from baton.proto import worker_pb2 as pb

SOON = 10  # a deadline for events that are expected at once


@pytest.fixture
def request_for(served_model):
    def make(**fields: object):
        return completion_call({"prompt": "hi", **fields}, served_model).requests[0]

    return make


async def text_of(gateway, request) -> str:
    return "".join([piece.text async for piece in gateway.generate(request)])


async def test_a_lost_session_is_opened_again_while_the_instance_is_listed(
    gateway, leader, request_for, text_script, until
):
    leader.script = text_script("one two three", hold_after=1)
    task = asyncio.create_task(text_of(gateway, request_for()))
    await until(lambda: leader.running == 1)
    leader.drop_sessions()
    await until(lambda: leader.running == 0)
    leader.resume()
    async with asyncio.timeout(SOON):
        assert await task == "one two three", "the instance itself goes on with it"
    assert [submit.request.resumed for submit in leader.submits] == [0, 1]
    assert await text_of(gateway, request_for()) == "one two three"
    assert [s.key for s in leader.submits] == [1, 1, 2], "keys are counted anew on a new stream"


async def test_an_instance_that_was_fenced_is_used_again_once_it_greets(
    gateway, leader, request_for, text_script, until
):
    """It is the only one: a request that came a moment too early goes on there."""
    right = leader.script
    leader.script = text_script("", error=InstanceLost("decode-0 is fenced"))
    leader.greeting.clear()
    task = asyncio.create_task(text_of(gateway, request_for()))
    await until(lambda: len(leader.submits) == 1)
    await until(lambda: not gateway.stats().sessions[0].ready)
    leader.script = right
    assert len(leader.submits) == 1, "it is asked no more while it does not greet"
    leader.greeting.set()
    async with asyncio.timeout(SOON):
        await task
    assert [submit.key for submit in leader.submits] == [1, 1]


async def test_a_cancel_that_is_never_answered_is_given_up(
    gateway, leader, request_for, text_script, monkeypatch
):
    monkeypatch.setattr(decode_session, "CANCEL_TIMEOUT_S", 0.02)
    leader.script = text_script("one two three", hold_after=1)
    leader.answers_cancel = False
    async with aclosing(gateway.generate(request_for())) as pieces:
        await anext(pieces)
    assert gateway.stats().sessions[0].open_requests == 1, "it is not over on the other side"
    async with asyncio.timeout(SOON):
        await gateway.idle()
    leader.resume()
    leader.script = text_script("four")
    assert await text_of(gateway, request_for()) == "four"
    assert gateway.stats().sessions[0].late_updates > 0, "what still came was ignored"


async def test_one_cancel_per_request(gateway, leader, request_for, text_script, until):
    leader.script = text_script("one two three", hold_after=1)
    async with aclosing(gateway.generate(request_for())) as pieces:
        await anext(pieces)
    async with asyncio.timeout(SOON):
        await gateway.idle()
    await text_of(gateway, request_for(stop=["one"]))
    async with asyncio.timeout(SOON):
        await gateway.idle()
    assert [leader.cancelled.get_nowait() for _ in range(leader.cancelled.qsize())] == [1, 2]


async def test_a_request_that_ended_by_itself_is_not_cancelled(gateway, leader, request_for):
    await text_of(gateway, request_for())
    await text_of(gateway, request_for())
    assert leader.cancelled.empty()


@pytest.mark.parametrize(
    ("finish", "error"),
    [("nonsense", "unknown reason 'nonsense'"), ("error", "failed without a reason")],
)
async def test_an_end_that_makes_no_sense_is_an_internal_error(
    gateway, leader, request_for, text_script, finish, error
):
    leader.script = text_script("one", finish=finish)
    with pytest.raises(InternalError, match=error):
        await text_of(gateway, request_for())


async def test_an_instance_that_does_not_greet_is_not_used(
    make_gateway, leader, monkeypatch, request_for
):
    monkeypatch.setattr(pb, "Hello", lambda **_: None)
    async with make_gateway() as gateway:
        assert gateway.health() == ["no decode instance is ready"]


async def test_an_instance_that_does_not_answer_at_all_is_waited_for_only_so_long(
    make_gateway, board, leader
):
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    host, port = silent.sockets[0].getsockname()
    instance = leader.info()
    await leader.close()
    board.publish(Membership(2, (replace(instance, address=f"{host}:{port}"),)))
    async with asyncio.timeout(SOON), make_gateway(connect_timeout_s=0.1) as gateway:
        assert gateway.health() == ["no decode instance is ready"]
    gateway.check()
    silent.close()


async def test_an_instance_that_leaves_while_it_is_connected_to_holds_up_nobody(
    make_gateway, board, leader, until
):
    connected = asyncio.Event()
    silent = await asyncio.start_server(lambda reader, writer: connected.set(), "127.0.0.1", 0)
    host, port = silent.sockets[0].getsockname()
    board.publish(Membership(2, (replace(leader.info(), address=f"{host}:{port}"),)))
    gateway = make_gateway(connect_timeout_s=600)
    starting = asyncio.create_task(gateway.start())
    async with asyncio.timeout(SOON):
        await connected.wait()
        board.publish(Membership(3, ()))
        await starting
        await until(lambda: not gateway.stats().sessions)
    await gateway.close()
    gateway.check()
    silent.close()


async def test_a_bug_in_one_session_leaves_the_others_alone(
    make_gateway, make_leader, leader, board, request_for, text_script, monkeypatch, until
):
    def broken(self: object, prompt_tokens: int) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(OpenRequest, "cached", broken)
    leader.script = text_script("one two three", hold_after=1)
    other = await make_leader("decode-1", "four", cached_tokens=1)
    board.publish(Membership(2, (leader.info(), other.info())))
    async with make_gateway() as gateway:
        held = asyncio.create_task(text_of(gateway, request_for()))
        await until(lambda: leader.running == 1)
        with pytest.raises(InternalError, match="the session with decode-1 failed"):
            await text_of(gateway, request_for())
        leader.resume()
        assert await held == "one two three"
        await until(lambda: all(session.ready for session in gateway.stats().sessions))
        gateway.check()
