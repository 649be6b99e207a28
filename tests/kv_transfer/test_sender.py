from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.core.config import HandoverConfig
from baton.core.errors import Overloaded
from baton.core.handover import (
    Abort,
    Accepted,
    BlockRef,
    FirstToken,
    Open,
    Pulled,
    Received,
    Refused,
    Want,
)
from baton.core.ids import Attempt, Incarnation
from baton.core.kv_layout import KVLayout, LayerRange
from baton.core.request import TokenLogprobs
from baton.core.sharded_layout import ShardedLayout
from baton.kv_transfer import sender_events as m
from baton.kv_transfer.sender import DirectReads, Sender, SenderState

Refs = Callable[..., tuple[BlockRef, ...]]
LAYOUT = KVLayout(layers=4, kv_heads=2, block_size=8, head_dim=16, dtype="float32")
ACCEPTED = Accepted(Incarnation(9), ShardedLayout(LAYOUT), (b"metadata",))


@pytest.fixture
def sender(config: HandoverConfig) -> Sender:
    return Sender(compatibility="same", accepted=ACCEPTED, config=config, now=0.0)


def refusal(actions: list[m.SenderAction]) -> str:
    """The code with which the stream was refused."""
    sent = [a.message for a in actions if isinstance(a, m.Send)]
    assert len(sent) == 1
    assert isinstance(sent[0], Refused)
    return sent[0].code


def test_a_prompt_in_two_chunks(sender: Sender, open_message: Open, refs: Refs) -> None:
    table = refs(4, 9, 2)
    assert sender.handle(m.Opened(open_message), 1.0) == [m.Submit(open_message), m.Send(ACCEPTED)]
    assert sender.handle(m.Started(), 3.0) == []
    [offer] = sender.handle(m.ChunkReady(16, table), 4.0)
    assert isinstance(offer, m.SendOffer)
    assert (offer.index, offer.first_block, offer.blocks) == (0, 0, table[:2])
    assert offer.first is None
    assert sender.handle(m.Started(), 4.0) == []  # the second chunk starts: not a new beginning
    assert sender.handle(m.ChunkReady(20, table), 5.0) == []
    told = TokenLogprobs(-1.5, ((42, -1.5),))
    [last] = sender.handle(m.Sampled(42, told), 5.0)
    assert isinstance(last, m.SendOffer)
    assert (last.index, last.first_block, last.blocks) == (1, 2, table[2:])
    assert last.first == FirstToken(
        42, queue_s=2.0, compute_s=2.0, chunks=2, logprobs=told, chunk_s=(1.0, 2.0)
    )
    assert sender.deadline == 15.0
    assert sender.handle(m.PeerSaid(Received(Attempt(3))), 6.0) == [m.Release(), m.End("ok")]
    assert sender.state is SenderState.ENDED
    assert sender.handle(m.StreamEnded(), 7.0) == []


@pytest.fixture
def pulling(sender: Sender, open_message: Open) -> Sender:
    """Decode has two blocks and prefill one, and computing the other takes eight seconds."""
    opened = m.Opened(replace(open_message, cached_blocks=2, bytes_per_s=1e9), 1, token_s=1.0)
    assert sender.handle(opened, 1.0) == [m.Send(ACCEPTED), m.Send(Want(Attempt(3), 1, 2))]
    assert sender.state is SenderState.PULLING
    return sender


def test_what_decode_has_is_read_first(pulling: Sender, make_offer: Any, refs: Refs) -> None:
    offer = make_offer(0, 1, refs(5))
    assert pulling.handle(m.PeerSaid(offer), 2.0) == [m.Pull(offer)]
    assert pulling.deadline == float("inf")  # the pull has its own, and always ends
    [pulled, submit] = pulling.handle(m.PullEnded(), 3.0)
    assert pulled == m.Send(Pulled(Attempt(3)))
    assert isinstance(submit, m.Submit)
    assert pulling.state is SenderState.QUEUED


def test_decode_has_it_no_more(pulling: Sender, make_offer: Any) -> None:
    [pulled, submit] = pulling.handle(m.PeerSaid(make_offer(0, 1, ())), 2.0)
    assert pulled == m.Send(Pulled(Attempt(3)))
    assert isinstance(submit, m.Submit)


