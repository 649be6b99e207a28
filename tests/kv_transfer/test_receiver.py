from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, replace
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from baton.core.config import HandoverConfig
from baton.core.errors import PeerLost, TransportError, WrongKV
from baton.core.handover import (
    PROTOCOL_VERSION,
    Abort,
    Accepted,
    BlockRef,
    FirstToken,
    Offer,
    OfferedBlock,
    Open,
    Pulled,
    Received,
    Refused,
    Want,
)
from baton.core.ids import Attempt, BlockId, Epoch, Incarnation, InstanceId, RequestId, Ticket
from baton.core.kv_layout import KVLayout, LayerRange
from baton.core.request import GenerateRequest
from baton.core.sharded_layout import ShardedLayout
from baton.core.trace import OfferTrace, RankTrace
from baton.kv_transfer import receiver_events as m
from baton.kv_transfer.landing import Landing
from baton.kv_transfer.plan import TokenRange, plan_between
from baton.kv_transfer.receiver import Receiver, ReceiverState

Refs = Callable[..., tuple[BlockRef, ...]]
Offers = Callable[..., Offer]
LAYOUT = KVLayout(layers=4, kv_heads=2, block_size=8, head_dim=16, dtype="float32")


def accepted(layout: ShardedLayout) -> m.PeerSaid:
    return m.PeerSaid(Accepted(Incarnation(9), layout, (b"metadata",)))


ACCEPTED = accepted(ShardedLayout(LAYOUT))
EQUAL = plan_between(ShardedLayout(LAYOUT), ShardedLayout(LAYOUT))


@pytest.fixture
def receiver(open_message: Open, config: HandoverConfig) -> Receiver:
    receiver = Receiver(open_message, config=config)
    assert receiver.start(0.0) == [m.Send(open_message)]
    return receiver


def failure(actions: list[m.ReceiverAction]) -> m.Fail:
    [fail] = [a for a in actions if isinstance(a, m.Fail)]
    assert isinstance(actions[0], m.Send)
    assert actions[0].message == Abort(Attempt(3), fail.error.code)
    return fail


def read_ok(index: int, num_bytes: int = 10) -> m.ReadEnded:
    return m.ReadEnded(index, num_bytes, "cma")


def read_of(offer: Offer, blocks: tuple[BlockRef, ...]) -> m.Read:
    """The read of a whole offer, where blocks of both sides have 8 tokens of a prompt of 20."""
    start = offer.first_block * 8
    return m.Read(offer, blocks, TokenRange(start, min(start + len(blocks) * 8, 20)))


def test_two_offers_land(receiver: Receiver, refs: Refs, make_offer: Offers) -> None:
    theirs, ours = refs(4, 9, 2), refs(0, 5, 6)
    assert receiver.handle(ACCEPTED, 1.0) == [m.Connect((b"metadata",), 0, EQUAL)]
    one, two = make_offer(0, 0, theirs[:2]), make_offer(1, 2, theirs[2:], token=42)
    assert receiver.handle(m.PeerSaid(one), 2.0) == [m.Reserve()]  # and not before: no block held
    assert receiver.handle(m.Connected(), 2.5) == []
    assert receiver.handle(m.Granted(ours), 3.0) == [read_of(one, ours[:2])]
    assert receiver.handle(m.PeerSaid(two), 4.0) == [read_of(two, ours[2:])]
    assert receiver.handle(read_ok(0), 5.0) == []
    assert receiver.handle(read_ok(1), 6.0) == [
        m.Send(Received(Attempt(3))),
        m.Land(FirstToken(42, 0.5, 1.5, 2)),
    ]
    assert receiver.over
    trace = receiver.trace("prefill-0", "ok")
    assert (trace.handshake_s, trace.allocation_wait_s) == (1.0, 1.0)
    assert (trace.transfer_s, trace.exposed_s, trace.overlapped) == (3.0, 2.0, pytest.approx(1 / 3))
    assert (trace.blocks, trace.bytes, trace.chunks, trace.transport) == (3, 20, 2, "cma")
    assert (trace.queue_s, trace.compute_s) == (0.5, 1.5)
    assert trace.offered_s == 4.0
    assert trace.offers == (
        OfferTrace(0, 4, 0, 2, offered_s=2.0, read_s=3.0, done_s=5.0, bytes=10),
        OfferTrace(0, 4, 2, 1, offered_s=4.0, read_s=4.0, done_s=6.0, bytes=10),
    )


