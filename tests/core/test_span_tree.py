import pytest

from baton.core.span_tree import Node, tree, walk
from baton.core.spans import DecodeSpans, TtftSpans
from baton.core.trace import HandoverTrace, OfferTrace, RankTrace, RequestTrace

DECODE = DecodeSpans(
    decide_s=1,
    handshake_s=2,
    prefill_network_s=4,
    prefill_queue_s=3,
    prefill_compute_s=5,
    prefill_offer_s=1,
    transfer_s=2,
    admit_s=1,
)
SPANS = TtftSpans(tokenize_s=2, gateway_queue_s=1).answered(25.0, DECODE)
TRACE = RequestTrace(
    "r",
    "decode-0",
    prompt_tokens=9,
    output_tokens=3,
    finish="length",
    handovers=(
        HandoverTrace("prefill-1", 0, "peer_lost"),
        HandoverTrace(
            "prefill-0",
            1,
            "ok",
            bytes=64,
            transport="shm",
            offered_s=15.0,
            chunk_s=(2.0, 5.0),
            offers=(
                OfferTrace(0, 2, 0, 4, offered_s=11.0, read_s=11.5, done_s=12.5, bytes=48),
                OfferTrace(2, 4, 0, 4, offered_s=15.0, read_s=15.0, done_s=17.0, bytes=16),
                OfferTrace(0, 4, 4, 1, offered_s=15.0),
            ),
            ranks=(RankTrace(1, 64, begin_s=11.5, end_s=16.0, busy_s=2.0),),
        ),
    ),
    ttft_s=28.0,
    ttft_spans=SPANS,
    e2e_s=40.0,
)


BESIDE = ("kv_read", "rank_transfer")
"""They overlap what is computed meanwhile."""


def contains(node: Node) -> None:
    """Each span lies within the one that it is in, and after the one before it."""
    end = node.start_s
    for child in node.children:
        assert child.start_s >= (node.start_s if child.name in BESIDE else end) - 1e-9
        end = child.start_s + child.seconds
        contains(child)
    assert end <= node.start_s + node.seconds + 1e-9


def test_spans_lie_in_order_within_their_parents():
    root = tree(TRACE)
    contains(root)
    line = [node for node in walk(root) if node.name not in (*BESIDE, "chunk")]
    at = {node.name: (node.start_s, node.seconds) for node in line}
    assert at == {
        "request": (0, 40),
        "tokenize": (0, 2),
        "gateway_queue": (2, 1),
        "decode": (6, 19),  # the network took 6, and half of it was before
        "decide": (6, 1),
        "handover": (7, 17),
        "handshake": (7, 2),
        "prefill": (11, 9),
        "prefill_queue": (11, 3),
        "prefill_compute": (14, 5),
        "prefill_offer": (19, 1),
        "transfer": (22, 2),
        "admit": (24, 1),
        "generate": (28, 12),
    }


def test_chunks_reads_and_ranks_are_told_one_by_one():
    parts = [(n.name, n.start_s, n.seconds) for n in walk(tree(TRACE)) if n.name in BESIDE]
    # Open was sent at 7: the last offer came at 22, where the exposed transfer begins.
    assert parts == [("kv_read", 18.5, 1), ("kv_read", 22, 2), ("rank_transfer", 18.5, 4.5)]
    chunks = [(n.start_s, n.seconds) for n in walk(tree(TRACE)) if n.name == "chunk"]
    assert chunks == [(14, 2), (16, 3)]
    [rank] = [n.attributes for n in walk(tree(TRACE)) if n.name == "rank_transfer"]
    assert rank["baton.rank"] == 1
    assert rank["baton.busy_s"] == 2.0


def test_instances_and_transport_are_told():
    nodes = {node.name: node.attributes for node in walk(tree(TRACE))}
    assert nodes["prefill"]["baton.instance"] == "prefill-0"
    assert nodes["decode"]["baton.instance"] == "decode-0"
    assert nodes["transfer"]["baton.transport"] == "shm"
    assert nodes["request"]["baton.request_id"] == "r"


@pytest.mark.parametrize("error", ["overloaded", "cancelled"])
def test_a_request_without_a_token_has_its_own_span_only(error: str):
    root = tree(RequestTrace("r", "d", 1, 0, "error", error=error, e2e_s=2.0))
    assert [node.name for node in walk(root)] == ["request"]
    assert root.attributes["baton.error"] == error
