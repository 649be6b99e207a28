import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from baton.api.decode_session import DecodeSession
from baton.api.validate import TextRequest, completion_call
from baton.core.errors import (
    DeadlineExceeded,
    InstanceLost,
    InternalError,
    Overloaded,
    Unavailable,
    WrongKV,
)
from baton.core.ids import InstanceId
from baton.core.topology import Membership, Role
from baton.core.trace import HandoverTrace

SOON = 10  # a deadline for events that are expected at once


@pytest.fixture
def request_for(served_model):
    def make(prompt="hello", **fields: object) -> TextRequest:
        return completion_call({"prompt": prompt, "seed": 1, **fields}, served_model).requests[0]

    return make


async def collect(gateway, request):
    pieces = [piece async for piece in gateway.generate(request)]
    text = "".join(piece.text for piece in pieces)
    return text, [token for piece in pieces for token in piece.tokens], pieces[-1].finish


async def test_the_text_and_tokens_of_the_leader_arrive(gateway, leader, request_for, tokenizer):
    text, tokens, finish = await collect(gateway, request_for(max_tokens=50))
    assert text == "def add(a, b):"
    assert tokens == tokenizer.encode(text)
    assert finish == "length"


async def test_what_the_leader_is_told(gateway, leader, request_for, board):
    prefill = replace(leader.info(Role.PREFILL), instance_id=InstanceId("prefill-0"))
    board.publish(Membership(2, (*board.current.instances, prefill)))
    request = request_for("hi there", max_tokens=7, temperature=0.5, top_k=4, top_p=0.25)
    await collect(gateway, request)
    (submit,) = leader.submits
    assert tuple(submit.request.prompt) == request.generate.prompt
    assert submit.request.request_id == request.generate.request_id
    assert submit.request.max_tokens == 7
    assert submit.request.temperature == 0.5
    assert submit.request.top_k == 4
    assert submit.request.top_p == 0.25
    assert submit.request.seed == 1
    assert [ref.instance_id for ref in submit.prefill] == ["prefill-0"]
    assert submit.prefill[0].incarnation == prefill.incarnation
    assert submit.timeout_s == pytest.approx(gateway.config.request_timeout_s, rel=0.1)


async def test_many_requests_share_one_stream_and_one_message_per_step(
    gateway, leader, request_for, text_script
):
    texts = {f"{i}": f"answer {i} " + "x y z " * i for i in range(12)}
    ids = {tuple(request_for(prompt).generate.prompt): text for prompt, text in texts.items()}
    leader.script = lambda request: text_script(ids[tuple(request.prompt)])(request)
    results = await asyncio.gather(
        *(collect(gateway, request_for(prompt, max_tokens=200)) for prompt in texts)
    )
    assert [text for text, _, _ in results] == list(texts.values())
    assert leader.frames < sum(len(tokens) for _, tokens, _ in results) / 2


async def test_a_stop_string_ends_the_text_and_cancels_the_rest(
    gateway, leader, request_for, text_script
):
    leader.script = text_script("one two three four five six", hold_after=5)
    text, tokens, finish = await collect(gateway, request_for(stop=["three"], max_tokens=50))
    assert (text, finish) == ("one two ", "stop")
    async with asyncio.timeout(SOON):
        await leader.cancelled.get()
        await gateway.idle()
    trace = gateway.trace(leader.submits[0].request.request_id)
    assert trace.finish == "stop"
    assert trace.output_tokens == len(tokens)


async def test_a_consumer_that_leaves_cancels_at_once(gateway, leader, request_for, text_script):
    leader.script = text_script("one two three four", hold_after=2)
    async with aclosing(gateway.generate(request_for(max_tokens=50))) as pieces:
        await anext(pieces)
        assert gateway.stats().open_requests == 1
    async with asyncio.timeout(SOON):
        assert await leader.cancelled.get() == leader.submits[0].key
        await gateway.idle()
    assert leader.running == 0
    assert gateway.trace(leader.submits[0].request.request_id).finish == "cancelled"