@pytest.mark.parametrize(
    ("first_block", "blocks", "extra"),
    [
        (0, (5,), {}),
        (1, (5, 6), {}),
        (1, (5,), {"layers": LayerRange(0, 2)}),
        (1, (5,), {"token": 7}),
    ],
)
def test_an_offer_of_anything_else_is_refused(
    pulling: Sender,
    make_offer: Any,
    refs: Refs,
    first_block: int,
    blocks: tuple[int, ...],
    extra: dict[str, Any],
) -> None:
    offer = make_offer(0, first_block, refs(*blocks), **extra)
    assert refusal(pulling.handle(m.PeerSaid(offer), 2.0)) == "handover_failed"


def test_decode_does_not_answer_in_time(pulling: Sender, make_offer: Any, refs: Refs) -> None:
    assert pulling.deadline == 4.0
    assert pulling.handle(m.Tick(), 3.9) == []
    [submit] = pulling.handle(m.Tick(), 4.0)
    assert isinstance(submit, m.Submit)
    late = pulling.handle(m.PeerSaid(make_offer(0, 1, refs(5))), 5.0)
    assert late == [m.Send(Pulled(Attempt(3)))]  # so that decode unpins it


def test_the_stream_ends_while_prefill_pulls(pulling: Sender, make_offer: Any, refs: Refs) -> None:
    pulling.handle(m.PeerSaid(make_offer(0, 1, refs(5))), 2.0)
    assert pulling.handle(m.StreamEnded(), 3.0) == [m.Release(), m.End("cancelled")]
    assert pulling.handle(m.PullEnded(), 4.0) == []


def test_other_shardings_are_pulled_from(sender: Sender, open_message: Open) -> None:
    model = open_message.layout.model
    other = ShardedLayout.even(model, tp=1, pp=model.layers)
    assert other != ACCEPTED.layout
    message = replace(open_message, layout=other, cached_blocks=2, bytes_per_s=1e9)
    said = sender.handle(m.Opened(message, 1, token_s=1.0), 1.0)
    assert said == [m.Send(ACCEPTED), m.Send(Want(Attempt(3), 1, 2))]


def test_other_blocks_are_not_pulled_from(sender: Sender, open_message: Open) -> None:
    other = ShardedLayout(replace(open_message.layout.model, block_size=16))
    message = replace(open_message, layout=other, cached_blocks=2, bytes_per_s=1e9)
    [submit, accepted] = sender.handle(m.Opened(message, 0, token_s=1.0), 0.0)
    assert isinstance(submit, m.Submit)
    assert accepted == m.Send(ACCEPTED)


def test_what_the_cache_had_is_offered_at_once(
    sender: Sender, open_message: Open, refs: Refs
) -> None:
    table = refs(4, 9, 2)
    sender.handle(m.Opened(open_message), 0.0)
    [offer] = sender.handle(m.Started(16, table), 1.0)
    assert isinstance(offer, m.SendOffer)
    assert (offer.index, offer.first_block, offer.blocks) == (0, 0, table[:2])
    assert sender.handle(m.ChunkReady(20, table), 2.0) == []
    [last] = sender.handle(m.Sampled(42), 2.0)
    assert isinstance(last, m.SendOffer)
    assert (last.index, last.first_block, last.blocks) == (1, 2, table[2:])
    assert last.first == FirstToken(
        42, queue_s=1.0, compute_s=1.0, chunks=1, cached_tokens=16, chunk_s=(1.0,)
    )


def test_groups_of_layers_are_offered_while_the_chunk_is_computed(
    sender: Sender, open_message: Open, refs: Refs
) -> None:
    table = refs(4, 9, 2)
    sender.handle(m.Opened(open_message), 0.0)
    sender.handle(m.Started(0, table), 0.0)
    offers = sender.handle(m.LayersReady(16, 1), 1.0)
    offers += sender.handle(m.LayersReady(16, 3), 1.0)
    offers += sender.handle(m.ChunkReady(16, table), 1.0)
    offers += sender.handle(m.LayersReady(20, 2), 2.0)
    assert sender.handle(m.ChunkReady(20, table), 2.0) == []
    offers += sender.handle(m.Sampled(42), 2.0)
    seen = [(o.layers.start, o.layers.end, o.first_block, len(o.blocks)) for o in offers]
    assert seen == [(0, 1, 0, 2), (1, 3, 0, 2), (3, 4, 0, 2), (0, 2, 2, 1), (2, 4, 2, 1)]
    assert [o.index for o in offers] == [0, 1, 2, 3, 4]
    assert [o.first is not None for o in offers] == [False] * 4 + [True]


