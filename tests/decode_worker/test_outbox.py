import asyncio

import pytest

from baton.core.spans import DecodeSpans
from baton.decode_worker.outbox import Outbox
from baton.proto import worker_pb2 as pb


async def test_everything_of_a_step_goes_out_in_one_frame() -> None:
    outbox = Outbox()
    for key in (3, 1, 2):
        outbox.token(key, key * 10)
    outbox.finish(1, pb.Finish(reason="length"))
    outbox.flush()
    frame = await outbox.next_frame()
    assert [(u.key, list(u.tokens), u.finish.reason) for u in frame.updates] == [
        (3, [30], ""),
        (1, [10], "length"),
        (2, [20], ""),
    ]


async def test_a_slow_reader_gets_fewer_and_larger_frames_and_loses_nothing() -> None:
    outbox = Outbox()
    for token in range(5):
        outbox.token(7, token)
        outbox.flush()
    outbox.finish(8, pb.Finish(reason="cancelled"))
    outbox.flush()
    frame = await outbox.next_frame()
    assert [(u.key, list(u.tokens)) for u in frame.updates] == [(7, [0, 1, 2, 3, 4]), (8, [])]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(outbox.next_frame(), 0.01)


async def test_nothing_goes_out_before_the_step_is_over() -> None:
    outbox = Outbox()
    outbox.token(1, 1)
    waiting = asyncio.create_task(outbox.next_frame())
    await asyncio.sleep(0)
    outbox.token(2, 2)
    assert not waiting.done()
    outbox.flush()
    assert len((await asyncio.wait_for(waiting, 20)).updates) == 2


async def test_an_empty_step_wakes_nobody() -> None:
    outbox = Outbox()
    outbox.flush()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(outbox.next_frame(), 0.01)


async def test_logprobs_stay_beside_their_tokens() -> None:
    outbox = Outbox()
    told = [pb.TokenLogprobs(logprob=-float(i)) for i in range(3)]
    for token, logprobs in enumerate(told):
        outbox.token(7, token, logprobs)
        outbox.token(8, token)
    outbox.flush()
    with_logprobs, without = (await outbox.next_frame()).updates
    assert (list(with_logprobs.tokens), list(with_logprobs.logprobs)) == ([0, 1, 2], told)
    assert (list(without.tokens), list(without.logprobs)) == ([0, 1, 2], [])
    outbox.token(7, 3, told[0])
    outbox.flush()
    [update] = (await outbox.next_frame()).updates
    assert list(update.logprobs) == told[:1]


async def test_where_the_time_went_is_told_once_with_the_wait_in_the_outbox() -> None:
    now = 5.0
    outbox = Outbox(lambda: now)
    outbox.token(7, 1)
    outbox.first_token(7, DecodeSpans(decide_s=1.0))
    now = 5.5
    outbox.flush()
    [update] = (await outbox.next_frame()).updates
    assert (update.first_token.decide_s, update.first_token.outbox_s) == (1.0, 0.5)
    outbox.token(7, 2)
    outbox.flush()
    [update] = (await outbox.next_frame()).updates
    assert not update.HasField("first_token")