def test_each_rank_tells_from_its_first_read_to_its_last(
    receiver: Receiver, refs: Refs, make_offer: Offers
) -> None:
    theirs, ours = refs(4, 9, 2), refs(0, 5, 6)
    receiver.handle(ACCEPTED, 0.0)
    receiver.handle(m.Connected(), 0.0)
    receiver.handle(m.PeerSaid(make_offer(0, 0, theirs[:2])), 1.0)
    receiver.handle(m.Granted(ours), 1.0)
    parts = m.RankRead(8, 0.5), m.RankRead(0, 0.0), m.RankRead(2, 3.0)
    receiver.handle(m.ReadEnded(0, 10, "cma", ranks=parts), 4.5)
    receiver.handle(m.PeerSaid(make_offer(1, 2, theirs[2:], token=1)), 5.0)
    receiver.handle(m.ReadEnded(1, 5, "cma", ranks=(m.RankRead(5, 1.0),)), 6.0)
    assert receiver.trace("prefill-0", "ok").ranks == (
        RankTrace(0, 13, begin_s=1.0, end_s=6.0, busy_s=1.5),
        RankTrace(2, 2, begin_s=1.0, end_s=4.0, busy_s=3.0),
    )


def test_a_read_that_failed_is_no_read_of_its_offer(
    receiver: Receiver, refs: Refs, make_offer: Offers
) -> None:
    receiver.handle(ACCEPTED, 0.0)
    receiver.handle(m.Connected(), 0.0)
    receiver.handle(m.PeerSaid(make_offer(0, 0, refs(4, 9))), 1.0)
    receiver.handle(m.Granted(refs(0, 5, 6)), 1.0)
    receiver.handle(m.ReadEnded(0, 0, "", WrongKV("not what was offered")), 2.0)
    [offer] = receiver.trace("prefill-0", "wrong_kv").offers
    assert (offer.offered_s, offer.done_s, offer.bytes) == (1.0, 0.0, 0)


def test_what_decode_has_is_not_read(receiver: Receiver, refs: Refs, make_offer: Offers) -> None:
    theirs, ours = refs(4, 9, 2), refs(0, 5, 6)
    receiver.handle(ACCEPTED, 0.0)
    receiver.handle(m.Connected(), 0.0)
    whole = make_offer(0, 0, theirs, token=42)
    assert receiver.handle(m.PeerSaid(whole), 1.0) == [m.Reserve()]
    [read] = receiver.handle(m.Granted(ours, 2), 1.0)
    assert isinstance(read, m.Read)
    assert (read.offer.first_block, read.offer.blocks) == (2, whole.blocks[2:])
    assert read.blocks == ours[2:]
    assert isinstance(receiver.handle(read_ok(0), 2.0)[-1], m.Land)
    trace = receiver.trace("prefill-0", "ok")
    assert (trace.blocks, trace.blocks_saved, trace.bytes) == (3, 2, 10)


def test_an_offer_of_what_decode_has_is_passed_over(
    receiver: Receiver, refs: Refs, make_offer: Offers
) -> None:
    theirs, ours = refs(4, 9, 2), refs(0, 5, 6)
    receiver.handle(ACCEPTED, 0.0)
    receiver.handle(m.Connected(), 0.0)
    receiver.handle(m.PeerSaid(make_offer(0, 0, theirs[:2])), 1.0)
    assert receiver.handle(m.Granted(ours, 2), 1.0) == []
    assert receiver.deadline == 3.0  # for the next offer
    last = make_offer(1, 2, theirs[2:], token=42)
    assert receiver.handle(m.PeerSaid(last), 2.0) == [read_of(last, ours[2:])]


