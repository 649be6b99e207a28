"""What digests cost whole handovers through shared memory: the same reads with them and without.

    python bench/transfer_digest.py --rounds 15

Both sides are in this process, which changes nothing for shm: the owner of the memory does nothing
while it is read. In each round every handover is read twice, with and without digests, in turns; a
figure is the median over the rounds. "offer" is what prefill spends on its digests, in a thread
beside the model; it is no part of the read. Prints Markdown.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transfer import table

from baton.core.config import EngineConfig, HandoverConfig, WorkerConfig
from baton.core.handover import BlockRef, OfferedBlock
from baton.core.ids import BlockId, Epoch, Ticket, new_incarnation
from baton.core.kv_layout import KVLayout
from baton.core.sharded_layout import Rank, ShardedLayout
from baton.core.topology import Role
from baton.executor.handover_memory import HandoverMemory
from baton.executor.handover_orders import DigestOrder, HandoverTerms, ReadOrder
from baton.executor.rank_handover import KVPlace, RankHandover
from baton.kv_transfer.choose import open_transport
from baton.kv_transfer.plan import TokenRange
from baton.kv_transfer.transport import (
    Peer,
    Run,
    Transfer,
    TransferReport,
    Transport,
    UnitsOf,
)

MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """Handovers that begin together."""

    name: str
    layout: KVLayout
    handovers: int
    tokens: int
    """Of each prompt, a multiple of the blocks."""
    chunk: int
    """Tokens in an offer; all their layers."""
    repeat: int = 1
    """Times as many rounds, where one is short."""


def layout(block_kib: int) -> KVLayout:
    """Return a layout whose blocks of 16 tokens have so many KiB."""
    return KVLayout(4, 2, 16, block_kib, "float32")


CASES = (
    Case("1 block of 32 KiB", layout(32), 1, 16, 16, repeat=20),
    Case("1 block of 1 MiB", layout(1024), 1, 16, 16, repeat=20),
    Case("512 blocks of 32 KiB", layout(32), 1, 8192, 8192),
    Case("64 handovers of 16 blocks of 32 KiB", layout(32), 64, 256, 256),
    Case("2,048 tokens of 12 KiB, 4 offers", layout(192), 1, 2048, 512),
    Case("256 blocks of 1 MiB", layout(1024), 1, 4096, 4096),
)


class Unhashed:
    """A transport that is never asked to hash."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)

    def read(
        self, peer: Peer, runs: Sequence[Run], units: UnitsOf | None, ticket: Ticket
    ) -> Transfer:
        """Read without units."""
        return self._transport.read(peer, runs, ticket=ticket)


class Unverified(RankHandover):
    """Takes what was read for what was offered."""

    async def _read_in_place(self, order: ReadOrder) -> TransferReport:
        transfers = self._post(order.layers, order.tokens, order.offered, order.blocks, 0)
        return await self._done(transfers.values())


