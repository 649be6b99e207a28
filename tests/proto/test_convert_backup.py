from dataclasses import replace

import pytest

from baton.core.errors import HandoverError
from baton.core.handover import PROTOCOL_VERSION, BlockRef, FirstToken, Offer, OfferedBlock, Open
from baton.core.ids import Attempt, BlockId, Epoch, Incarnation, InstanceId, RequestId, Ticket
from baton.core.kv_layout import KVLayout, LayerRange
from baton.core.request import GenerateRequest
from baton.core.sharded_layout import ShardedLayout
from baton.proto.convert_backup import backup_core, backup_proto

LAYOUT = ShardedLayout(KVLayout(layers=2, kv_heads=2, block_size=8, head_dim=4, dtype="float32"), 1)
OPEN = Open(
    version=PROTOCOL_VERSION,
    compatibility="same",
    layout=LAYOUT,
    decode_instance=InstanceId("decode-0"),
    decode_incarnation=Incarnation(7),
    ticket=Ticket(bytes(16)),
    attempt=Attempt(0),
    request=GenerateRequest(RequestId("r"), tuple(range(25)), 1),
    transports=(b"how",),
    place_blocks=4,
)
BLOCKS = tuple(OfferedBlock(BlockRef(BlockId(b), Epoch(1)), bytes(16)) for b in (3, 1))
OFFER = Offer(Attempt(0), 0, LayerRange(0, 2), 1, BLOCKS)


def test_there_and_back() -> None:
    assert backup_core(backup_proto(OPEN, OFFER)) == (OPEN, OFFER)


@pytest.mark.parametrize(
    "change",
    [
        {"first_block": 0},
        {"first_block": 2},
        {"blocks": ()},
        {"layers": LayerRange(0, 1)},
        {"first": FirstToken(1, 0.0, 0.0, 1)},
    ],
    ids=["not up to the end", "beyond the end", "no blocks", "some layers", "a first token"],
)
def test_other_blocks_than_the_last_full_ones_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(HandoverError, match="blocks up to 3"):
        backup_core(backup_proto(OPEN, replace(OFFER, **change)))  # type: ignore[arg-type]
