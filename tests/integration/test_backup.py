"""What a decode instance keeps of another one's sequences, with real workers and real reads."""

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.core.errors import InvalidConfig
from baton.core.ids import RequestId
from baton.core.request import GenerateRequest
from baton.core.topology import Role
from baton.decode_worker.worker import DecodeWorker
from baton.engine.step import Reserved
from baton.executor.prefix_pull import PrefixPull
from baton.executor.rank_handover import RankHandover
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as pb_grpc

DRAW = random.Random(23)
PROMPT = tuple(DRAW.randrange(5, 900) for _ in range(100))
LONG = 2000
"""Tokens: an answer that does not end before its backup has begun."""
PATIENCE_S = 60.0
ON = {"backup": "peer", "backup_every_blocks": 1, "backup_round_blocks": 3}
"""Small portions, so that every answer takes several."""


@pytest.fixture
async def peer(tools: Any, demo_model_dir: Path) -> AsyncIterator[DecodeWorker]:
    """Another decode instance, which closes in good order: it checks that it holds nothing."""
    config = tools.worker_config(Role.DECODE, "decode-1", demo_model_dir, handover=ON)
    async with await DecodeWorker.start(config, on_progress=lambda _: None) as worker:
        yield worker


@pytest.fixture
async def pair(start_pair: Any, demo_model_dir: Path) -> Any:
    return await start_pair(demo_model_dir, decode={"handover": ON})


def taken(worker: DecodeWorker) -> tuple[Any, Any]:
    stats = worker.stats()
    return stats["backup_blocks_taken"], stats["backups_wrong"]