def test_layers_of_a_chunk_that_completes_no_block_are_not_offered(
    sender: Sender, open_message: Open, refs: Refs
) -> None:
    sender.handle(m.Opened(open_message), 0.0)
    sender.handle(m.Started(0, refs(1, 2, 3)), 0.0)
    assert sender.handle(m.LayersReady(7, 2), 0.0) == []


@pytest.mark.parametrize(
    ("min_read_kib", "bytes_per_s", "offered"),
    # One layer of both blocks has 2 × 2048 bytes; offer_cost_s is 1 ms.
    [(4, 0.0, [1, 2, 3]), (8, 0.0, [2]), (1, 8_192_000.0, [2]), (1, 99e9, [])],
)
def test_groups_are_as_large_as_a_read_must_be_to_be_worth_an_offer(
    open_message: Open,
    refs: Refs,
    *,
    min_read_kib: int,
    bytes_per_s: float,
    offered: list[int],
) -> None:
    config = HandoverConfig(min_read_kib=min_read_kib, offer_cost_s=0.001)
    sender = Sender(compatibility="same", accepted=ACCEPTED, config=config, now=0)
    sender.handle(m.Opened(replace(open_message, bytes_per_s=bytes_per_s)), 0.0)
    sender.handle(m.Started(0, refs(4, 9, 2)), 0.0)
    ends = [end for end in (1, 2, 3) if sender.handle(m.LayersReady(16, end), 0.0)]
    assert ends == offered


def test_a_chunk_that_completes_no_block_offers_nothing(
    sender: Sender, open_message: Open, refs: Refs
) -> None:
    sender.handle(m.Opened(open_message), 0.0)
    sender.handle(m.Started(), 0.0)
    assert sender.handle(m.ChunkReady(7, refs(1, 2, 3)), 0.0) == []


def test_offers_end_where_larger_blocks_of_decode_do(
    sender: Sender, open_message: Open, refs: Refs
) -> None:
    table = refs(4, 9, 2)
    large = ShardedLayout(replace(LAYOUT, block_size=16))
    sender.handle(m.Opened(replace(open_message, layout=large)), 0.0)
    assert sender.handle(m.Started(8, table), 0.0) == []
    [offer] = sender.handle(m.ChunkReady(16, table), 0.0)
    assert isinstance(offer, m.SendOffer)
    assert offer.blocks == table[:2]
    assert sender.handle(m.ChunkReady(20, table), 0.0) == []
    [last] = sender.handle(m.Sampled(42), 0.0)
    assert isinstance(last, m.SendOffer)
    assert (last.first_block, last.blocks) == (2, table[2:])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"compatibility": "other"}, "incompatible"),
        ({"layout": ShardedLayout(replace(LAYOUT, head_dim=8))}, "incompatible"),
        ({"layout": ShardedLayout(replace(LAYOUT, dtype="float16"))}, "incompatible"),
    ],
)
def test_a_peer_that_does_not_fit_is_refused_before_anything_is_queued(
    sender: Sender, open_message: Open, change: dict[str, object], code: str
) -> None:
    actions = sender.handle(m.Opened(replace(open_message, **change)), 0.0)  # type: ignore[arg-type]
    assert refusal(actions) == code
    assert actions[-1] == m.End(code)
    assert m.Release() not in actions


def test_the_engine_refuses(sender: Sender, open_message: Open) -> None:
    sender.handle(m.Opened(open_message), 0.0)
    actions = sender.handle(m.Failed(Overloaded("full")), 0.0)
    assert refusal(actions) == "overloaded"
    assert actions[1:] == [m.Release(), m.End("overloaded")]


def test_received_before_everything_was_offered_is_refused(
    sender: Sender, open_message: Open
) -> None:
    sender.handle(m.Opened(open_message), 0.0)
    assert refusal(sender.handle(m.PeerSaid(Received(Attempt(3))), 0.0)) == "handover_failed"


def test_words_about_another_attempt_are_dropped(sender: Sender, open_message: Open) -> None:
    sender.handle(m.Opened(open_message), 0.0)
    assert sender.handle(m.PeerSaid(Abort(Attempt(2), "late")), 0.0) == []
    assert sender.state is SenderState.QUEUED
    assert sender.handle(m.PeerSaid(Abort(Attempt(3), "now")), 0.0) == [
        m.Release(),
        m.End("cancelled"),
    ]


def test_nobody_opens(sender: Sender) -> None:
    assert sender.handle(m.Tick(), 0.9) == []
    assert refusal(sender.handle(m.Tick(), 1.0)) == "deadline_exceeded"


