"""The tree of a request's spans, placed in time by the durations that each process told.

    request                                                       ├────────────────────────────────┤
      wake, tokenize, gateway_queue, lost                         ├─┼─┤
      decode                                                          ├──────────────┤
        decide, failed_handovers, local_queue, local_compute, …       ├─┤
        handover                                                        ├──────────┤
          handshake                                                     ├─┤
          prefill: queue, compute (chunks), offer                          ├────┤
          room, connect, transfer                                                 ├┤
          kv_read, one for each group of layers of a chunk                   ├─┤├─┤
          rank_transfer, one for each rank of decode                         ├─────┤
      generate                                                                        ├────────────┤

What is on the way between two processes goes half before and half after, as NTP has it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from baton.core.spans import DecodeSpans
from baton.core.trace import HandoverTrace, RequestTrace

Attributes = dict[str, str | int | float | bool]


@dataclass(frozen=True, slots=True)
class Node:
    """One span, in seconds since the request's arrival."""

    name: str
    start_s: float
    seconds: float
    attributes: Attributes = field(default_factory=dict)
    children: tuple["Node", ...] = ()


def tree(trace: RequestTrace) -> Node:
    """Return the request's span with all others in it; what took no time is left out."""
    spans = trace.ttft_spans
    line = _Line(0.0)
    for name in ("wake", "tokenize", "gateway_queue", "lost"):
        line.add(name, getattr(spans, f"{name}_s"))
    if spans.decode.total_s > 0:
        line.skip(spans.gateway_network_s / 2)
        line.put(_decode(trace, line.now))
    if trace.output_tokens > 1:
        line.now = trace.ttft_s
        line.add("generate", trace.e2e_s - trace.ttft_s)
    facts: Attributes = {
        "baton.request_id": trace.request_id,
        "baton.prompt_tokens": trace.prompt_tokens,
        "baton.cached_tokens": trace.cached_tokens,
        "baton.output_tokens": trace.output_tokens,
        "baton.finish": str(trace.finish),
        "baton.error": trace.error,
        "baton.migrations": len(trace.migrations),
        "baton.ttft_s": trace.ttft_s,
    }
    return Node("request", 0.0, trace.e2e_s, facts, tuple(line.nodes))


def _decode(trace: RequestTrace, start_s: float) -> Node:
    spans, line = trace.ttft_spans.decode, _Line(start_s)
    line.add("decide", spans.decide_s)
    line.add("failed_handovers", spans.failed_handovers_s)
    landed = [handover for handover in trace.handovers if handover.outcome == "ok"]
    if landed and spans.handshake_s > 0:
        line.put(_handover(spans, landed[-1], line.now))
    for name in ("local_queue", "local_compute", "admit", "outbox"):
        line.add(name, getattr(spans, f"{name}_s"))
    facts: Attributes = {
        "baton.instance": trace.decode_instance,
        "baton.local_prefill": trace.local_prefill,
    }
    return Node("decode", start_s, spans.total_s, facts, tuple(line.nodes))


def _handover(spans: DecodeSpans, trace: HandoverTrace, start_s: float) -> Node:
    line = _Line(start_s)
    line.add("handshake", spans.handshake_s)
    line.skip(spans.prefill_network_s / 2)
    inner = _Line(line.now)
    inner.add("prefill_queue", spans.prefill_queue_s)
    if spans.prefill_compute_s > 0:
        chunks = tuple(_chunks(trace, inner.now))
        inner.put(Node("prefill_compute", inner.now, spans.prefill_compute_s, {}, chunks))
    inner.add("prefill_offer", spans.prefill_offer_s)
    where: Attributes = {"baton.instance": trace.prefill_instance}
    line.put(Node("prefill", line.now, inner.now - line.now, where, tuple(inner.nodes)))
    line.skip(spans.prefill_network_s / 2)
    opened_s = line.now - trace.offered_s
    line.add("room", spans.room_s)
    line.add("connect", spans.connect_s)
    moved: Attributes = {
        "baton.transport": trace.transport,
        "baton.bytes": trace.bytes,
        "baton.transfer_s": trace.transfer_s,
    }
    line.add("transfer", spans.transfer_s, moved)
    facts: Attributes = {"baton.attempt": trace.attempt, "baton.blocks": trace.blocks}
    parts = (*line.nodes, *_reads(trace, opened_s), *_ranks(trace, opened_s))
    return Node("handover", start_s, line.now - start_s, facts, parts)


def _chunks(trace: HandoverTrace, start_s: float) -> Iterator[Node]:
    for number, (begin_s, end_s) in enumerate(pairwise((0.0, *trace.chunk_s))):
        yield Node("chunk", start_s + begin_s, end_s - begin_s, {"baton.chunk": number})


def _reads(trace: HandoverTrace, opened_s: float) -> Iterator[Node]:
    """Yield the read of each offer; they overlap each other, and prefill."""
    for offer in trace.offers:
        if offer.done_s > 0:
            facts: Attributes = {
                "baton.layers": f"{offer.layer_start}-{offer.layer_end - 1}",
                "baton.first_block": offer.first_block,
                "baton.blocks": offer.blocks,
                "baton.bytes": offer.bytes,
            }
            yield Node("kv_read", opened_s + offer.read_s, offer.done_s - offer.read_s, facts)


def _ranks(trace: HandoverTrace, opened_s: float) -> Iterator[Node]:
    """Yield each rank's transfer, from its first read to the end of its last one."""
    for rank in trace.ranks:
        facts: Attributes = {
            "baton.rank": rank.rank,
            "baton.bytes": rank.bytes,
            "baton.busy_s": rank.busy_s,
            "baton.transport": trace.transport,
        }
        yield Node("rank_transfer", opened_s + rank.begin_s, rank.end_s - rank.begin_s, facts)


class _Line:
    """Puts spans one after the other."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.nodes: list[Node] = []

    def add(self, name: str, seconds: float, attributes: Attributes | None = None) -> None:
        if seconds > 0:
            self.put(Node(name, self.now, seconds, attributes or {}))

    def put(self, node: Node) -> None:
        self.nodes.append(node)
        self.now = node.start_s + node.seconds

    def skip(self, seconds: float) -> None:
        self.now += seconds


def walk(node: Node) -> Iterator[Node]:
    """Yield a span and all in it."""
    yield node
    for child in node.children:
        yield from walk(child)