def test_an_empty_last_offer_lands_when_the_reads_have_ended(
    receiver: Receiver, refs: Refs, make_offer: Offers
) -> None:
    receiver.handle(ACCEPTED, 0.0)
    receiver.handle(m.Connected(), 0.0)
    receiver.handle(m.PeerSaid(make_offer(0, 0, refs(4, 9, 2))), 0.0)
    receiver.handle(m.Granted(refs(0, 1, 2)), 0.0)
    assert receiver.handle(m.PeerSaid(make_offer(1, 3, (), token=42)), 0.0) == []
    assert isinstance(receiver.handle(read_ok(0), 1.0)[-1], m.Land)

    early = Receiver(receiver._open, config=receiver._config)
    early.handle(ACCEPTED, 0.0)
    early.handle(m.Connected(), 0.0)
    early.handle(m.PeerSaid(make_offer(0, 0, refs(4, 9, 2))), 0.0)
    early.handle(m.Granted(refs(0, 1, 2)), 0.0)
    early.handle(read_ok(0), 1.0)
    assert isinstance(early.handle(m.PeerSaid(make_offer(1, 3, (), token=42)), 2.0)[-1], m.Land)


def test_groups_of_layers_are_read_one_after_the_other(
    receiver: Receiver, refs: Refs, make_offer: Offers
) -> None:
    theirs, ours = refs(4, 9, 2), refs(0, 5, 6)
    receiver.handle(ACCEPTED, 0.0)
    receiver.handle(m.Connected(), 0.0)
    upper = make_offer(0, 0, theirs[:2], layers=LayerRange(0, 3))
    receiver.handle(m.PeerSaid(upper), 0.0)
    assert receiver.handle(m.Granted(ours), 0.0) == [read_of(upper, ours[:2])]
    lower = make_offer(1, 0, theirs[:2], layers=LayerRange(3, 4))
    assert receiver.handle(m.PeerSaid(lower), 0.0) == [read_of(lower, ours[:2])]
    last = make_offer(2, 2, theirs[2:], token=42)
    assert receiver.handle(m.PeerSaid(last), 0.0) == [read_of(last, ours[2:])]
    for index in (2, 0, 1):
        actions = receiver.handle(read_ok(index), 1.0)
    assert isinstance(actions[-1], m.Land)
    assert receiver.trace("prefill-0", "ok").blocks == 3


@pytest.fixture
def sharing(open_message: Open, config: HandoverConfig) -> Receiver:
    """It has told of two cached blocks, and prefill has accepted."""
    receiver = Receiver(replace(open_message, cached_blocks=2), config=config)
    receiver.start(0.0)
    return receiver


def test_prefill_may_want_what_was_told_of(sharing: Receiver) -> None:
    sharing.handle(ACCEPTED, 0.0)
    want = Want(Attempt(3), 0, 2)
    assert sharing.handle(m.PeerSaid(want), 0.0) == [m.Share(want)]
    assert sharing.deadline == 2.0  # for the first offer, as before
    assert sharing.handle(m.PeerSaid(Pulled(Attempt(3))), 0.0) == [m.Unshare()]


@pytest.mark.parametrize(
    ("before", "want", "what"),
    [
        ((), Want(Attempt(3), 0, 1), "wrong time"),
        ((ACCEPTED, m.PeerSaid(Want(Attempt(3), 0, 1))), Want(Attempt(3), 0, 1), "wrong time"),
        ((ACCEPTED,), Want(Attempt(3), 0, 3), "more than was told of"),
        ((ACCEPTED,), Want(Attempt(2), 0, 1), "more than was told of"),
    ],
)
def test_prefill_may_want_nothing_else(
    sharing: Receiver, before: tuple[m.ReceiverEvent, ...], want: Want, what: str
) -> None:
    for event in before:
        sharing.handle(event, 0.0)
    assert what in failure(sharing.handle(m.PeerSaid(want), 0.0)).error.message


def test_idle_time_between_reads_is_no_transfer_time(
    receiver: Receiver, refs: Refs, make_offer: Offers
) -> None:
    theirs, ours = refs(4, 9, 2), refs(0, 5, 6)
    receiver.handle(ACCEPTED, 0.0)
    receiver.handle(m.Connected(), 0.0)
    receiver.handle(m.PeerSaid(make_offer(0, 0, theirs[:2])), 1.0)
    receiver.handle(m.Granted(ours), 1.0)
    receiver.handle(read_ok(0), 2.0)
    receiver.handle(m.PeerSaid(make_offer(1, 2, theirs[2:], token=1)), 9.0)
    receiver.handle(read_ok(1), 9.5)
    trace = receiver.trace("prefill-0", "ok")
    assert (trace.transfer_s, trace.exposed_s) == (1.5, 0.5)


