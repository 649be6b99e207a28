from collections.abc import Iterator

import pytest

from baton.core.ids import Incarnation, InstanceId, SeqId
from baton.decode_worker.backup_queue import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    BackupQueue,
    Portion,
)
from baton.decode_worker.peer_channels import PeerRef

SIZE, EVERY = 4, 2
ONE, TWO = SeqId(1), SeqId(2)


def peer(name: str) -> PeerRef:
    return PeerRef(InstanceId(name), "127.0.0.1:1", Incarnation(1))


B, C = peer("b"), peer("c")


@pytest.fixture
def queue() -> Iterator[BackupQueue]:
    """Blocks of 4 tokens, two at a time at least, at 100 bytes a second."""
    queue = BackupQueue(block_size=SIZE, every_blocks=EVERY, bytes_per_s=100.0)
    yield queue
    for seq_id in (ONE, TWO):
        queue.forget(seq_id)
    assert (len(queue), queue.next_at()) == (0, None)
    assert not queue._pauses


def grow(queue: BackupQueue, seq_id: SeqId, tokens: int) -> None:
    for _ in range(tokens):
        queue.grew(seq_id)


def test_a_sequence_is_due_when_enough_blocks_are_full(queue: BackupQueue) -> None:
    queue.follow(ONE, B, 6)
    assert queue.next_at() is None, "it has not begun"
    grow(queue, ONE, 1)
    assert queue.next_at() is None
    assert queue.take(0.0) is None
    grow(queue, ONE, 1)
    assert queue.next_at() == 0.0
    portion = queue.take(0.0)
    assert portion == Portion(ONE, B, 0)
    assert queue.next_at() is None, "it is under way"
    queue.ended(portion, 2, 0, 0.0)
    grow(queue, ONE, 7)
    assert queue.next_at() is None
    grow(queue, ONE, 1)
    assert queue.take(0.0) == Portion(ONE, B, 2)


def test_a_long_prompt_goes_in_portions_and_takes_turns(queue: BackupQueue) -> None:
    queue.follow(ONE, B, 40)
    queue.follow(TWO, B, 40)
    grow(queue, ONE, 1)
    grow(queue, TWO, 1)
    taken = []
    for _ in range(4):
        portion = queue.take(0.0)
        assert portion is not None
        queue.ended(portion, portion.first_block + 3, 0, 0.0)
        taken.append((portion.seq_id, portion.first_block))
    assert taken == [(ONE, 0), (TWO, 0), (ONE, 3), (TWO, 3)]


def test_what_grows_while_it_is_copied_is_due_after_that(queue: BackupQueue) -> None:
    queue.follow(ONE, B, 7)
    grow(queue, ONE, 1)
    portion = queue.take(0.0)
    assert portion is not None
    grow(queue, ONE, 8)
    queue.ended(portion, 2, 0, 0.0)
    assert queue.take(0.0) == Portion(ONE, B, 2)


def test_what_could_not_be_offered_is_due_when_it_grows(queue: BackupQueue) -> None:
    """It was preempted between `grew` and `take`: nothing ended, since nothing began."""
    queue.follow(ONE, B, 8)
    grow(queue, ONE, 1)
    assert queue.take(0.0) is not None
    assert queue.take(0.0) is None
    grow(queue, ONE, 1)
    assert queue.take(0.0) == Portion(ONE, B, 0)


def test_bytes_take_their_share_of_the_time(queue: BackupQueue) -> None:
    queue.follow(ONE, B, 40)
    grow(queue, ONE, 1)
    portion = queue.take(10.0)
    assert portion is not None
    queue.ended(portion, 4, 250, 10.0)
    assert queue.next_at() == 12.5
    assert queue.take(12.4) is None
    assert queue.take(12.5) == Portion(ONE, B, 4)


@pytest.mark.parametrize("there", [None, 0], ids=["unreachable", "no room"])
def test_a_peer_that_takes_nothing_is_left_alone_for_longer_and_longer(
    queue: BackupQueue, there: int | None
) -> None:
    queue.follow(ONE, B, 40)
    queue.follow(TWO, C, 40)
    grow(queue, ONE, 1)
    grow(queue, TWO, 1)
    now, pauses = 0.0, []
    for _ in range(9):
        portion = queue.take(now)
        assert portion is not None
        assert portion.peer is B
        queue.ended(portion, there, 0, now)
        other = queue.take(now)
        assert other is not None
        assert other.peer is C, "others are not held up"
        queue.ended(other, 3, 0, now)
        assert queue.take(now) is not None, "and it goes on there"
        at = queue.next_at()
        assert at is not None
        pauses.append(at - now)
        now = at
        queue.forget(TWO)
        queue.follow(TWO, C, 40)
        grow(queue, TWO, 1)
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-1] == LONGEST_PAUSE_S
    portion = queue.take(now)
    assert portion is not None
    queue.ended(portion, 1, 0, now)
    assert queue.take(now) is not None
    again = queue.take(now)
    assert again == Portion(ONE, B, 1), "it takes something: all is forgiven"


def test_a_peer_that_lost_what_it_had_gets_it_again(queue: BackupQueue) -> None:
    queue.follow(ONE, B, 40)
    grow(queue, ONE, 1)
    portion = queue.take(0.0)
    assert portion is not None
    queue.ended(portion, 5, 0, 0.0)
    portion = queue.take(0.0)
    assert portion == Portion(ONE, B, 5)
    queue.ended(portion, 2, 0, 0.0)  # evicted: its own work needs the room
    assert queue.next_at() == FIRST_PAUSE_S
    assert queue.take(FIRST_PAUSE_S) == Portion(ONE, B, 2)


def test_what_has_ended_is_not_copied_any_more(queue: BackupQueue) -> None:
    queue.follow(ONE, B, 40)
    grow(queue, ONE, 1)
    portion = queue.take(0.0)
    assert portion is not None
    queue.forget(ONE)
    queue.ended(portion, 5, 0, 0.0)
    queue.grew(ONE)
    assert queue.take(0.0) is None
    queue.follow(TWO, B, 40)
    grow(queue, TWO, 1)
    queue.forget(TWO)
    assert queue.take(0.0) is None
