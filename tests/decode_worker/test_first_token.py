from baton.core.spans import DecodeSpans, HandoverWait
from baton.decode_worker.first_token import FirstTokenWatch

WAIT = HandoverWait(
    before_open_s=1,
    handshake_s=2,
    offered_s=20,
    room_s=0,
    connect_s=0,
    transfer_s=3,
    queue_s=4,
    compute_s=8,
    offer_s=1,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float) -> None:
        self.now += seconds


def test_a_prompt_that_is_handed_over_at_the_second_try() -> None:
    clock = Clock()
    watch = FirstTokenWatch(clock)
    clock.after(0.5)
    watch.decided()
    clock.after(7)
    watch.failed()
    clock.after(24 + 2)  # the wait for the handover, and then some until the owner runs
    watch.landed(WAIT)
    clock.after(0.25)
    spans = watch.ready()
    assert spans == WAIT.put_into(DecodeSpans(decide_s=0.5, failed_handovers_s=7, admit_s=2.25))
    assert spans.total_s == clock.now - 100


def test_a_prompt_that_is_computed_here_after_two_tries() -> None:
    clock = Clock()
    watch = FirstTokenWatch(clock)
    watch.decided()
    for seconds in (1, 2):
        clock.after(seconds)
        watch.failed()
    clock.after(4)
    watch.computing()
    clock.after(8)
    watch.computed()
    spans = watch.ready()
    assert spans == DecodeSpans(failed_handovers_s=3, local_queue_s=4, local_compute_s=8)