def test_wrong_kv_while_another_read_is_under_way_waits_for_the_fence(
    receiver: Receiver, refs: Refs, make_offer: Offers
) -> None:
    theirs, ours = refs(4, 9, 2), refs(0, 5, 6)
    receiver.handle(ACCEPTED, 0.0)
    receiver.handle(m.Connected(), 0.0)
    receiver.handle(m.PeerSaid(make_offer(0, 0, theirs[:2])), 0.0)
    receiver.handle(m.Granted(ours), 0.0)
    receiver.handle(m.PeerSaid(make_offer(1, 2, theirs[2:], token=1)), 0.0)
    fail = failure(receiver.handle(m.ReadEnded(0, 10, "cma", WrongKV("other bytes")), 0.0))
    assert isinstance(fail.error, WrongKV)
    assert not fail.fenced
    assert receiver.state is ReceiverState.FENCING
    assert not receiver.over
    assert receiver.handle(m.StreamEnded(PeerLost("gone")), 0.0) == []
    assert receiver.handle(read_ok(1), 0.0) == [m.FencePassed()]
    assert receiver.over


def test_a_read_that_hangs_drops_the_peer_and_still_waits_for_the_read(
    receiver: Receiver, refs: Refs, make_offer: Offers
) -> None:
    receiver.handle(ACCEPTED, 0.0)
    receiver.handle(m.Connected(), 0.0)
    receiver.handle(m.PeerSaid(make_offer(0, 0, refs(4, 9, 2), token=1)), 0.0)
    receiver.handle(m.Granted(refs(0, 1, 2)), 0.0)
    assert receiver.deadline == 3.0
    actions = receiver.handle(m.Tick(), 3.0)
    assert failure(actions).error.code == "deadline_exceeded"
    assert actions[-1] == m.DropPeer()
    assert receiver.handle(m.Tick(), 6.0) == [m.DropPeer()]
    assert receiver.handle(m.ReadEnded(0, 0, "", PeerLost("removed")), 7.0) == [m.FencePassed()]


@pytest.mark.parametrize(
    ("events", "deadline", "what"),
    [
        ((), 1.0, "to accept"),
        ((ACCEPTED,), 2.0, "first offer"),
        ((ACCEPTED, m.Connected(), "offer"), 4.0, "room"),
        ((ACCEPTED, m.Connected(), "offer", "grant", read_ok(0)), 2.0, "next offer"),
    ],
)
def test_every_wait_has_a_deadline(
    receiver: Receiver,
    refs: Refs,
    make_offer: Offers,
    events: tuple[m.ReceiverEvent | str, ...],
    deadline: float,
    what: str,
) -> None:
    named = {
        "offer": m.PeerSaid(make_offer(0, 0, refs(4))),
        "grant": m.Granted(refs(0, 1, 2)),
    }
    for event in events:
        receiver.handle(named[event] if isinstance(event, str) else event, 0.0)
    assert receiver.deadline == deadline
    assert receiver.handle(m.Tick(), deadline - 0.1) == []
    fail = failure(receiver.handle(m.Tick(), deadline))
    assert fail.error.code == "deadline_exceeded"
    assert what in fail.error.message
    assert fail.fenced


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"attempt": Attempt(4)}, "attempt 4"),
        ({"index": 1}, "out of order"),
        ({"first_block": 1}, "out of order"),
        ({"layers": LayerRange(1, 4)}, "layers 1 to 4 are out of order"),
        ({"layers": LayerRange(0, 5)}, "layers 0 to 5 are out of order"),
        ({"layers": LayerRange(0, 0)}, "layers 0 to 0 are out of order"),
        ({"blocks": ()}, "an offer of nothing"),
        ({"first": FirstToken(1, 0, 0, 1)}, "1 blocks offered for a prompt of 3"),
    ],
)
def test_an_offer_that_does_not_add_up_is_refused(
    receiver: Receiver, refs: Refs, make_offer: Offers, change: dict[str, object], what: str
) -> None:
    receiver.handle(ACCEPTED, 0.0)
    offer = replace(make_offer(0, 0, refs(4)), **change)  # type: ignore[arg-type]
    assert what in failure(receiver.handle(m.PeerSaid(offer), 0.0)).error.message


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"layers": LayerRange(0, 4)}, "layers 0 to 4 are out of order"),
        ({"layers": LayerRange(3, 4)}, "layers 3 to 4 are out of order"),
        ({"first_block": 2}, "out of order"),
        ({"blocks": ()}, "an offer of nothing"),
    ],
)
def test_layers_that_do_not_follow_on_those_before_are_refused(
    receiver: Receiver, refs: Refs, make_offer: Offers, change: dict[str, object], what: str
) -> None:
    receiver.handle(ACCEPTED, 0.0)
    receiver.handle(m.PeerSaid(make_offer(0, 0, refs(4, 9), layers=LayerRange(0, 2))), 0.0)
    offer = make_offer(1, 0, refs(4, 9), layers=LayerRange(2, 4))
    bad = replace(offer, **change)  # type: ignore[arg-type]
    assert what in failure(receiver.handle(m.PeerSaid(bad), 0.0)).error.message


