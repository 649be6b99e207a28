"""A small handover: 20 prompt tokens in blocks of 8, so three blocks, the last one partial."""

from collections.abc import Callable

import pytest

from baton.core.config import HandoverConfig
from baton.core.handover import (
    PROTOCOL_VERSION,
    BlockRef,
    FirstToken,
    Offer,
    OfferedBlock,
    Open,
)
from baton.core.ids import Attempt, BlockId, Epoch, Incarnation, InstanceId, RequestId, Ticket
from baton.core.kv_layout import KVLayout, LayerRange
from baton.core.request import GenerateRequest
from baton.core.sharded_layout import ShardedLayout

PROMPT = tuple(range(100, 120))


@pytest.fixture
def layout() -> KVLayout:
    return KVLayout(layers=4, kv_heads=2, block_size=8, head_dim=16, dtype="float32")


@pytest.fixture
def config() -> HandoverConfig:
    return HandoverConfig(
        accept_timeout_s=1,
        offer_timeout_s=2,
        read_timeout_s=3,
        room_timeout_s=4,
        received_timeout_s=10,
        min_read_kib=0,
    )


@pytest.fixture
def open_message(layout: KVLayout) -> Open:
    return Open(
        version=PROTOCOL_VERSION,
        compatibility="same",
        layout=ShardedLayout(layout),
        decode_instance=InstanceId("decode-0"),
        decode_incarnation=Incarnation(7),
        ticket=Ticket(b"t" * 16),
        attempt=Attempt(3),
        request=GenerateRequest(RequestId("r"), PROMPT, 5),
    )


@pytest.fixture
def refs() -> Callable[..., tuple[BlockRef, ...]]:
    def make(*blocks: int, epoch: int = 0) -> tuple[BlockRef, ...]:
        return tuple(BlockRef(BlockId(b), Epoch(epoch)) for b in blocks)

    return make


@pytest.fixture
def make_offer(layout: KVLayout) -> Callable[..., Offer]:
    def make(
        index: int,
        first_block: int,
        blocks: tuple[BlockRef, ...],
        token: int | None = None,
        layers: LayerRange = layout.all_layers,
    ) -> Offer:
        return Offer(
            attempt=Attempt(3),
            index=index,
            layers=layers,
            first_block=first_block,
            blocks=tuple(OfferedBlock(ref, b"d" * 16) for ref in blocks),
            first=None if token is None else FirstToken(token, 0.5, 1.5, index + 1),
        )

    return make
