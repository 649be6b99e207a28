"""Orders come to the other ranks as the leader gave them, and are cut and numbered right."""

from typing import Any

import msgpack

from baton.core.handover import BlockRef, OfferedBlock
from baton.core.ids import BlockId, Epoch, Ticket
from baton.core.kv_layout import KVLayout, LayerRange
from baton.core.sharded_layout import ShardedLayout
from baton.executor.handover_orders import DigestOrder, HandoverTerms, ReadOrder
from baton.kv_transfer.plan import TokenRange

LAYOUT = KVLayout(layers=4, kv_heads=2, block_size=16, head_dim=16, dtype="float32")
LARGE = KVLayout(layers=4, kv_heads=2, block_size=32, head_dim=16, dtype="bfloat16")
SOURCE = ShardedLayout(LAYOUT, tp=2, stages=(1,))
TERMS = HandoverTerms(
    SOURCE, ShardedLayout(LARGE), "same", Ticket(b"t" * 16), (5, 300_000), staged=True
)


def ref(block: int, epoch: int = 0) -> BlockRef:
    return BlockRef(BlockId(block), Epoch(epoch))


def through_the_wire(packed: Any) -> Any:
    return msgpack.unpackb(msgpack.packb(packed))


def read_order(*blocks: int) -> ReadOrder:
    offered = tuple(OfferedBlock(ref(block, block), bytes([block] * 16)) for block in blocks)
    ours = tuple(BlockId(block + 100) for block in range(-(-len(blocks) // 2)))
    return ReadOrder(LayerRange(1, 3), TokenRange(0, 16 * len(blocks)), offered, ours)


def test_what_is_packed_comes_back_equal() -> None:
    assert HandoverTerms.unpack(through_the_wire(TERMS.pack())) == TERMS
    order = read_order(3, 1, 2)
    assert ReadOrder.unpack(through_the_wire(order.pack())) == order
    for pages in ((), (ref(9, 8), ref(7, 6))):
        digests = DigestOrder(LayerRange(0, 4), 2, (ref(5, 2**40), ref(6)), pages)
        assert DigestOrder.unpack(through_the_wire(digests.pack())) == digests


def test_a_part_of_the_tokens_has_its_blocks_on_both_sides() -> None:
    order = read_order(3, 1, 2, 4)
    assert order.part(TokenRange(0, 32), TERMS.plan) == (order.offered[:2], order.blocks[:1])
    assert order.part(TokenRange(32, 60), TERMS.plan) == (order.offered[2:], order.blocks[1:])


def test_blocks_are_numbered_within_the_pool_they_are_in() -> None:
    order = read_order(13, 11).counted_in(64, 10)
    assert [block.ref for block in order.offered] == [ref(3, 13), ref(1, 11)]
    assert order.blocks == (36,)
    digests = DigestOrder(LayerRange(0, 4), 0, (ref(21, 5),)).counted_in(10)
    assert digests.refs == (ref(1, 5),)