def test_layers_of_another_number_of_blocks_are_refused(
    receiver: Receiver, refs: Refs, make_offer: Offers
) -> None:
    receiver.handle(ACCEPTED, 0.0)
    receiver.handle(m.PeerSaid(make_offer(0, 0, refs(4, 9), layers=LayerRange(0, 2))), 0.0)
    more = make_offer(1, 0, refs(4, 9, 2), layers=LayerRange(2, 4))
    assert "3 blocks, not 2" in failure(receiver.handle(m.PeerSaid(more), 0.0)).error.message


def test_a_first_token_before_the_last_layer_is_refused(
    receiver: Receiver, refs: Refs, make_offer: Offers
) -> None:
    receiver.handle(ACCEPTED, 0.0)
    early = make_offer(0, 0, refs(4, 9, 2), token=1, layers=LayerRange(0, 2))
    assert "no more to come" in failure(receiver.handle(m.PeerSaid(early), 0.0)).error.message


def test_an_offer_before_accepted_and_one_after_the_last(
    receiver: Receiver, refs: Refs, make_offer: Offers
) -> None:
    whole = make_offer(0, 0, refs(1, 2, 3), token=1)
    other = Receiver(receiver._open, config=HandoverConfig())
    assert "before it accepted" in failure(other.handle(m.PeerSaid(whole), 0.0)).error.message
    receiver.handle(ACCEPTED, 0.0)
    receiver.handle(m.PeerSaid(whole), 0.0)
    late = failure(receiver.handle(m.PeerSaid(replace(whole, index=1)), 0.0))
    assert "after the last" in late.error.message


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("incompatible", "incompatible"),
        ("overloaded", "unavailable"),
        ("no_such_code", "unavailable"),
        ("deadline_exceeded", "deadline_exceeded"),
        ("draining", "draining"),
    ],
)
def test_refusals_keep_their_meaning(receiver: Receiver, code: str, expected: str) -> None:
    fail = failure(receiver.handle(m.PeerSaid(Refused(code, "because")), 0.0))
    assert fail.error.code == expected
    assert "because" in fail.error.message


def test_a_peer_that_cannot_be_connected(receiver: Receiver) -> None:
    receiver.handle(ACCEPTED, 0.0)
    assert failure(receiver.handle(m.Connected(TransportError("no route")), 0.0)).fenced


@pytest.mark.parametrize(
    ("cached", "reads"),
    [
        (0, [(0, 0, (0, 16), 0), (1, 1, (16, 20), 2)]),
        (1, [(0, 0, (8, 16), 1), (1, 1, (16, 20), 2)]),
        (2, [(1, 1, (16, 20), 2)]),
    ],
)
def test_larger_blocks_fill_several(
    receiver: Receiver,
    refs: Refs,
    make_offer: Offers,
    cached: int,
    reads: list[tuple[int, int, tuple[int, int], int]],
) -> None:
    theirs, ours = refs(4, 9), refs(0, 5, 6)
    receiver.handle(accepted(ShardedLayout(replace(LAYOUT, block_size=16))), 0.0)
    receiver.handle(m.Connected(), 0.0)
    receiver.handle(m.PeerSaid(make_offer(0, 0, theirs[:1])), 0.0)
    actions = receiver.handle(m.Granted(ours, cached), 0.0)
    actions += receiver.handle(m.PeerSaid(make_offer(1, 1, theirs[1:], token=1)), 0.0)
    found = [action for action in actions if isinstance(action, m.Read)]
    assert [
        (a.offer.index, a.offer.first_block, astuple(a.tokens), ours.index(a.blocks[0]))
        for a in found
    ] == reads
    assert sum(len(a.blocks) for a in found) == 3 - cached


