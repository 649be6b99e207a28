"""Messages to core types and back; what is malformed is refused here, by field.

A message that Baton's own processes cannot have sent raises HandoverError (in a handover: the
owner tries another way) or InvalidRequest (in a request). proto3 has no required fields, so a
field that was never set looks like 0 or "": what may not be that is checked.
"""

import math
from dataclasses import fields
from typing import Any

from baton.core.errors import (
    BatonError,
    HandoverError,
    Incompatible,
    InvalidRequest,
    Overloaded,
    show,
)
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
    ToDecode,
    ToPrefill,
    Want,
)
from baton.core.hashing import HASH_BYTES
from baton.core.ids import Attempt, BlockId, Epoch, Incarnation, InstanceId, RequestId, Ticket
from baton.core.kv_layout import LayerRange
from baton.core.request import PRIORITY_LEVELS, GenerateRequest
from baton.core.spans import DECODE_SPANS, DecodeSpans
from baton.core.trace import PARTS_TOLD, HandoverTrace, OfferTrace, RankTrace
from baton.proto import worker_pb2 as pb
from baton.proto.convert_layout import layout_core, layout_proto
from baton.proto.convert_sampling import (
    logprobs_core,
    logprobs_proto,
    sampling_core,
    sampling_fields,
)
from baton.proto.errors import error_of

TICKET_BYTES = 16
_OFFER_FIELDS = tuple(field.name for field in fields(OfferTrace))
_RANK_FIELDS = tuple(field.name for field in fields(RankTrace))
_LISTS = ("chunk_s", "offers", "ranks")
_TRACE_FIELDS = tuple(f.name for f in fields(HandoverTrace) if f.name not in _LISTS)


def request_proto(request: GenerateRequest) -> pb.Request:
    """Put a request on the wire."""
    return pb.Request(
        request_id=request.request_id,
        prompt=request.prompt,
        max_tokens=request.max_tokens,
        stop_token_ids=request.stop_token_ids,
        tenant=request.tenant,
        priority=request.priority,
        resumed=request.resumed,
        traceparent=request.traceparent,
        **sampling_fields(request.sampling),
    )


def request_core(message: pb.Request) -> GenerateRequest:
    """Take a request off the wire; InvalidRequest if a field that it must have is missing."""
    if not message.request_id:
        raise InvalidRequest("request_id", message.request_id, "a name")
    if not message.prompt:
        raise InvalidRequest("prompt", [], "at least one token id")
    if message.max_tokens < 1:
        raise InvalidRequest("max_tokens", message.max_tokens, "1 or more")
    if abs(message.priority) > PRIORITY_LEVELS:
        allowed = f"-{PRIORITY_LEVELS} to {PRIORITY_LEVELS}"
        raise InvalidRequest("priority", message.priority, allowed)
    if message.resumed >= min(len(message.prompt), message.max_tokens) and message.resumed:
        allowed = "fewer than max_tokens, and than the tokens of prompt"
        raise InvalidRequest("resumed", message.resumed, allowed)
    return GenerateRequest(
        request_id=RequestId(message.request_id),
        prompt=tuple(message.prompt),
        max_tokens=message.max_tokens,
        sampling=sampling_core(message),
        stop_token_ids=tuple(message.stop_token_ids),
        tenant=message.tenant,
        priority=message.priority,
        resumed=message.resumed,
        traceparent=message.traceparent,
    )


def trace_proto(trace: HandoverTrace) -> pb.HandoverTrace:
    """Put a trace on the wire; both have the same fields."""
    offers = (pb.OfferTrace(**_told(offer, _OFFER_FIELDS)) for offer in trace.offers)
    ranks = (pb.RankTrace(**_told(rank, _RANK_FIELDS)) for rank in trace.ranks)
    return pb.HandoverTrace(
        **_told(trace, _TRACE_FIELDS), chunk_s=trace.chunk_s, offers=offers, ranks=ranks
    )


def trace_core(message: pb.HandoverTrace) -> HandoverTrace:
    """Take a trace off the wire."""
    return HandoverTrace(
        **_told(message, _TRACE_FIELDS),
        chunk_s=tuple(message.chunk_s),
        offers=tuple(OfferTrace(**_told(offer, _OFFER_FIELDS)) for offer in message.offers),
        ranks=tuple(RankTrace(**_told(rank, _RANK_FIELDS)) for rank in message.ranks),
    )


def _told(source: object, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}


