from dataclasses import replace

import numpy as np
import pytest

from baton.core.handover import BlockRef
from baton.core.ids import BlockId, Epoch, Ticket
from baton.core.kv_layout import LayerRange
from baton.kv_transfer.digest import DigestKey

REF = BlockRef(BlockId(5), Epoch(2))
LAYERS = LayerRange(0, 4)
PROMPT = tuple(range(40))
DATA = bytes(range(256)) * 8


def key(
    compatibility: str = "c", ticket: bytes = b"t" * 16, prompt: tuple[int, ...] = PROMPT
) -> DigestKey:
    return DigestKey(
        compatibility=compatibility, ticket=Ticket(ticket), prompt=prompt, block_size=16
    )


GOOD = key().digest(1, REF, LAYERS, DATA)


def test_the_same_facts_give_the_same_digest_on_both_sides() -> None:
    assert key().digest(1, REF, LAYERS, memoryview(np.frombuffer(DATA, np.uint8))) == GOOD
    assert len(GOOD) == 16
    assert key().num_blocks == 3


@pytest.mark.parametrize(
    "other",
    [
        key(compatibility="d").digest(1, REF, LAYERS, DATA),
        key(ticket=b"u" * 16).digest(1, REF, LAYERS, DATA),
        key(prompt=(99, *PROMPT[1:])).digest(1, REF, LAYERS, DATA),
        key().digest(0, REF, LAYERS, DATA),
        key().digest(1, replace(REF, epoch=Epoch(3)), LAYERS, DATA),
        key().digest(1, replace(REF, block=BlockId(6)), LAYERS, DATA),
        key().digest(1, REF, LayerRange(0, 3), DATA),
        key().digest(1, REF, LAYERS, DATA[:-1] + b"\0"),
    ],
    ids=["model", "ticket", "earlier token", "index", "epoch", "block", "layers", "bytes"],
)
def test_every_fact_is_bound(other: bytes) -> None:
    assert other != GOOD


def test_tokens_after_a_block_do_not_change_its_digest() -> None:
    longer = key(prompt=(*PROMPT, 1, 2, 3))
    assert longer.digest(1, REF, LAYERS, DATA) == GOOD
