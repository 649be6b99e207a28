"""All ranks' parts of one attempt of a handover, as the leader's state machine sees it: as one."""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

from baton.executor.handover_orders import DigestOrder, HandoverTerms, ReadOrder
from baton.executor.rank_group import RankGroup
from baton.executor.rank_handover import RankHandover
from baton.kv_transfer.transport import TransferReport


class MeshHandover:
    """Each call goes to all ranks, and ends when all have done their part; `close` it at the end.

    Calls may overlap.
    """

    def __init__(self, terms: HandoverTerms, own: RankHandover, ranks: RankGroup) -> None:
        """`own` is the leader's part."""
        self._terms = terms
        self._own = own
        self._ranks = ranks
        self._number = ranks.new_number()
        self._opened = False

    def __repr__(self) -> str:
        return f"MeshHandover({self._own!r}, {self._ranks!r})"

    async def connect(self, sources: Sequence[bytes], source_blocks: int) -> None:
        """Make the source ranks readable; raises TransportError. See RankHandover.connect."""
        own = self._own.connect(sources, source_blocks)
        await self._all(own, "connect", list(sources), source_blocks)

    async def read(self, order: ReadOrder) -> list[TransferReport]:
        """Read and verify; returns or raises once nothing of it can be written on any rank.

        Returns what each rank read, by its number. Raises TransportError if it cannot be read,
        WrongKV if it is not what was offered.
        """
        # What steps have written that have ended here, ranks behind may still be writing.
        own, others = await self._all(
            self._own.read(order), "read", self._ranks.steps_ended, order.pack()
        )
        return [own, *(TransferReport(*report) for report in others)]

    async def drop(self) -> None:
        """Close the peers' endpoints by force, so that reads under way end."""
        await self._all(self._own.drop(), "drop")

    async def digest(self, order: DigestOrder) -> list[bytes]:
        """Return the digests of each block, those of all ranks end to end, in order."""
        own, others = await self._all(
            self._own.digest(order), "digest", self._ranks.progress, order.pack()
        )
        told = [digests for digests in (own, *others) if digests]
        return [b"".join(parts) for parts in zip(*told, strict=True)]

    async def close(self) -> None:
        """Return once nothing of this attempt can be written any more; it is forgotten then."""
        if self._opened:
            others = self._ranks.call_all("handover_close", self._number)
            await asyncio.gather(self._own.fence(), others)

    async def _all(
        self, own: Awaitable[Any], method: str, *arguments: Any
    ) -> tuple[Any, list[Any]]:
        """Let all ranks do something; raises the first error once all have ended."""
        number = self._number
        calls = [own]
        if not self._opened:  # what follows on a connection comes after it
            self._opened = True
            calls.append(self._ranks.call_all("handover_open", number, self._terms.pack()))
        calls.append(self._ranks.call_all(f"handover_{method}", number, *arguments))
        outcomes: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return outcomes[0], outcomes[-1]