class Sides:
    """A prefill and a decode rank with as many blocks as a case needs."""

    def __init__(self, case: Case) -> None:
        self.case = case
        size = case.layout.block_size
        self.each = case.tokens // size
        self.blocks = self.each * case.handovers
        self.place = KVPlace(Rank(), 0, self.blocks, copy=False)
        self.source, self.target = (self._memory(role) for role in (Role.PREFILL, Role.DECODE))
        self.source.kv.bytes.random_(0, 256)
        self.target.kv.bytes.fill_(1)
        draw = torch.Generator().manual_seed(1)
        self.theirs, self.ours = (
            torch.randperm(self.blocks, generator=draw).tolist() for _ in range(2)
        )

    def _memory(self, role: Role) -> HandoverMemory:
        config = WorkerConfig(
            instance_id="bench",
            role=role,
            model_dir=Path(),
            model_name="none",
            engine=EngineConfig(block_size=16),
            handover=HandoverConfig(staging_mib=0),
        )
        return HandoverMemory(config, self.case.layout, self.blocks)

    async def open(self) -> None:
        """Open both transports."""
        config = HandoverConfig.checked(transport="shm", secret="a secret for a measurement")
        self.transports = [
            await open_transport(
                memory.region, config, host="127.0.0.1", owner=owner, incarnation=new_incarnation()
            )
            for owner, memory in (("prefill", self.source), ("decode", self.target))
        ]

    async def close(self) -> None:
        """Close them."""
        for transport in reversed(self.transports):
            await transport.close()

    def terms(self, number: int) -> HandoverTerms:
        """Return the terms of one handover."""
        sharded, ticket = ShardedLayout(self.case.layout), Ticket(number.to_bytes(16, "big"))
        return HandoverTerms(sharded, sharded, "same", ticket, tuple(range(self.case.tokens)))

    async def orders(self, number: int) -> list[ReadOrder]:
        """Digest one handover's blocks as prefill does, and return what is to be read."""
        case, first = self.case, number * self.each
        rank = RankHandover(self.terms(number), self.place, self.transports[0], self.source, 30.0)
        refs = [BlockRef(BlockId(b), Epoch(1)) for b in self.theirs[first : first + self.each]]
        ours = [BlockId(b) for b in self.ours[first : first + self.each]]
        per, orders = case.chunk // case.layout.block_size, []
        for at in range(0, self.each, per):
            part = tuple(refs[at : at + per])
            digests = await rank.digest(DigestOrder(case.layout.all_layers, at, part))
            offered = tuple(map(OfferedBlock, part, digests))
            tokens = TokenRange(at * 16, (at + per) * 16)
            blocks = tuple(ours[at : at + per])
            orders.append(ReadOrder(case.layout.all_layers, tokens, offered, blocks))
        return orders

    async def read(self, number: int, orders: list[ReadOrder], *, digests: bool) -> None:
        """Read one handover as decode does, its offers one after the other."""
        kind, transport = RankHandover, self.transports[1]
        if not digests:
            kind, transport = Unverified, Unhashed(transport)  # type: ignore[assignment]
        rank = kind(self.terms(number), self.place, transport, self.target, 30.0)
        await rank.connect([self.transports[0].metadata()], self.blocks)
        for order in orders:
            await rank.read(order)


async def rounds_of(case: Case, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round: of offers, and of reads with digests and without."""
    sides = Sides(case)
    await sides.open()
    found: dict[str, list[float]] = {"offer": [], "with": [], "without": []}
    numbers = range(case.handovers)
    for number in range(-1, rounds * case.repeat):
        began = time.perf_counter()
        orders = [await sides.orders(n) for n in numbers]
        found["offer"].append(time.perf_counter() - began)
        for kind in ("with", "without") if number % 2 else ("without", "with"):
            began = time.perf_counter()
            reads = (sides.read(n, orders[n], digests=kind == "with") for n in numbers)
            await asyncio.gather(*reads)
            found[kind].append(time.perf_counter() - began)
    await sides.close()
    return {kind: times[1:] for kind, times in found.items()}  # the first touched the pages


def row(case: Case, found: dict[str, list[float]]) -> list[str]:
    """Return medians, and the median of what digests add to the read of the same round."""
    ratios = sorted(a / b - 1 for a, b in zip(found["with"], found["without"], strict=True))
    size = case.layout.block_bytes * case.tokens // 16 * case.handovers
    times = [statistics.median(found[kind]) for kind in ("without", "with", "offer")]
    quarter = len(ratios) // 4
    spread = f"{ratios[quarter]:+.0%} to {ratios[-1 - quarter]:+.0%}"
    return [
        case.name,
        f"{size / MIB:.2f}",
        *(f"{took * 1e3:.2f}" for took in times),
        f"{statistics.median(ratios):+.0%} ({spread})",
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    rows = [row(case, asyncio.run(rounds_of(case, rounds))) for case in CASES]
    head = [
        "handover",
        "MiB",
        "read, ms",
        "with digests, ms",
        "offer, ms",
        "digests add (quartiles)",
    ]
    print(table(head, rows))


if __name__ == "__main__":
    main()