def spans_proto(spans: DecodeSpans) -> pb.DecodeSpans:
    """Put spans on the wire; both have the same fields."""
    return pb.DecodeSpans(**{name: getattr(spans, name) for name in DECODE_SPANS})


def spans_core(message: pb.DecodeSpans) -> DecodeSpans:
    """Take spans off the wire; what is no duration counts as none."""
    told = {name: getattr(message, name) for name in DECODE_SPANS}
    return DecodeSpans(**{name: s if 0 < s < math.inf else 0.0 for name, s in told.items()})


def error_proto(error: BatonError) -> pb.Error:
    """Put an error on the wire."""
    retry_after_s = error.retry_after_s if isinstance(error, Overloaded) else 0.0
    return pb.Error(code=error.code, message=error.message, retry_after_s=retry_after_s)


def error_core(message: pb.Error) -> BatonError:
    """Take an error off the wire; it has the same code and text, and is there to be raised."""
    error = error_of(message.code, message.message)
    if isinstance(error, Overloaded) and 0 < message.retry_after_s < math.inf:
        error.retry_after_s = message.retry_after_s
    return error


def to_prefill_proto(message: ToPrefill) -> pb.ToPrefill:
    """Put what decode says to prefill on the wire."""
    match message:
        case Open():
            return pb.ToPrefill(open=open_proto(message))
        case Offer():
            return pb.ToPrefill(offer=offer_proto(message))
        case Received():
            return pb.ToPrefill(received=pb.Received(attempt=message.attempt))
        case Abort():
            return pb.ToPrefill(abort=pb.Abort(attempt=message.attempt, reason=message.reason))


def to_prefill_core(message: pb.ToPrefill) -> ToPrefill:
    """Take what decode says off the wire; HandoverError or InvalidRequest if malformed.

    Incompatible, with both versions, if decode speaks another one.
    """
    match message.WhichOneof("message"):
        case "open":
            return open_core(message.open)
        case "offer":
            return offer_core(message.offer)
        case "received":
            return Received(Attempt(message.received.attempt))
        case "abort":
            return Abort(Attempt(message.abort.attempt), message.abort.reason)
        case _:
            raise _malformed("ToPrefill.message", None, "open, offer, received or abort")


def to_decode_proto(message: ToDecode) -> pb.ToDecode:
    """Put what prefill says to decode on the wire."""
    match message:
        case Accepted():
            accepted = pb.Accepted(
                incarnation=message.incarnation,
                transports=message.transports,
                layout=layout_proto(message.layout),
                place_blocks=message.place_blocks,
                direct=message.direct,
            )
            return pb.ToDecode(accepted=accepted)
        case Offer():
            return pb.ToDecode(offer=offer_proto(message))
        case Want(attempt, first, end):
            return pb.ToDecode(want=pb.Want(attempt=attempt, first_block=first, end_block=end))
        case Pulled(attempt):
            return pb.ToDecode(pulled=pb.Pulled(attempt=attempt))
        case Refused():
            return pb.ToDecode(refused=pb.Refused(code=message.code, message=message.message))


def to_decode_core(message: pb.ToDecode) -> ToDecode:
    """Take what prefill says off the wire; HandoverError if malformed."""
    match message.WhichOneof("message"):
        case "accepted":
            accepted = message.accepted
            return Accepted(
                incarnation=_incarnation("Accepted.incarnation", accepted.incarnation),
                layout=layout_core("Accepted.layout", accepted.layout),
                transports=tuple(accepted.transports),
                place_blocks=accepted.place_blocks,
                direct=accepted.direct,
            )
        case "offer":
            return offer_core(message.offer)
        case "want":
            want = message.want
            if want.first_block >= want.end_block:
                blocks = (want.first_block, want.end_block)
                raise _malformed("Want.blocks", blocks, "a start below its end")
            return Want(Attempt(want.attempt), want.first_block, want.end_block)
        case "pulled":
            return Pulled(Attempt(message.pulled.attempt))
        case "refused":
            if not message.refused.code:
                raise _malformed("Refused.code", "", "a code of core/errors.py")
            return Refused(message.refused.code, message.refused.message)
        case _:
            raise _malformed("ToDecode.message", None, "accepted, want, pulled, offer or refused")