def test_nobody_reads_the_offers(sender: Sender, open_message: Open, refs: Refs) -> None:
    sender.handle(m.Opened(open_message), 0.0)
    sender.handle(m.Started(), 0.0)
    sender.handle(m.ChunkReady(20, refs(1, 2, 3)), 0.0)
    sender.handle(m.Sampled(1), 0.0)
    actions = sender.handle(m.Tick(), 10.0)
    assert refusal(actions) == "deadline_exceeded"
    assert m.Release() in actions


def test_opened_twice(sender: Sender, open_message: Open) -> None:
    sender.handle(m.Opened(open_message), 0.0)
    assert refusal(sender.handle(m.Opened(open_message), 0.0)) == "handover_failed"


def blocks_of(action: m.SenderAction) -> tuple[BlockRef, ...]:
    return action.blocks if isinstance(action, m.SendOffer) else ()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    chunks=st.lists(st.integers(1, 20), max_size=12),
    groups=st.sets(st.integers(1, 3)),
    stop_at=st.integers(0, 40),
    pages_at=st.none() | st.integers(2, 20),
)
def test_any_chunking_and_any_end_offers_each_layer_of_each_block_once_and_releases_once(
    config: HandoverConfig,
    open_message: Open,
    refs: Refs,
    *,
    chunks: list[int],
    groups: set[int],
    stop_at: int,
    pages_at: int | None,
) -> None:
    """`pages_at`: when there is room in staging; None if blocks are read where they are."""
    staged = pages_at is not None
    sender = Sender(compatibility="same", accepted=ACCEPTED, config=config, now=0, staged=staged)
    ends = sorted({min(sum(chunks[: i + 1]), 20) for i in range(len(chunks))} | {20})
    table = refs(7, 8, 9)
    events: list[m.SenderEvent] = [m.Opened(open_message)]
    for end in ends:
        events.append(m.Started(0, table))
        events += [m.LayersReady(end, layers) for layers in sorted(groups)]
        events.append(m.ChunkReady(end, table))
    events.append(m.Sampled(1))
    pages = refs(3, 1, 6)
    if pages_at is not None:
        events.insert(pages_at, m.Staged(pages))
    events.append(m.PeerSaid(Received(Attempt(3))))
    done = [a for event in events[:stop_at] for a in sender.handle(event, 0.0)]
    done += sender.handle(m.StreamEnded(), 0.0)

    offered = [
        (ref, layer)
        for a in done
        if isinstance(a, m.SendOffer)
        for ref in a.blocks
        for layer in range(a.layers.start, a.layers.end)
    ]
    assert len(set(offered)) == len(offered)
    of_pages = [page for a in done if isinstance(a, m.SendOffer) for page in a.pages]
    page_of = dict(zip(table, pages, strict=True))
    assert of_pages == ([page_of[ref] for a in done for ref in blocks_of(a)] if staged else [])
    indices = [a.index for a in done if isinstance(a, m.SendOffer)]
    assert indices == list(range(len(indices)))
    assert sum(isinstance(a, m.End) for a in done) == 1
    assert done.count(m.Release()) == (1 if stop_at >= 1 else 0)
    if m.End("ok") in done:
        assert set(offered) == {(ref, layer) for ref in table for layer in range(4)}


def test_what_it_says_of_itself(sender: Sender, open_message: Open, refs: Refs) -> None:
    sender.handle(m.Opened(open_message), 0.0)
    sender.handle(m.Started(16, refs(4, 9, 2)), 0.0)
    assert repr(sender) == "Sender(computing, offers=1, blocks=2)"


def test_a_prompt_that_is_offered_whole_before_its_first_token_ends_with_an_empty_offer(
    sender: Sender, open_message: Open, refs: Refs
) -> None:
    table = refs(4, 9, 2)
    sender.handle(m.Opened(open_message), 0.0)
    sender.handle(m.Started(0, table), 0.0)
    [whole] = sender.handle(m.LayersReady(20, 4), 1.0)
    assert isinstance(whole, m.SendOffer)
    assert whole.blocks == table
    sender.handle(m.ChunkReady(20, table), 1.0)
    [last] = sender.handle(m.Sampled(42), 1.0)
    assert isinstance(last, m.SendOffer)
    assert (last.blocks, last.layers.start, last.layers.end) == ((), 0, 4)