async def test_a_cancelled_consumer_cancels_at_once(
    gateway, leader, request_for, text_script, until
):
    leader.script = text_script("one two three four", hold_after=0)
    task = asyncio.create_task(collect(gateway, request_for()))
    await until(lambda: leader.running == 1)
    task.cancel()
    async with asyncio.timeout(SOON):
        await leader.cancelled.get()
        await gateway.idle()


async def test_beyond_the_bound_is_refused_and_then_let_in(
    make_gateway, leader, request_for, text_script, until
):
    leader.script = text_script("one two three", hold_after=1)
    async with make_gateway(max_open_requests=2, max_queued_requests=0) as gateway:
        tasks = [asyncio.create_task(collect(gateway, request_for())) for _ in range(2)]
        await until(lambda: leader.running == 2)
        with pytest.raises(Overloaded):
            await collect(gateway, request_for())
        leader.resume()
        await asyncio.gather(*tasks)
        assert (await collect(gateway, request_for()))[0] == "one two three"
        assert (
            b'baton_requests_total{model="demo",outcome="overloaded"} 1.0'
            in gateway.metrics.render()
        )
    gateway.check()


async def test_a_request_that_takes_too_long(make_gateway, leader, request_for, text_script):
    leader.script = text_script("one two three", hold_after=1)
    async with make_gateway(request_timeout_s=0.05) as gateway:
        with pytest.raises(DeadlineExceeded, match=r"0\.05 s"):
            await collect(gateway, request_for())
        async with asyncio.timeout(SOON):
            await leader.cancelled.get()
            await gateway.idle()
        trace = gateway.trace(leader.submits[0].request.request_id)
        assert (trace.finish, trace.error) == ("error", "deadline_exceeded")
    gateway.check()


async def test_an_error_of_the_leader_comes_after_the_text_before_it(
    gateway, leader, request_for, text_script
):
    leader.script = text_script("one two", error=WrongKV("digest differs"))
    shown = []

    async def show() -> None:
        async for piece in gateway.generate(request_for()):
            shown.append(piece.text)  # noqa: PERF401 - it raises in the middle

    with pytest.raises(WrongKV, match="digest differs"):
        await show()
    assert "".join(shown) == "one two"
    assert b'baton_requests_total{model="demo",outcome="wrong_kv"} 1.0' in gateway.metrics.render()


async def test_a_lost_leader_is_replaced_by_a_new_one(
    make_gateway, board, leader, make_leader, request_for, text_script, until
):
    leader.script = text_script("one two three", hold_after=1)
    async with make_gateway(max_migrations=0) as gateway:
        tasks = [asyncio.create_task(collect(gateway, request_for())) for _ in range(3)]
        await until(lambda: leader.running == 3)
        await leader.close()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, InstanceLost), "migration is switched off"
        with pytest.raises(Unavailable):
            await collect(gateway, request_for())
        assert gateway.health() == ["no decode instance is ready"]
        other = await make_leader(leader.name, "reborn")
        board.publish(Membership(2, (other.info(),)))
        await until(lambda: not gateway.health())
        assert (await collect(gateway, request_for()))[0] == "reborn"
        assert len(gateway.stats().sessions) == 1
    gateway.check()


async def test_a_session_is_not_opened_again_when_the_instance_is_no_longer_listed(
    make_gateway, board, leader, request_for, until
):
    async with make_gateway() as gateway:
        board.publish(Membership(2, ()))
        await until(lambda: not gateway.stats().sessions)
        with pytest.raises(Unavailable):
            await collect(gateway, request_for())
    gateway.check()


async def test_an_unlisted_instance_finishes_what_it_has(
    gateway, board, leader, request_for, text_script, until
):
    leader.script = text_script("one two three", hold_after=1)
    task = asyncio.create_task(collect(gateway, request_for()))
    await until(lambda: leader.running == 1)
    board.publish(Membership(2, ()))
    await until(lambda: gateway.health() != [])
    leader.resume()
    assert (await task)[0] == "one two three"
    await until(lambda: not gateway.stats().sessions)


