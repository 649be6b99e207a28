"""Reads of one rank, verified: by hashes that the transport took, or by reading them again."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baton.core.config import HandoverConfig, WorkerConfig
from baton.core.errors import WrongKV
from baton.core.handover import BlockRef, OfferedBlock
from baton.core.ids import BlockId, Epoch, Ticket, new_incarnation
from baton.core.kv_layout import KVLayout
from baton.core.sharded_layout import Rank, ShardedLayout
from baton.core.topology import Role
from baton.executor.handover_memory import HandoverMemory
from baton.executor.handover_orders import DigestOrder, HandoverTerms, ReadOrder
from baton.executor.rank_handover import KVPlace, RankHandover
from baton.kernels.kv_digest import is_native
from baton.kv_transfer import digest
from baton.kv_transfer.choose import open_transport
from baton.kv_transfer.faults import Fault, FaultPlan
from baton.kv_transfer.loopback import LoopbackNetwork, LoopbackTransport
from baton.kv_transfer.plan import TokenRange
from baton.kv_transfer.transport import Transport

LAYOUT = KVLayout(layers=3, kv_heads=2, block_size=8, head_dim=16, dtype="float32")
TARGETS = {
    "in place": LAYOUT,
    "other blocks": replace(LAYOUT, block_size=16),
    "staged": replace(LAYOUT, dtype="bfloat16"),
}
PROMPT = tuple(range(45))
BLOCKS = 12
PLACE = KVPlace(Rank(), 0, BLOCKS, copy=False)
SECRET = "the secret of the test cluster"

Connected = Callable[[str], Awaitable[tuple[Transport, Transport]]]


class Pair:
    """A prefill and a decode rank in one process, and an offer of the whole prompt."""

    def __init__(self, target: KVLayout) -> None:
        self.terms = HandoverTerms(
            ShardedLayout(LAYOUT), ShardedLayout(target), "same", Ticket(b"t" * 16), PROMPT
        )
        self.source = _memory(Role.PREFILL, LAYOUT)
        self.target = _memory(Role.DECODE, target)
        self.source.kv.tensor.copy_(torch.randn(self.source.kv.tensor.shape))
        self.blocks = tuple(BlockId(n) for n in (7, 2, 3, 11, 0, 5))

    async def offer(self, transport: Transport) -> tuple[OfferedBlock, ...]:
        """Digest the prompt's blocks as prefill does."""
        refs = tuple(BlockRef(block, Epoch(1)) for block in self.blocks)
        rank = RankHandover(self.terms, PLACE, transport, self.source, 30.0)
        digests = await rank.digest(DigestOrder(LAYOUT.all_layers, 0, refs))
        return tuple(map(OfferedBlock, refs, digests))

    async def read(
        self, theirs: Transport, ours: Transport, offered: tuple[OfferedBlock, ...]
    ) -> None:
        """Read and verify as decode does."""
        rank = RankHandover(self.terms, PLACE, ours, self.target, 30.0)
        await rank.connect([theirs.metadata()], BLOCKS)
        tokens = TokenRange(0, len(PROMPT))
        ours_blocks = tuple(BlockId(n) for n in (4, 9, 1, 6, 8, 10))
        await rank.read(ReadOrder(LAYOUT.all_layers, tokens, offered, ours_blocks))

    def spoil(self) -> None:
        """Change one bit of what was offered."""
        self.source.kv.tensor.view(torch.uint8)[self.blocks[1]].view(-1)[99] ^= 1


def _memory(role: Role, layout: KVLayout) -> HandoverMemory:
    config = WorkerConfig(
        instance_id="one",
        role=role,
        model_dir=Path(),
        model_name="m",
        handover=HandoverConfig(staging_mib=1),
    )
    return HandoverMemory(config, layout, BLOCKS)


@pytest.fixture(params=list(TARGETS))
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(TARGETS[request.param])


@pytest.fixture
async def connected(pair: Pair) -> AsyncIterator[Connected]:
    async with AsyncExitStack() as stack:

        async def open_both(kind: str) -> tuple[Transport, Transport]:
            config = HandoverConfig.checked(transport=kind, secret=SECRET)
            opened = []
            for owner, memory in (("prefill", pair.source), ("decode", pair.target)):
                transport = await open_transport(
                    memory.region,
                    config,
                    host="127.0.0.1",
                    owner=owner,
                    incarnation=new_incarnation(),
                )
                stack.push_async_callback(transport.close)
                opened.append(transport)
            return opened[0], opened[1]

        yield open_both


@pytest.mark.parametrize("kind", ["shm", "tcp"])
async def test_what_changed_after_the_offer_is_wrong(
    pair: Pair, connected: Connected, kind: str
) -> None:
    theirs, ours = await connected(kind)
    offered = await pair.offer(theirs)
    await pair.read(theirs, ours, offered)
    pair.spoil()
    with pytest.raises(WrongKV):
        await pair.read(theirs, ours, offered)


@pytest.mark.skipif(not is_native(), reason="without a compiler nothing is hashed on the way")
async def test_what_was_hashed_on_the_way_is_not_read_again(
    pair: Pair, connected: Connected, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = await connected("shm")
    offered = await pair.offer(theirs)

    def again(*_: object) -> None:
        raise AssertionError("it is read again")

    monkeypatch.setattr(digest, "hash_units", again)
    await pair.read(theirs, ours, offered)
    pair.spoil()
    with pytest.raises(WrongKV):
        await pair.read(theirs, ours, offered)


@pytest.mark.parametrize("fault", [Fault.FLIPPED, Fault.TRUNCATED])
async def test_silent_faults_of_a_transport_are_caught(pair: Pair, fault: Fault) -> None:
    network = LoopbackNetwork()
    theirs, ours = (
        LoopbackTransport(
            memory.region,
            owner=owner,
            incarnation=new_incarnation(),
            network=network,
            plan=FaultPlan(script=(fault,)),
        )
        for owner, memory in (("prefill", pair.source), ("decode", pair.target))
    )
    offered = await pair.offer(theirs)
    with pytest.raises(WrongKV):
        await pair.read(theirs, ours, offered)
    await pair.read(theirs, ours, offered)
    await ours.close()
    await theirs.close()
