"""Where a request's time went; every second is measured by the process that spent it."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from baton.core.spans import TtftSpans

_TRACEPARENT = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def is_traceparent(text: str) -> bool:
    """Return whether that is a span as W3C Trace Context writes it."""
    return _TRACEPARENT.fullmatch(text) is not None


PARTS_TOLD = 64
"""Chunks, and offers, of which a handover's trace tells one by one: the first so many."""


@dataclass(frozen=True, slots=True)
class OfferTrace:
    """One offer of a handover and the read of it: a group of layers of a chunk.

    Times are in seconds since Open was sent, on decode's clock.
    """

    layer_start: int
    layer_end: int
    """The first layer that is not in it."""
    first_block: int
    """Of the prompt, counted in prefill's blocks."""
    blocks: int
    offered_s: float
    """When it came."""
    read_s: float = 0.0
    """When its read began; 0 if there was nothing of it to read."""
    done_s: float = 0.0
    """When it had been read and verified; 0 likewise."""
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class RankTrace:
    """What one of decode's ranks read of a handover; times as in OfferTrace."""

    rank: int
    """Its number in the instance; the leader is 0."""
    bytes: int = 0
    begin_s: float = 0.0
    """When its first read began."""
    end_s: float = 0.0
    """When the last byte of its last read was there."""
    busy_s: float = 0.0
    """How long its reads took, added up; those that overlap count each."""


@dataclass(frozen=True, slots=True)
class HandoverTrace:
    """One attempt to hand a prompt over. Times are in seconds."""

    prefill_instance: str
    attempt: int
    outcome: str
    """`ok`, or the code of the error that ended it."""
    handshake_s: float = 0.0
    """From Open to Accepted."""
    queue_s: float = 0.0
    """Waiting for prefill's engine, told by prefill."""
    compute_s: float = 0.0
    """Computing the prompt, told by prefill."""
    allocation_wait_s: float = 0.0
    """Waiting for room in decode's pool."""
    transfer_s: float = 0.0
    """At least one read was under way."""
    exposed_s: float = 0.0
    """The part of the transfer after the last offer, which compute could not hide."""
    admission_wait_s: float = 0.0
    """From verified KV to the sequence's first decode step."""
    chunks: int = 0
    cached_tokens: int = 0
    """Prompt tokens that prefill found in its prefix cache."""
    blocks: int = 0
    """Of the prompt, as far as they were offered."""
    blocks_saved: int = 0
    """Of these, found in decode's prefix cache: they did not travel."""
    bytes: int = 0
    transport: str = ""
    """What really carried the bytes, as the transport says."""
    offered_s: float = 0.0
    """From Open to the last offer; 0 if that did not come."""
    chunk_s: tuple[float, ...] = ()
    """When each chunk was computed, since the first step began; told by prefill."""
    offers: tuple[OfferTrace, ...] = ()
    ranks: tuple[RankTrace, ...] = ()
    """Those that read anything."""

    @property
    def overlapped(self) -> float:
        """The share of transfer time hidden behind prefill's compute, from 0 to 1."""
        return 1.0 - self.exposed_s / self.transfer_s if self.transfer_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class MigrationTrace:
    """One move of a request from a decode instance that is gone to the next."""

    instance: str
    """The one that is gone."""
    error: str
    """The code of the error with which it ended the request."""
    output_tokens: int
    """That had been generated when it moved."""
    wait_s: float
    """From then until another instance was told of it."""
    backed_up_tokens: int = 0
    """Tokens, from the first, that the instance that is gone said it had backed up."""
    cached_tokens: int = 0
    """Tokens, from the first, that did not have to be computed again."""


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """The way one request went, as its gateway puts it together."""

    request_id: str
    decode_instance: str
    """The last one."""
    prompt_tokens: int
    output_tokens: int
    finish: str
    """A FinishReason."""
    error: str = ""
    """The code of the error that ended it, if one did."""
    tenant: str = ""
    """Whose it is; empty: of anybody."""
    model: str = ""
    """By its own name, whatever alias it was asked for by."""
    traceparent: str = ""
    """The caller's span, as W3C Trace Context writes it."""
    span: str = ""
    """The request's own, likewise, as the instances were told it; empty if nobody traces it."""
    local_prefill: bool = False
    """The decode instance computed the prompt itself."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache of the instance that computed the rest."""
    handovers: tuple[HandoverTrace, ...] = ()
    """All attempts, in order."""
    migrations: tuple[MigrationTrace, ...] = ()
    """From decode instance to decode instance, in order."""
    queue_s: float = 0.0
    """Waiting at the gateway for the instances to have room."""
    ttft_s: float = 0.0
    """From the request's arrival to its first token in the gateway.

    Without the time that its client took to send the body.
    """
    ttft_spans: TtftSpans = field(default_factory=TtftSpans)
    """Where that time went: these add up to it."""
    tpot_s: float = 0.0
    """Mean time per output token after the first."""
    e2e_s: float = 0.0
    itl_s: tuple[float, ...] = field(default=(), repr=False)
    """Gaps between the messages that brought tokens; a kept trace has the first thousand or so."""

    @property
    def served_ttft_s(self) -> float:
        """From when it was sent to an instance to its first token in the gateway."""
        return self.ttft_s - self.queue_s

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON, with the derived ones."""
        data = asdict(self)
        for row, trace in zip(data["handovers"], self.handovers, strict=True):
            row["overlapped"] = trace.overlapped
        data["ttft_spans"] = dict(self.ttft_spans.items())
        return data
