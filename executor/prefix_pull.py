"""Reads into this instance's prefix cache what another one's has of a prompt.

    decode ──▶ prefill   what only decode has of a prompt, instead of computing it
    decode ──▶ decode    a backup: what a running sequence has so far (decode_worker/backup.py)

It is a small handover: the one who has it pins and offers; the one who lacks it reserves, reads,
verifies and adopts. Whatever goes wrong, nothing is cached, and the blocks that were reserved come
back after the fence.
"""

import asyncio
from dataclasses import replace

from baton.core.errors import BatonError, WrongKV
from baton.core.handover import Offer, Open
from baton.core.ids import SeqId
from baton.core.log import get_logger
from baton.engine.step import Reserved
from baton.executor.handover_orders import HandoverTerms, ReadOrder
from baton.executor.instance import Instance
from baton.kv_transfer.plan import TokenRange

_ROOM_TIMEOUT_S = 0.2
"""For room in the pool: where there is none at once, computing is the better use of what comes."""

_log = get_logger("pull")


class PrefixPull:
    """One pull; `run` it as a task that outlives whoever waits for it, to pass its fence."""

    def __init__(self, instance: Instance, open_: Open, offer: Offer, pulls: "PullTable") -> None:
        size = instance.layout.block_size
        self._tokens = TokenRange(
            offer.first_block * size, (offer.first_block + len(offer.blocks)) * size
        )
        prompt = open_.request.prompt[: self._tokens.end]
        self._instance = instance
        self._open = open_
        self._offer = offer
        self._pulls = pulls
        self._request = replace(open_.request, prompt=prompt, max_tokens=1, resumed=0)
        self._timeout_s = instance.config.handover.read_timeout_s

    def __repr__(self) -> str:
        return f"PrefixPull({self._open.request.request_id}, {self._tokens})"

    async def run(self) -> None:
        """Pull; ends with the blocks in the cache, or given back."""
        try:
            seq_id = self._instance.engine.reserve(self._request)
        except BatonError as error:
            self._give_up(error)
            return
        try:
            granted = await self._granted(seq_id)
            if granted.cached < self._offer.first_block:
                self._give_up("what comes before has left the cache")
            elif await self._read(granted):
                self._instance.engine.adopt(seq_id)
                self._pulls.blocks += len(granted.blocks) - granted.cached
        except (BatonError, TimeoutError) as error:
            self._give_up(error)
        finally:
            self._instance.engine.release(seq_id)  # which leaves alone what was adopted or fenced

    async def _granted(self, seq_id: SeqId) -> Reserved:
        waiting = self._pulls.wait_for(seq_id)
        try:
            async with asyncio.timeout(_ROOM_TIMEOUT_S):
                return await waiting
        finally:
            self._pulls.forget(seq_id)

    async def _read(self, granted: Reserved) -> bool:
        """Read what the cache lacks, and verify it; False if it is not what was offered."""
        engine, open_, offer = self._instance.engine, self._open, self._offer
        size = self._instance.layout.block_size
        lacking = TokenRange(granted.cached * size, self._tokens.end)
        offered = offer.blocks[granted.cached - offer.first_block :]
        ours = tuple(ref.block for ref in granted.blocks[granted.cached :])
        handover = self._instance.handover(
            HandoverTerms(
                open_.layout,
                self._instance.sharded,
                open_.compatibility,
                open_.ticket,
                open_.request.prompt,
            )
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                await handover.connect(open_.transports, open_.place_blocks)
                await handover.read(ReadOrder(offer.layers, lacking, offered, ours))
        except WrongKV as error:
            _log.warning("wrong KV in a pull", error=str(error), pull=repr(self))
            self._pulls.wrong += 1
            await handover.close()
            return False
        except BaseException:
            engine.fence(granted.seq_id)
            await handover.close()  # returns when nothing of it can write any more
            engine.fence_passed(granted.seq_id)
            raise
        await handover.close()
        return True

    def _give_up(self, why: object) -> None:
        _log.info("pull given up", pull=repr(self), why=str(why))


class PullTable:
    """The pulls that wait for room, and what all of them have brought."""

    def __init__(self) -> None:
        self.blocks = 0
        """That were read and adopted."""
        self.wrong = 0
        """Pulls whose KV was not what was offered."""
        self._waiting: dict[SeqId, asyncio.Future[Reserved]] = {}

    def wait_for(self, seq_id: SeqId) -> "asyncio.Future[Reserved]":
        """Return a future that is done once the reservation is granted."""
        self._waiting[seq_id] = asyncio.get_running_loop().create_future()
        return self._waiting[seq_id]

    def forget(self, seq_id: SeqId) -> None:
        """Wait for it no more."""
        self._waiting.pop(seq_id, None)

    def granted(self, event: Reserved) -> None:
        """The engine has room."""
        waiting = self._waiting.get(event.seq_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(event)