def test_smaller_blocks_share_one(
    open_message: Open, refs: Refs, make_offer: Offers, config: HandoverConfig
) -> None:
    large = replace(open_message, layout=ShardedLayout(replace(LAYOUT, block_size=32)))
    receiver = Receiver(large, config=config)
    receiver.handle(ACCEPTED, 0.0)
    receiver.handle(m.Connected(), 0.0)
    whole = make_offer(0, 0, refs(4, 9, 2), token=1)
    receiver.handle(m.PeerSaid(whole), 0.0)
    ours = refs(7)
    assert receiver.handle(m.Granted(ours), 0.0) == [m.Read(whole, ours, TokenRange(0, 20))]


@pytest.mark.parametrize(
    ("theirs", "what"),
    [
        (ShardedLayout(replace(LAYOUT, layers=5)), "prefill has 5, decode 4"),
        (ShardedLayout(replace(LAYOUT, dtype="bfloat16")), "bfloat16 in blocks of 8, decode of f"),
    ],
)
def test_kv_that_cannot_be_read_is_refused_before_anything_is_held(
    receiver: Receiver, theirs: ShardedLayout, what: str
) -> None:
    fail = failure(receiver.handle(accepted(theirs), 0.0))
    assert fail.error.code == "incompatible"
    assert what in fail.error.message
    assert fail.fenced


@pytest.mark.parametrize(
    ("theirs", "page_bytes"),
    [
        (ShardedLayout(replace(LAYOUT, dtype="bfloat16")), 1 << 20),
        (ShardedLayout(LAYOUT, tp=2), 0),
    ],
    ids=["another dtype", "more ranks"],
)
def test_other_layouts_are_read_where_they_can_land(
    open_message: Open, config: HandoverConfig, theirs: ShardedLayout, page_bytes: int
) -> None:
    landing = Landing(page_bytes=page_bytes)
    receiver = Receiver(open_message, config=config, landing=landing)
    receiver.start(0.0)
    [connect] = receiver.handle(accepted(theirs), 0.0)
    assert connect == m.Connect((b"metadata",), 0, plan_between(theirs, ShardedLayout(LAYOUT)))


SELDOM = st.integers(0, 11).map(lambda number: number == 7)
"""For what ends an attempt: else hardly any would get far."""