@pytest.fixture
def staged(config: HandoverConfig, open_message: Open) -> Sender:
    """Nobody can read prefill's blocks, and there is no room in staging yet."""
    sender = Sender(compatibility="same", accepted=ACCEPTED, config=config, now=0.0, staged=True)
    sender.handle(m.Opened(open_message), 0.0)
    return sender


def test_offers_wait_for_pages_and_are_made_in_their_order(staged: Sender, refs: Refs) -> None:
    table, pages = refs(4, 9, 2), refs(0, 1, 7, epoch=5)
    assert staged.handle(m.Started(8, table), 1.0) == [m.Stage(3)]
    assert staged.deadline == 5.0
    assert staged.handle(m.Started(16, table), 1.5) == []  # the second chunk asks for no more
    assert staged.handle(m.ChunkReady(16, table), 2.0) == []
    one, two = staged.handle(m.Staged(pages), 3.0)
    assert isinstance(one, m.SendOffer)
    assert isinstance(two, m.SendOffer)
    assert (one.index, one.blocks, one.pages) == (0, table[:1], pages[:1])
    assert (two.index, two.blocks, two.pages) == (1, table[1:2], pages[1:2])
    assert staged.deadline == float("inf")
    [last] = staged.handle(m.Sampled(42), 4.0)
    assert isinstance(last, m.SendOffer)
    assert (last.blocks, last.pages) == (table[2:], pages[2:])
    assert (staged.deadline, staged.unread_since) == (14.0, 4.0)


def test_a_prompt_may_be_computed_before_there_are_pages(staged: Sender, refs: Refs) -> None:
    table, pages = refs(4, 9, 2), refs(0, 1, 7)
    staged.handle(m.Started(0, table), 1.0)
    staged.handle(m.ChunkReady(20, table), 2.0)
    assert staged.handle(m.Sampled(42), 2.0) == []
    assert (staged.deadline, staged.unread_since) == (5.0, float("inf"))
    [whole] = staged.handle(m.Staged(pages), 4.0)
    assert isinstance(whole, m.SendOffer)
    assert (whole.pages, whole.first is not None) == (pages, True)
    assert (staged.deadline, staged.unread_since) == (14.0, 4.0)


def test_nobody_gives_pages_back_in_time(staged: Sender, refs: Refs) -> None:
    staged.handle(m.Started(0, refs(4, 9, 2)), 1.0)
    actions = staged.handle(m.Tick(), 5.0)
    assert refusal(actions) == "deadline_exceeded"
    assert "room in staging memory" in str(actions[0])
    assert m.Release() in actions


def test_what_nobody_can_write_in_place_is_not_pulled(
    config: HandoverConfig, open_message: Open
) -> None:
    sender = Sender(compatibility="same", accepted=ACCEPTED, config=config, now=0.0, staged=True)
    opened = m.Opened(replace(open_message, cached_blocks=2, bytes_per_s=1e9), 1, token_s=1.0)
    assert sender.handle(opened, 1.0) == [m.Submit(opened.message), m.Send(ACCEPTED)]


@pytest.mark.parametrize(
    ("ways", "dtype", "direct"),
    [
        (("ucx", "cuda_ipc here"), "float32", True),
        (("cuda_ipc there",), "float32", False),
        ((), "float32", False),
        (("ucx",), "bfloat16", False),  # it would have to be converted on the way
    ],
)
def test_blocks_on_a_device_are_offered_where_they_are_if_decode_can_read_them(
    config: HandoverConfig,
    open_message: Open,
    refs: Refs,
    ways: tuple[str, ...],
    dtype: str,
    direct: bool,
) -> None:
    reads = DirectReads((b"direct",), ("cuda_ipc here", "ucx"))
    sender = Sender(
        compatibility="same", accepted=ACCEPTED, config=config, now=0.0, staged=True, direct=reads
    )
    theirs = ShardedLayout(replace(open_message.layout.model, dtype=dtype))
    message = replace(open_message, device_ways=ways, layout=theirs, cached_blocks=2)
    answer = replace(ACCEPTED, transports=(b"direct",), direct=True) if direct else ACCEPTED
    # What decode has on its device is not pulled.
    assert sender.handle(m.Opened(message, 0, 9.0), 0.0) == [m.Submit(message), m.Send(answer)]
    assert sender.direct == direct
    table = refs(4, 9, 2)
    assert sender.handle(m.Started(0, table), 1.0) == ([] if direct else [m.Stage(3)])
    [*offers] = sender.handle(m.ChunkReady(16, table), 2.0)
    assert [offer.pages for offer in offers] == ([()] if direct else [])  # else they wait for pages