@pytest.mark.parametrize("by_handover", [True, False], ids=["handed over", "computed here"])
async def test_the_peer_goes_on_from_what_it_has(
    pair: Any, peer: DecodeWorker, tools: Any, by_handover: bool
) -> None:
    prompt = tools.prompt(PROMPT, LONG, temperature=0.9, seed=3)
    prefill = [pair.ref] if by_handover else []
    key, answer = await pair.session.submit_keyed(prompt, prefill, backup=tools.ref_of(peer.info))
    enough = len(PROMPT) + 20  # the prompt, and some of the answer
    await tools.eventually(lambda: answer.backed_up >= enough, "it is backed up", PATIENCE_S)
    await pair.session.cancel(key)
    await answer.wait()
    await tools.eventually(lambda: pair.decode.stats()["tasks"] == 0, "no backup is under way")
    has = 16 * taken(peer)[0]
    assert answer.backed_up <= has <= len(PROMPT) + len(answer.tokens)
    assert pair.decode.stats()["backup_blocks_given"] * 16 == has
    assert peer.stats()["prompt_tokens"] == 0, "what it keeps for others is no prompt of its own"
    told = len(answer.tokens)
    whole = replace(prompt, max_tokens=told + 20)
    [right] = await pair.session.run([whole])
    assert right.tokens[:told] == answer.tokens
    async with tools.open_session(peer.info.address) as session:
        [rest] = await session.run([replace(whole, output=tuple(answer.tokens))])
    assert rest.tokens == right.tokens[told:]
    # The last block before the next token is computed again if nothing follows it.
    assert rest.cached_tokens == min(has, (len(PROMPT) + told - 1) // 16 * 16)


async def test_what_is_wrong_is_not_kept(
    pair: Any, peer: DecodeWorker, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = RankHandover._digest

    def of_other_kv(handover: RankHandover, order: Any) -> list[bytes]:
        return [each[::-1] for each in digest(handover, order)]

    monkeypatch.setattr(RankHandover, "_digest", of_other_kv)
    prompt = tools.prompt(PROMPT, 40)
    answer = await pair.session.submit(prompt, backup=tools.ref_of(peer.info))
    await answer.wait()
    await tools.eventually(lambda: taken(peer)[1] > 0, "it was read, and found to be wrong")
    assert taken(peer)[0] == answer.backed_up == 0
    pool = peer.instance.engine.stats().scheduler.roster.memory.pool
    assert (pool.cached, pool.used, pool.fencing) == (0, 0, 0)


async def test_an_instance_that_dies_leaves_nothing_but_cache(
    start_process: Any,
    peer: DecodeWorker,
    tools: Any,
    demo_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between its offer and the reads."""
    config = tools.worker_config(Role.DECODE, "decode-0", demo_model_dir, handover=ON)
    doomed = await asyncio.to_thread(start_process, config)
    read = PrefixPull._read

    async def die(pull: PrefixPull, granted: Reserved) -> bool:
        doomed.send(signal.SIGKILL)
        await asyncio.to_thread(doomed.process.wait, PATIENCE_S)
        return await read(pull, granted)

    monkeypatch.setattr(PrefixPull, "_read", die)
    async with tools.open_session(doomed.info.address) as session:
        await session.submit(tools.prompt(PROMPT, LONG), backup=tools.ref_of(peer.info))
        await asyncio.to_thread(doomed.process.wait, PATIENCE_S)
    await tools.eventually(lambda: peer.stats()["tasks"] == 0, "it is over", PATIENCE_S)
    pool = peer.instance.engine.stats().scheduler.roster.memory.pool
    assert (pool.used, pool.fencing, taken(peer)[1]) == (0, 0, 0)
    assert pool.cached == taken(peer)[0]


async def test_a_peer_that_is_not_there_costs_the_request_nothing(
    pair: Any, peer: DecodeWorker, tools: Any
) -> None:
    [right] = await pair.session.run([tools.prompt(PROMPT, 40)])
    gone = tools.ref_of(peer.info)
    gone.address = "127.0.0.1:1"
    answer = await pair.session.submit(tools.prompt(PROMPT, 40), backup=gone)
    await answer.wait()
    assert (answer.tokens, answer.reason) == (right.tokens, "length")
    assert answer.backed_up == 0
    await tools.eventually(lambda: pair.decode.stats()["backups_failed"] > 0, "it was tried")
    await tools.eventually(lambda: pair.decode.stats()["tasks"] == 0, "nothing is left of it")


async def test_a_peer_whose_own_work_needs_the_room_takes_nothing(
    pair: Any, peer: DecodeWorker, tools: Any
) -> None:
    engine = peer.instance.engine
    pool = engine.stats().scheduler.roster.memory.pool
    request = of_size(pool.total - 2)
    seq_id = engine.reserve(request)
    await tools.eventually(
        lambda: engine.stats().scheduler.roster.granted == 1, "the pool is as good as full"
    )
    answer = await pair.session.submit(tools.prompt(PROMPT, 40), backup=tools.ref_of(peer.info))
    await answer.wait()
    await tools.eventually(lambda: peer.stats()["backups_declined"] > 0, "it was asked")
    assert taken(peer) == (0, 0)
    assert answer.backed_up == 0
    assert pair.decode.stats()["backups_failed"] == 0, "it said so in good order"
    await tools.eventually(lambda: pair.decode.stats()["tasks"] == 0, "nothing is left of it")
    engine.release(seq_id)


def of_size(blocks: int) -> GenerateRequest:
    return GenerateRequest(RequestId("its-own"), (7,) * (16 * blocks), 1)


async def test_an_instance_that_keeps_no_backups_says_so(
    start_pair: Any, demo_model_dir: Path, peer: DecodeWorker, tools: Any
) -> None:
    off = await start_pair(demo_model_dir)
    unwilling = tools.ref_of(off.decode.info)
    async with tools.open_session(peer.info.address) as session:
        answer = await session.submit(tools.prompt(PROMPT, 40), backup=unwilling)
        await answer.wait()
    await tools.eventually(lambda: peer.stats()["backups_failed"] > 0, "it was told so")
    assert answer.backed_up == 0
    answer = await off.session.submit(tools.prompt(PROMPT, 40), backup=tools.ref_of(peer.info))
    await answer.wait()
    assert taken(peer) == (0, 0), "off: nothing is copied"


async def test_a_message_that_makes_no_sense_is_refused(peer: DecodeWorker) -> None:
    async with grpc.aio.insecure_channel(peer.info.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await pb_grpc.DecodeStub(channel).Backup(pb.BackupRequest())
    assert peer.stats()["tasks"] == 0


@pytest.mark.parametrize(
    ("role", "options", "field"),
    [(Role.DECODE, {"prefix_cache": False}, "prefix_cache"), (Role.MIXED, {}, "handover.backup")],
)
async def test_where_it_cannot_work_it_is_refused_at_start(
    tools: Any, demo_model_dir: Path, role: Role, options: dict[str, Any], field: str
) -> None:
    config = tools.worker_config(role, "decode-0", demo_model_dir, handover=ON, **options)
    with pytest.raises(InvalidConfig, match=field):
        await DecodeWorker.start(config, on_progress=lambda _: None)
