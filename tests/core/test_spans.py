from dataclasses import replace

import pytest

from baton.core.spans import SPAN_NAMES, DecodeSpans, HandoverWait, TtftSpans


def wait(**changes: float) -> HandoverWait:
    usual = HandoverWait(
        before_open_s=1.0,
        handshake_s=2.0,
        offered_s=20.0,
        room_s=0.5,
        connect_s=0.25,
        transfer_s=3.0,
        queue_s=4.0,
        compute_s=8.0,
        offer_s=1.0,
    )
    return replace(usual, **changes)


@pytest.mark.parametrize(
    ("told", "handshake", "network"),
    [
        (wait(), 3.0, 5.0),  # 20 away, of which prefill worked 13: 7, and 2 of them to shake hands
        (wait(handshake_s=15.0), 8.0, 0.0),  # Accepted was slow, and came while prefill computed
        (wait(compute_s=8.0, queue_s=11.0), 1.0, 0.0),  # all of it was work
    ],
)
def test_the_spans_of_a_handover_add_up_to_the_wait_for_it(
    told: HandoverWait, handshake: float, network: float
):
    spans = told.put_into(DecodeSpans(decide_s=0.5))
    assert (spans.handshake_s, spans.prefill_network_s) == (handshake, network)
    whole = told.before_open_s + told.offered_s + told.room_s + told.connect_s + told.transfer_s
    assert spans.total_s == 0.5 + whole


def test_the_network_is_what_the_decode_instance_does_not_account_for():
    spans = TtftSpans(wake_s=1, tokenize_s=2, gateway_queue_s=3, lost_s=4)
    whole = spans.answered(10.0, DecodeSpans(decide_s=2.5, local_compute_s=7.0))
    assert whole.gateway_network_s == 0.5
    assert whole.total_s == 20.0
    assert dict(whole.items())["local_compute"] == 7.0


def test_who_tells_of_more_than_the_wait_is_not_hidden():
    whole = TtftSpans().answered(1.0, DecodeSpans(local_compute_s=2.0))
    assert (whole.gateway_network_s, whole.total_s) == (0.0, 2.0)


def test_every_span_has_a_name_of_its_own():
    assert len(set(SPAN_NAMES)) == len(SPAN_NAMES) == 19
