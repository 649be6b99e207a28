"""Faults end with the two oracles: the tokens of a run without faults, and nothing held.

The second is asserted by closing: a worker's `close` checks pool, transport and tasks.
"""

import asyncio
import itertools
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.core.ids import BlockId
from baton.core.topology import Role
from baton.decode_worker.attempt import HandoverAttempt
from baton.prefill_worker.session import HandoverSession

NEW_TOKENS = 12


@pytest.fixture
def prompts(tools: Any) -> list[Any]:
    draw = random.Random(11)
    return [
        tools.prompt(
            tuple(draw.randrange(1, 4000) for _ in range(n)), NEW_TOKENS, temperature=0.8, seed=n
        )
        for n in (20, 300, 65, 160)
    ]


@pytest.fixture
async def expected(start_pair: Any, demo_model_dir: Path, prompts: list[Any]) -> list[list[int]]:
    """The tokens of a run without faults, in one process."""
    pair = await start_pair(demo_model_dir)
    return [answer.tokens for answer in await pair.session.run(prompts)]


def outcomes(answer: Any) -> list[str]:
    return [trace.outcome for trace in answer.finish.handovers]


async def test_a_dead_prefill_instance_gives_way_to_the_next(
    start_pair: Any, demo_model_dir: Path, prompts: list[Any], expected: list[list[int]], tools: Any
) -> None:
    pair = await start_pair(demo_model_dir)
    dead = tools.ref_of(pair.prefill.info)
    dead.address, dead.instance_id = "127.0.0.1:1", "prefill-9"
    answers = await pair.session.run(prompts, [dead, pair.ref])
    assert [a.tokens for a in answers] == expected
    assert all(outcomes(a) == ["unavailable", "ok"] for a in answers)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
