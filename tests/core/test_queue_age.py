"""The age of a queue's first, by looks from time to time."""

from hypothesis import given
from hypothesis import strategies as st

from baton.core.queue_age import QueueAge


def test_an_entry_is_dated_by_the_first_look_that_counted_it() -> None:
    age = QueueAge()
    assert age.seen(0, None, 1.0) == 0.0
    assert age.seen(3, 0, 2.0) == 0.0
    assert age.seen(3, 2, 5.0) == 3.0
    assert age.seen(5, 2, 6.0) == 4.0
    assert age.seen(5, 4, 9.0) == 3.0, "it came between 5 and 6"
    assert age.seen(5, None, 10.0) == 0.0
    assert age.seen(6, 5, 12.0) == 0.0


@given(
    st.lists(st.tuples(st.sampled_from("+-"), st.floats(0.0, 3.0)), max_size=60),
)
def test_it_is_never_too_old_and_off_by_one_pause_at_most(turns: list[tuple[str, float]]) -> None:
    age, now, last = QueueAge(), 0.0, 0.0
    queue: list[tuple[int, float]] = []
    entries = 0
    longest = 0.0
    for turn, pause in turns:
        now += pause
        if turn == "+":
            queue.append((entries, now))
            entries += 1
        elif queue:
            queue.pop(0)
        oldest, true = (queue[0][0], now - queue[0][1]) if queue else (None, 0.0)
        longest, last = max(longest, now - last), now
        told = age.seen(entries, oldest, now)
        assert true - longest - 1e-9 <= told <= true + 1e-9
