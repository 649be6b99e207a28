"""A request's time to first token, in named spans that follow each other and add up to it.

    gateway  │wake│tokenize│queue│lost│◀──────── waits for decode ───────▶│
    decode                            ↓ │decide│failed│…│admit│outbox│ ↓
    either                                             │handshake│…│room│connect│transfer│
    prefill                                                  ↓│queue│compute│offer│↓
    or, where decode computes the prompt itself        │local queue│local compute│

Each process measures what it does itself, and tells durations: clocks of different processes are
never subtracted. What is on the way between two of them (arrows: the network, gRPC and both event
loops) is how long one waits for the other, less what the other says that it did meanwhile.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, slots=True)
class DecodeSpans:
    """The part from a request's arrival in a decode instance to its first token's leaving it.

    All are seconds, 0 for what did not happen.
    """

    decide_s: float = 0.0
    """From the request's arrival until it is chosen where its prompt is computed."""
    failed_handovers_s: float = 0.0
    """Attempts that failed, each until the next way was tried."""
    handshake_s: float = 0.0
    """Reaching prefill: connection, Open and Accepted, as far as prefill did not work meanwhile."""
    prefill_network_s: float = 0.0
    """To prefill and back, beside the handshake."""
    prefill_queue_s: float = 0.0
    """Waiting for prefill's engine, or for KV that it reads from decode's cache first."""
    prefill_compute_s: float = 0.0
    """From the first step that computes the prompt to the first token."""
    prefill_offer_s: float = 0.0
    """Digesting, and staging, the last blocks before they are offered."""
    room_s: float = 0.0
    """Waiting for room in decode's KV pool after the last offer; before it compute hides it."""
    connect_s: float = 0.0
    """Waiting for the transport's connection after that."""
    transfer_s: float = 0.0
    """The transfer that compute did not hide: reading and verifying after all that."""
    local_queue_s: float = 0.0
    """Waiting for decode's own engine, where it computes the prompt."""
    local_compute_s: float = 0.0
    """From its first step with the prompt to the first token."""
    admit_s: float = 0.0
    """From verified KV to the first token's being ready to be sent."""
    outbox_s: float = 0.0
    """From there until it leaves with the messages of its step."""

    @property
    def total_s(self) -> float:
        """The whole part."""
        return float(sum(getattr(self, name) for name in DECODE_SPANS))


DECODE_SPANS = tuple(f.name for f in fields(DecodeSpans))


@dataclass(frozen=True, slots=True)
class TtftSpans:
    """All spans of one request. Seconds, 0 for what did not happen."""

    wake_s: float = 0.0
    """Before the request was read: waiting for a decode instance, of which there was none."""
    tokenize_s: float = 0.0
    """Checking the request, its chat template, and tokens from text."""
    gateway_queue_s: float = 0.0
    """From the valid request until it is sent to a decode instance."""
    lost_s: float = 0.0
    """At decode instances that were lost or left before the first token, and looking for others."""
    gateway_network_s: float = 0.0
    """To the decode instance and back."""
    decode: DecodeSpans = DecodeSpans()

    def answered(self, wait_s: float, decode: DecodeSpans) -> "TtftSpans":
        """Return these with the wait for the decode instance, and what that says of it."""
        network_s = max(0.0, wait_s - decode.total_s)
        return replace(self, gateway_network_s=network_s, decode=decode)

    def items(self) -> Iterator[tuple[str, float]]:
        """Yield name (without its unit) and seconds of every span, in order of time."""
        for name in GATEWAY_SPANS:
            yield name.removesuffix("_s"), getattr(self, name)
        for name in DECODE_SPANS:
            yield name.removesuffix("_s"), getattr(self.decode, name)

    @property
    def total_s(self) -> float:
        """Their sum, which is the time to first token."""
        return sum(seconds for _, seconds in self.items())


GATEWAY_SPANS = tuple(f.name for f in fields(TtftSpans) if f.name != "decode")
SPAN_NAMES = tuple(name for name, _ in TtftSpans().items())
"""Of all spans, as metrics and answers name them."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """What had been done with a request when it was found valid."""

    wake_s: float
    tokenize_s: float
    valid_at: float
    """On the gateway's clock."""
    traceparent: str = ""
    """The caller's span, as W3C Trace Context writes it; empty if it told none."""


@dataclass(frozen=True, slots=True)
class HandoverWait:
    """How a decode instance waited for one handover that went well, in seconds."""

    before_open_s: float
    """From the attempt's start until Open was sent."""
    handshake_s: float
    """From Open to Accepted."""
    offered_s: float
    """From Open to the last offer."""
    room_s: float
    connect_s: float
    transfer_s: float
    queue_s: float
    """Told by prefill, as are the next two."""
    compute_s: float
    offer_s: float

    def put_into(self, spans: DecodeSpans) -> DecodeSpans:
        """Return `spans` with those of the handover; these add up to the whole wait.

        Prefill queues while Accepted is on its way: of the handshake counts what is not prefill's.
        """
        worked_s = self.queue_s + self.compute_s + self.offer_s
        away_s = max(0.0, self.offered_s - worked_s)
        handshake_s = min(self.handshake_s, away_s)
        return replace(
            spans,
            handshake_s=self.before_open_s + handshake_s,
            prefill_network_s=away_s - handshake_s,
            prefill_queue_s=self.queue_s,
            prefill_compute_s=self.compute_s,
            prefill_offer_s=self.offer_s,
            room_s=self.room_s,
            connect_s=self.connect_s,
            transfer_s=self.transfer_s,
        )