async def test_prefill_goes_away_in_the_middle_of_a_handover(
    start_pair: Any,
    start_process: Any,
    demo_model_dir: Path,
    prompts: list[Any],
    expected: list[list[int]],
    tools: Any,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    pair = await start_pair(demo_model_dir)
    # The first two prompts fill its pool; while nobody reads them, the others cannot begin.
    config = tools.worker_config(
        Role.PREFILL, "prefill-1", demo_model_dir, max_batch_tokens=16, kv_memory_mib=3
    )
    doomed = start_process(config)
    gone, reads = asyncio.Event(), itertools.count()
    read_now = HandoverAttempt._read

    async def read_one_and_wait(attempt: HandoverAttempt, *arguments: Any) -> None:
        if next(reads) > 0:
            await gone.wait()
        await read_now(attempt, *arguments)

    monkeypatch.setattr(HandoverAttempt, "_read", read_one_and_wait)
    answers = [await pair.session.submit(p, [doomed.ref]) for p in prompts]
    read = pair.decode.stats
    await tools.eventually(lambda: read().get("bytes_read_shm", 0) > 0, "a first read")
    doomed.send(number)
    gone.set()
    done = [await answer.wait() for answer in answers]
    assert [a.tokens for a in done] == expected
    assert all(a.finish.local_prefill for a in done[2:])

    # It comes back as a new incarnation, under the same name, and is used again.
    if number is signal.SIGSTOP:
        doomed.send(signal.SIGKILL)
    reborn = start_process(config)
    again = await pair.session.run(prompts, [reborn.ref])
    assert [a.tokens for a in again] == expected
    assert [outcomes(a) for a in again] == [["ok"]] * len(prompts)
    reborn.close()


def _corrupt(session: HandoverSession, action: Any, offered: Any) -> None:
    """Somebody else's KV lies in the block by the time it is read."""
    session._instance.kv.tensor[action.blocks[-1].block] += 1.0


def _forge_epoch(session: HandoverSession, action: Any, offered: Any) -> None:
    """The reference that travels names an epoch that is not the block's."""
    for block in offered:
        object.__setattr__(block, "ref", type(block.ref)(block.ref.block, block.ref.epoch + 1))


def _swap_block(session: HandoverSession, action: Any, offered: Any) -> None:
    """The reference that travels names another block."""
    total = session._instance.kv.num_blocks
    for block in offered:
        other = BlockId((block.ref.block + 1) % total)
        object.__setattr__(block, "ref", type(block.ref)(other, block.ref.epoch))


@pytest.mark.parametrize("fault", [_corrupt, _forge_epoch, _swap_block])
async def test_wrong_kv_never_reaches_a_token(
    start_pair: Any,
    demo_model_dir: Path,
    prompts: list[Any],
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[..., None],
) -> None:
    pair = await start_pair(demo_model_dir, prefill={"max_batch_tokens": 64})
    digest = HandoverSession._digest

    async def digest_then_fault(session: HandoverSession, action: Any) -> Any:
        offered = await digest(session, action)
        fault(session, action, offered)
        return offered

    monkeypatch.setattr(HandoverSession, "_digest", digest_then_fault)
    answers = await pair.session.run(prompts, [pair.ref])
    assert [outcomes(a) for a in answers] == [["wrong_kv"]] * len(prompts)
    assert [a.tokens for a in answers] == expected


async def test_blocks_freed_and_used_again_before_they_are_read(
    start_pair: Any,
    demo_model_dir: Path,
    prompts: list[Any],
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A late read of a stale reference finds another prompt's KV, and is refused."""
    pair = await start_pair(demo_model_dir, prefill={"kv_memory_mib": 3})
    held, go_on = asyncio.Event(), asyncio.Event()
    read = HandoverAttempt._read

    async def late_read(attempt: HandoverAttempt, action: Any) -> None:
        if attempt._open.request.request_id == "request-1":
            held.set()
            await go_on.wait()
        await read(attempt, action)

    monkeypatch.setattr(HandoverAttempt, "_read", late_read)
    victim = await pair.session.submit(prompts[1], [pair.ref])
    async with asyncio.timeout(20):
        await held.wait()
    # As a bug or a time-out on prefill's side would: its blocks go to the next prompts.
    [session] = list(pair.prefill._table.values())
    pair.prefill.instance.engine.release(session._seq_id)
    others = await pair.session.run([prompts[1], prompts[3]], [pair.ref])
    go_on.set()
    assert (await victim.wait()).tokens == expected[1]
    assert outcomes(victim) == ["wrong_kv"]
    assert [a.tokens for a in others] == [expected[1], expected[3]]


async def test_another_model_is_refused_by_the_handshake(
    start_pair: Any,
    demo_model_dir: Path,
    tiny_llama_dir: Path,
    prompts: list[Any],
    expected: list[list[int]],
) -> None:
    pair, other = await start_pair(demo_model_dir), await start_pair(tiny_llama_dir)
    answers = await pair.session.run(prompts, [other.ref])
    assert [outcomes(a) for a in answers] == [["incompatible"]] * len(prompts)
    assert [a.tokens for a in answers] == expected


async def test_cancelled_at_any_moment(
    start_pair: Any, demo_model_dir: Path, prompts: list[Any], expected: list[list[int]], tools: Any
) -> None:
    """Half of the requests are cancelled somewhere on their way; the others never notice."""
    pair = await start_pair(
        demo_model_dir, prefill={"max_batch_tokens": 32}, decode={"kv_memory_mib": 8}
    )
    draw = random.Random(3)
    kept, gone = [], []
    for round_ in range(6):
        for index, prompt in enumerate(prompts):
            prefill = [pair.ref] if (round_ + index) % 3 else []
            key, answer = await pair.session.submit_keyed(prompt, prefill)
            if draw.random() < 0.5:
                gone.append((key, answer))
            else:
                kept.append((index, answer))
        await asyncio.sleep(draw.random() * 0.05)
        draw.shuffle(gone)
        for key, _ in gone[: len(gone) // 2]:
            await pair.session.cancel(key)
    for key, _ in gone:
        await pair.session.cancel(key)
    for index, answer in kept:
        assert (await answer.wait()).tokens == expected[index]
    reasons = {(await answer.wait()).reason for _, answer in gone}
    assert reasons <= {"cancelled", "length"}
    assert "cancelled" in reasons
    await tools.eventually(lambda: pair.decode.stats()["blocks_used"] == 0, "decode frees")
    await tools.eventually(lambda: pair.prefill.stats()["blocks_used"] == 0, "prefill frees")


async def test_a_gateway_that_goes_away_takes_its_requests_along(
    start_pair: Any, demo_model_dir: Path, prompts: list[Any], tools: Any
) -> None:
    pair = await start_pair(demo_model_dir, prefill={"max_batch_tokens": 16})
    async with tools.open_session(pair.decode.info.address) as session:
        long = [tools.prompt(p.tokens, 500) for p in prompts]
        answers = [await session.submit(p, [pair.ref]) for p in long]
        async with asyncio.timeout(20):
            await answers[0].first.wait()
    await tools.eventually(lambda: pair.decode.stats()["open_requests"] == 0, "no request is open")
    await tools.eventually(lambda: pair.prefill.stats()["sessions"] == 0, "no session is open")
    # A step under way keeps its blocks to its end.
    await tools.eventually(lambda: pair.decode.stats()["blocks_used"] == 0, "decode frees")
    await tools.eventually(lambda: pair.prefill.stats()["blocks_used"] == 0, "prefill frees")


async def test_a_full_decode_pool_slows_prefill_down_and_loses_nothing(
    start_pair: Any, demo_model_dir: Path, prompts: list[Any], expected: list[list[int]]
) -> None:
    pair = await start_pair(
        demo_model_dir, prefill={"kv_memory_mib": 3}, decode={"kv_memory_mib": 3}
    )
    answers = await pair.session.run(prompts * 5, [pair.ref])
    assert [a.tokens for a in answers] == expected * 5
    assert {outcome for a in answers for outcome in outcomes(a)} == {"ok"}
    assert max(a.finish.handovers[0].allocation_wait_s for a in answers) > 0


async def test_a_request_that_takes_too_long_ends_with_a_clear_error(
    start_pair: Any, demo_model_dir: Path, prompts: list[Any], tools: Any
) -> None:
    pair = await start_pair(demo_model_dir)
    slow = tools.prompt(prompts[0].tokens, 3000)
    _, answer = await pair.session.submit_keyed(slow, [pair.ref], timeout_s=0.5)
    await answer.wait()
    assert (answer.reason, answer.finish.error.code) == ("error", "deadline_exceeded")
    assert "0.5 s" in answer.finish.error.message


async def test_a_request_that_never_fits_is_refused(
    start_pair: Any, demo_model_dir: Path, tools: Any
) -> None:
    pair = await start_pair(demo_model_dir, decode={"kv_memory_mib": 3})
    [answer] = await pair.session.run([tools.prompt(tuple(range(1, 1000)), 10)], [pair.ref])
    assert answer.finish.error.code == "invalid_request"


async def test_a_bug_in_an_attempt_costs_no_request(
    start_pair: Any,
    demo_model_dir: Path,
    prompts: list[Any],
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The owner is told at once, and computes the prompt itself; the crash is on record."""
    pair = await start_pair(demo_model_dir)

    async def broken(attempt: HandoverAttempt, action: Any, tasks: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(HandoverAttempt, "_perform", broken)
    answers = await pair.session.run(prompts, [pair.ref])
    assert [a.tokens for a in answers] == expected
    assert all(a.finish.local_prefill for a in answers)
    crashed = pair.decode._host.tasks.crashed
    assert len(crashed) == len(prompts)
    crashed.clear()