async def test_a_session_with_another_incarnation_is_refused(make_gateway, leader, request_for):
    leader.claimed_incarnation = leader.incarnation + 2
    async with make_gateway() as gateway:
        with pytest.raises(Unavailable):
            await collect(gateway, request_for())
    assert not leader.submits


async def test_a_leader_that_sends_too_many_tokens_is_broken_off(
    gateway, leader, request_for, text_script
):
    script = text_script("one two three four five")
    leader.script = lambda request: replace(script(request), tokens=[1] * 9)
    with pytest.raises(InternalError, match="too many tokens"):
        await collect(gateway, request_for(max_tokens=3))


async def test_close_ends_open_requests_as_unavailable(
    make_gateway, leader, request_for, text_script, until
):
    leader.script = text_script("one two three", hold_after=1)
    gateway = make_gateway()
    await gateway.start()
    task = asyncio.create_task(collect(gateway, request_for()))
    await until(lambda: leader.running == 1)
    await gateway.close()
    with pytest.raises(Unavailable, match="shutting down"):
        await task
    gateway.check()
    with pytest.raises(Unavailable):
        await collect(gateway, request_for())


async def test_drain_lets_open_requests_end(make_gateway, leader, request_for, text_script, until):
    leader.script = text_script("one two three", hold_after=1)
    async with make_gateway() as gateway:
        task = asyncio.create_task(collect(gateway, request_for()))
        await until(lambda: leader.running == 1)
        drain = asyncio.create_task(gateway.drain(SOON))
        await until(lambda: gateway.health() != [])
        leader.resume()
        assert (await task)[0] == "one two three"
        await drain
    gateway.check()


async def test_a_slow_consumer_gets_everything_and_holds_nobody_up(
    gateway, leader, request_for, text_script, tokenizer, until
):
    leader.script = text_script("a b c d e f g h i j")
    async with aclosing(gateway.generate(request_for(max_tokens=50))) as slow:
        first = await anext(slow)
        assert (await collect(gateway, request_for(max_tokens=50)))[0] == "a b c d e f g h i j"
        await until(lambda: leader.running == 0)
        rest = [piece async for piece in slow]
    assert first.text + "".join(piece.text for piece in rest) == "a b c d e f g h i j"
    assert len(rest) < 9, "what waited comes at once"


async def test_trace_and_metrics_of_a_request(gateway, leader, request_for, text_script):
    handover = HandoverTrace("prefill-0", 0, "ok", transfer_s=0.5, bytes=1000, transport="cma")
    leader.script = text_script("one two three", handovers=(handover,))
    request = request_for(max_tokens=50)
    _, tokens, _ = await collect(gateway, request)
    trace = gateway.trace(request.generate.request_id)
    assert trace.handovers == (handover,)
    assert trace.decode_instance == "decode-0"
    assert trace.prompt_tokens == len(request.generate.prompt)
    assert trace.output_tokens == len(tokens)
    assert not trace.local_prefill
    assert len(trace.itl_s) == len(tokens) - 1
    assert 0 < trace.ttft_s <= trace.e2e_s
    assert sum(trace.itl_s) == pytest.approx(trace.tpot_s * (len(tokens) - 1))
    assert trace.ttft_s + sum(trace.itl_s) == pytest.approx(trace.e2e_s)
    text = gateway.metrics.render().decode()
    assert 'baton_requests_total{model="demo",outcome="length"} 1.0' in text
    assert 'baton_handovers_total{outcome="ok"} 1.0' in text
    assert 'baton_handover_bytes_total{transport="cma"} 1000.0' in text
    assert 'baton_handover_transfer_seconds_sum{transport="cma"} 0.5' in text
    assert f'baton_output_tokens_total{{model="demo"}} {len(tokens)}.0' in text
    assert 'baton_ttft_seconds_count{model="demo"} 1.0' in text
    assert f'baton_itl_seconds_count{{model="demo"}} {len(tokens) - 1}.0' in text
    assert 'baton_open_requests{model="demo"} 0.0' in text