class AnyOrder(RuleBasedStateMachine):
    """Whatever comes in whatever order: nothing is used before it is verified, nothing is freed
    while a read may write it, every action that must end exactly once does."""

    seen: ClassVar[Counter[str]] = Counter()
    """What all runs together have come to."""
    layout = KVLayout(layers=2, kv_heads=1, block_size=8, head_dim=4, dtype="float32")

    @initialize(tokens=st.integers(1, 40), met=st.integers(0, 3))
    def begin(self, tokens: int, met: int) -> None:
        self.total = self.layout.blocks_for(tokens)
        message = Open(
            PROTOCOL_VERSION,
            "c",
            ShardedLayout(self.layout),
            InstanceId("d"),
            Incarnation(1),
            Ticket(b"t" * 16),
            Attempt(0),
            GenerateRequest(RequestId("r"), tuple(range(tokens)), 4),
        )
        self.receiver = Receiver(message, config=HandoverConfig())
        self.now = 0.0
        self.actions: list[m.ReceiverAction] = self.receiver.start(0.0)
        self.reading: set[int] = set()
        self.read: set[tuple[int, int]] = set()
        self.verified: set[int] = set()
        self.offered = self.offers = self.upper = 0
        self.cached: int | None = None
        self.last = False
        if met:  # three times of four the peers have met: else few runs would get to a read
            self.feed(accepted(ShardedLayout(self.layout)))
            self.feed(m.Connected())

    def feed(self, event: m.ReceiverEvent) -> None:
        self.now += 0.25
        new = self.receiver.handle(event, self.now)
        for action in new:
            match action:
                case m.Read(offer, blocks):
                    assert self.count(m.Reserve) == 1
                    assert self.cached is not None
                    assert len(blocks) == len(offer.blocks) > 0
                    assert [ref.block for ref in blocks] == [b.ref.block for b in offer.blocks]
                    assert offer.first_block >= self.cached
                    self.reading.add(offer.index)
                    read = {(ref.block, offer.layers.start) for ref in blocks}
                    read |= {(ref.block, offer.layers.end - 1) for ref in blocks}
                    assert not self.read & read, "read twice"
                    self.read |= read
                case m.Land():
                    assert self.verified == {
                        a.offer.index for a in self.actions if isinstance(a, m.Read)
                    }
                    lacking = range(self.cached or 0, self.total)
                    assert self.read == {(block, layer) for block in lacking for layer in (0, 1)}
                    assert self.offered == self.total
                    assert not self.reading
                case m.Fail(fenced=fenced):
                    assert fenced == (not self.reading)
                case m.FencePassed():
                    assert not self.reading
        self.actions += new

    def count(self, kind: type) -> int:
        return sum(isinstance(a, kind) for a in self.actions)

    @rule(again=SELDOM)
    def accept(self, again: bool) -> None:
        if again or not self.count(m.Connect):
            self.feed(accepted(ShardedLayout(self.layout)))

    @rule(fails=SELDOM)
    def connect(self, fails: bool) -> None:
        if self.count(m.Connect):
            self.feed(m.Connected(TransportError("no") if fails else None))

    @precondition(lambda self: not self.last)
    @rule(blocks=st.integers(1, 3), split=st.booleans(), early=SELDOM)
    def offer(self, blocks: int, split: bool, early: bool) -> None:
        if not (early or self.count(m.Connect)):
            return
        if self.upper:
            blocks, layers = self.upper, LayerRange(1, 2)
        else:
            blocks = min(blocks, self.total - self.offered)
            layers = LayerRange(0, 1 if split else 2)
        self.upper = blocks if layers.end == 1 else 0
        whole = layers.end == 2
        self.last = whole and self.offered + blocks == self.total
        refs = tuple(
            OfferedBlock(BlockRef(BlockId(self.offered + i), Epoch(0)), b"d" * 16)
            for i in range(blocks)
        )
        first = FirstToken(1, 0, 0, 1) if self.last else None
        offer = Offer(Attempt(0), self.offers, layers, self.offered, refs, first)
        self.offers += 1
        self.offered += blocks if whole else 0
        self.feed(m.PeerSaid(offer))

    @rule(cached=st.integers(0, 4))
    def grant(self, cached: int) -> None:
        if self.count(m.Reserve) and not self.count(m.Fail) and self.cached is None:
            self.cached = min(cached, self.total - 1)
            blocks = tuple(BlockRef(BlockId(i), Epoch(0)) for i in range(self.total))
            self.feed(m.Granted(blocks, self.cached))

    @precondition(lambda self: self.reading)
    @rule(data=st.data(), bad=SELDOM)
    def read_ends(self, data: st.DataObject, bad: bool) -> None:
        index = data.draw(st.sampled_from(sorted(self.reading)))
        self.reading.discard(index)
        if not bad:
            self.verified.add(index)
        self.feed(m.ReadEnded(index, 8, "cma", WrongKV("bytes") if bad else None))

    @rule(really=SELDOM)
    def stream_ends(self, really: bool) -> None:
        if really:
            self.feed(m.StreamEnded(PeerLost("gone")))

    @rule(really=SELDOM)
    def cancel(self, really: bool) -> None:
        if really:
            self.feed(m.CancelRequested("client gone"))

    @rule(really=SELDOM)
    def tick(self, really: bool) -> None:
        if really and self.receiver.deadline != float("inf"):
            self.now = max(self.now, self.receiver.deadline)
            self.feed(m.Tick())

    @invariant()
    def ends_once(self) -> None:
        if not hasattr(self, "receiver"):
            return
        assert self.count(m.Land) + self.count(m.Fail) <= 1
        assert self.count(m.FencePassed) <= 1
        assert self.count(m.Reserve) <= 1
        if self.receiver.over:
            assert not self.reading
            assert self.receiver.deadline == float("inf")
            unfenced = any(isinstance(a, m.Fail) and not a.fenced for a in self.actions)
            assert self.count(m.FencePassed) == int(unfenced)
        else:
            assert self.receiver.deadline != float("inf"), "a wait without a deadline"

    def teardown(self) -> None:
        """From wherever it stands, cancelling and letting the reads end finishes it."""
        if not hasattr(self, "receiver"):
            return
        self.feed(m.CancelRequested("end"))
        for index in sorted(self.reading):
            self.reading.discard(index)
            self.feed(m.ReadEnded(index, 8, "cma"))
        assert self.receiver.over
        self.seen.update(type(action).__name__ for action in self.actions)