def open_proto(message: Open) -> pb.Open:
    return pb.Open(
        version=message.version,
        compatibility=message.compatibility,
        decode_instance=message.decode_instance,
        decode_incarnation=message.decode_incarnation,
        ticket=message.ticket,
        attempt=message.attempt,
        request=request_proto(message.request),
        bytes_per_s=message.bytes_per_s,
        layout=layout_proto(message.layout),
        cached_blocks=message.cached_blocks,
        transports=message.transports,
        place_blocks=message.place_blocks,
        device_ways=message.device_ways,
    )


def open_core(message: pb.Open) -> Open:
    if message.version != PROTOCOL_VERSION:  # before the fields, which it may not share
        raise Incompatible(
            f"decode speaks handover protocol {message.version}, prefill {PROTOCOL_VERSION}"
        )
    if len(message.ticket) != TICKET_BYTES:
        raise _malformed("Open.ticket", message.ticket, f"{TICKET_BYTES} bytes")
    if not message.decode_instance:
        raise _malformed("Open.decode_instance", "", "a name")
    if not message.HasField("request"):
        raise _malformed("Open.request", None, "a request")
    if not 0 <= message.bytes_per_s < math.inf:
        raise _malformed("Open.bytes_per_s", message.bytes_per_s, "a finite number, 0 or more")
    return Open(
        version=message.version,
        compatibility=message.compatibility,
        layout=layout_core("Open.layout", message.layout),
        decode_instance=InstanceId(message.decode_instance),
        decode_incarnation=_incarnation("Open.decode_incarnation", message.decode_incarnation),
        ticket=Ticket(message.ticket),
        attempt=Attempt(message.attempt),
        request=request_core(message.request),
        bytes_per_s=message.bytes_per_s,
        cached_blocks=message.cached_blocks,
        transports=tuple(message.transports),
        place_blocks=message.place_blocks,
        device_ways=tuple(message.device_ways),
    )


def offer_proto(message: Offer) -> pb.Offer:
    blocks = [
        pb.OfferedBlock(block=b.ref.block, epoch=b.ref.epoch, digest=b.digest)
        for b in message.blocks
    ]
    return pb.Offer(
        attempt=message.attempt,
        index=message.index,
        layer_start=message.layers.start,
        layer_end=message.layers.end,
        first_block=message.first_block,
        blocks=blocks,
        first=None if message.first is None else _first_proto(message.first),
    )


def _first_proto(first: FirstToken) -> pb.FirstToken:
    return pb.FirstToken(
        token=first.token,
        queue_s=first.queue_s,
        compute_s=first.compute_s,
        chunks=first.chunks,
        cached_tokens=first.cached_tokens,
        offer_s=first.offer_s,
        chunk_s=first.chunk_s,
        logprobs=None if first.logprobs is None else logprobs_proto(first.logprobs),
    )


def offer_core(message: pb.Offer) -> Offer:
    if message.layer_start >= message.layer_end:
        layers = (message.layer_start, message.layer_end)
        raise _malformed("Offer.layers", layers, "a start below its end")
    return Offer(
        attempt=Attempt(message.attempt),
        index=message.index,
        layers=LayerRange(message.layer_start, message.layer_end),
        first_block=message.first_block,
        blocks=tuple(_offered_block_core(block) for block in message.blocks),
        first=_first_core(message.first) if message.HasField("first") else None,
    )


def _first_core(first: pb.FirstToken) -> FirstToken:
    logprobs = logprobs_core(first.logprobs) if first.HasField("logprobs") else None
    return FirstToken(
        token=first.token,
        queue_s=first.queue_s,
        compute_s=first.compute_s,
        chunks=first.chunks,
        cached_tokens=first.cached_tokens,
        offer_s=first.offer_s,
        chunk_s=tuple(first.chunk_s[:PARTS_TOLD]),
        logprobs=logprobs,
    )


def _offered_block_core(message: pb.OfferedBlock) -> OfferedBlock:
    if not message.digest or len(message.digest) % HASH_BYTES:
        allowed = f"{HASH_BYTES} bytes for each unit"
        raise _malformed("OfferedBlock.digest", message.digest, allowed)
    ref = BlockRef(BlockId(message.block), Epoch(message.epoch))
    return OfferedBlock(ref, message.digest)


def _incarnation(field: str, value: int) -> Incarnation:
    if value == 0:
        raise _malformed(field, value, "what new_incarnation drew, never 0")
    return Incarnation(value)


def _malformed(field: str, value: object, allowed: str) -> HandoverError:
    return HandoverError(f"malformed message: {field}: {show(value)}; allowed: {allowed}")