async def test_only_the_last_traces_are_kept(make_gateway, leader, request_for):
    async with make_gateway(traces_kept=2) as gateway:
        requests = [request_for() for _ in range(3)]
        for request in requests:
            await collect(gateway, request)
        kept = [gateway.trace(request.generate.request_id) for request in requests]
        assert [trace is not None for trace in kept] == [False, True, True]


async def test_health_says_what_is_missing(make_gateway, board, leader):
    async with make_gateway(expects_prefill=True) as gateway:
        assert gateway.health() == ["no prefill instance is ready"]
        prefill = replace(leader.info(Role.PREFILL), instance_id=InstanceId("prefill-0"))
        board.publish(Membership(2, (*board.current.instances, prefill)))
        assert gateway.health() == []


async def test_a_request_waits_for_the_first_instance_of_an_empty_pool(
    make_gateway, board, leader, request_for, until
):
    instances = board.current.instances
    board.publish(Membership(2))
    async with make_gateway(may_be_empty=True, max_open_requests=2) as gateway:
        assert gateway.health() == []
        tasks = [asyncio.create_task(collect(gateway, request_for())) for _ in range(2)]
        await until(lambda: gateway.stats().waiting == 2)
        with pytest.raises(Overloaded, match="2 requests wait for a decode instance"):
            await collect(gateway, request_for())
        tasks[0].cancel()
        await until(lambda: gateway.stats().waiting == 1)
        board.publish(Membership(3, instances))
        assert (await tasks[1])[0] == "def add(a, b):"
        assert gateway.stats().waiting == 0
        assert (
            gateway.stats().models["demo"].ttft_s
            == gateway.trace(leader.submits[0].request.request_id).ttft_s
        )
    gateway.check()


async def test_a_request_for_an_empty_pool_is_refused_in_the_end(make_gateway, board, request_for):
    board.publish(Membership(2))
    async with make_gateway(may_be_empty=True, migration_wait_s=0.01) as gateway:
        with pytest.raises(Unavailable, match="no decode instance is ready"):
            await collect(gateway, request_for())


async def test_requests_that_wait_for_an_empty_pool_end_with_the_gateway(
    make_gateway, board, request_for, until
):
    board.publish(Membership(2))
    async with make_gateway(may_be_empty=True) as gateway:
        task = asyncio.create_task(collect(gateway, request_for()))
        await until(lambda: gateway.stats().waiting == 1)
        await gateway.drain(SOON)
        with pytest.raises(Unavailable, match="shutting down"):
            await task


async def test_a_failed_handover_moves_the_next_requests_to_other_prefill_instances(
    gateway, leader, request_for, board, text_script
):
    prefill = [
        replace(leader.info(Role.PREFILL), instance_id=InstanceId(f"prefill-{i}")) for i in range(2)
    ]
    board.publish(Membership(2, (*board.current.instances, *prefill)))
    leader.script = text_script("one")
    await collect(gateway, request_for())
    first, second = (ref.instance_id for ref in leader.submits[0].prefill)  # equals, in any order
    handovers = HandoverTrace(first, 0, "deadline_exceeded"), HandoverTrace(second, 1, "ok")
    leader.script = text_script("one", handovers=handovers)
    for _ in range(2):
        await collect(gateway, request_for())
    before, after = ([ref.instance_id for ref in s.prefill] for s in leader.submits[1:])
    assert (before, after) == ([first, second], [second, first])


async def test_a_bug_while_a_request_is_submitted_ends_that_request_alone(
    gateway, request_for, monkeypatch
):
    def broken(self, *_: object, **__: object) -> int:
        raise ValueError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(DecodeSession, "submit", broken)
        request = request_for()
        with pytest.raises(InternalError, match="a bug"):
            await collect(gateway, request)
    gateway.check()
    assert gateway.trace(request.generate.request_id).error == "internal"
    assert (await collect(gateway, request_for()))[0] == "def add(a, b):"


async def test_what_raises_before_a_request_is_admitted_holds_no_place(
    gateway, request_for, monkeypatch
):
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr("baton.api.validate.Detokenizer", broken)
        with pytest.raises(ValueError, match="a bug"):
            await collect(gateway, request_for())
    assert gateway.stats().models["demo"].router.open_requests == 0
    gateway.check()