def test_any_order_of_events() -> None:
    run_state_machine_as_test(
        AnyOrder,
        settings=settings(
            max_examples=300, stateful_step_count=40, deadline=None, derandomize=True
        ),
    )
    # Always the same runs: they get as far as to a landing, dozens of times.
    for what in ("Read", "Land", "Fail"):
        assert AnyOrder.seen[what] > 0, f"no run came to {what}: {AnyOrder.seen}"


def test_what_it_says_of_itself(receiver: Receiver, refs: Refs, make_offer: Offers) -> None:
    receiver.handle(ACCEPTED, 0.0)
    receiver.handle(m.Connected(), 0.0)
    receiver.handle(m.PeerSaid(make_offer(0, 0, refs(4, 9, 2), token=1)), 0.0)
    assert not receiver.reading
    assert receiver.reading_since == float("inf")
    receiver.handle(m.Granted(refs(0, 1, 2)), 2.0)
    assert receiver.reading
    assert receiver.reading_since == 2.0
    assert repr(receiver) == "Receiver(receiving, offers=1, reading=1, blocks=3/3)"


def test_more_blocks_than_the_prompt_has_are_refused(
    receiver: Receiver, refs: Refs, make_offer: Offers
) -> None:
    receiver.handle(ACCEPTED, 0.0)
    fail = failure(receiver.handle(m.PeerSaid(make_offer(0, 0, refs(1, 2, 3, 4))), 0.0))
    assert "4 blocks offered for a prompt of 3" in fail.error.message


def test_two_reads_under_way_when_it_fails_both_count_for_the_fence(
    receiver: Receiver, refs: Refs, make_offer: Offers
) -> None:
    receiver.handle(ACCEPTED, 0.0)
    receiver.handle(m.Connected(), 0.0)
    receiver.handle(m.PeerSaid(make_offer(0, 0, refs(4))), 0.0)
    receiver.handle(m.Granted(refs(0, 1, 2)), 0.0)
    receiver.handle(m.PeerSaid(make_offer(1, 1, refs(9))), 0.0)
    assert not failure(receiver.handle(m.CancelRequested("gone"), 0.0)).fenced
    assert receiver.handle(read_ok(1), 0.0) == []
    assert receiver.handle(read_ok(0), 0.0) == [m.FencePassed()]


def test_pools_on_devices_are_read_in_place_if_that_was_asked_for(
    open_message: Open, config: HandoverConfig
) -> None:
    direct = m.PeerSaid(replace(ACCEPTED.message, direct=True))
    on_device = Landing(in_pool=False, page_bytes=1 << 20)
    asked = replace(open_message, device_ways=("cuda_ipc here",))
    receiver = Receiver(asked, config=config, landing=on_device)
    receiver.start(0.0)
    assert receiver.handle(direct, 1.0) == [m.Connect((b"metadata",), 0, EQUAL, direct=True)]
    receiver = Receiver(asked, config=config, landing=on_device)
    receiver.start(0.0)
    [connect] = receiver.handle(ACCEPTED, 1.0)
    assert isinstance(connect, m.Connect)
    assert (connect.direct, connect.plan.in_place) == (False, False)
    receiver = Receiver(open_message, config=config, landing=on_device)
    receiver.start(0.0)
    assert failure(receiver.handle(direct, 1.0)).error.code == "handover_failed"
