"""What goes on the wire comes off it again, equal; what cannot be meant is refused by name."""

from contextlib import suppress
from dataclasses import fields

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.errors import (
    BatonError,
    HandoverError,
    Incompatible,
    InvalidConfig,
    InvalidRequest,
    Overloaded,
    all_errors,
)
from baton.core.grammar import Grammar
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
from baton.core.kv_layout import KV_ITEM_BYTES, KVLayout, LayerRange
from baton.core.request import GenerateRequest, SamplingParams, TokenLogprobs
from baton.core.sharded_layout import ShardedLayout
from baton.core.trace import HandoverTrace, OfferTrace, RankTrace
from baton.proto import worker_pb2 as pb
from baton.proto.convert import (
    error_core,
    error_proto,
    request_core,
    request_proto,
    to_decode_core,
    to_decode_proto,
    to_prefill_core,
    to_prefill_proto,
    trace_core,
    trace_proto,
)
from baton.proto.convert_layout import MOST

uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
nonzero64 = st.integers(1, 2**64 - 1)
seconds = st.floats(0, 1e9)
names = st.text(min_size=1, max_size=20)
digests = st.binary(min_size=16, max_size=16)
tokens = st.lists(uint32, max_size=20).map(tuple)

requests = st.builds(
    GenerateRequest,
    request_id=names,
    prompt=st.lists(uint32, min_size=1, max_size=40).map(tuple),
    max_tokens=st.integers(1, 2**32 - 1),
    sampling=st.builds(
        SamplingParams,
        temperature=st.floats(0, 2),
        top_k=uint32,
        top_p=st.floats(0, 1, exclude_min=True),
        seed=st.integers(0, 2**63 - 1),
        min_p=st.floats(0, 1),
        typical_p=st.floats(0, 1, exclude_min=True),
        repetition_penalty=st.floats(0.01, 100),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        logit_bias=st.lists(st.tuples(uint32, st.floats(-100, 100)), max_size=5).map(tuple),
        bad_words=st.lists(st.lists(uint32, min_size=1, max_size=4).map(tuple), max_size=4).map(
            tuple
        ),
        min_tokens=uint32,
        logprobs=st.none() | uint32,
    ),
    stop_token_ids=tokens,
    tenant=st.text(max_size=20),
    priority=st.integers(-10, 10),
    traceparent=st.text(max_size=60),
)
float32 = st.floats(allow_nan=False, width=32)
logprobs = st.builds(
    TokenLogprobs, float32, st.lists(st.tuples(uint32, float32), max_size=5).map(tuple)
)
sizes = st.integers(1, MOST)
layouts = st.builds(
    ShardedLayout,
    st.builds(
        KVLayout,
        layers=st.integers(3, MOST),
        kv_heads=sizes,
        block_size=st.sampled_from([8, 16, 32]),
        head_dim=sizes.map(lambda size: size // 2 * 2 or 2),
        dtype=st.sampled_from(sorted(KV_ITEM_BYTES)),
        parts=st.sampled_from([1, 2]),
    ),
    stages=st.sampled_from([(), (1,), (1, 2)]),
)
ways = st.lists(st.binary(max_size=200), max_size=3).map(tuple)
opens = st.builds(
    Open,
    layout=layouts,
    version=st.just(PROTOCOL_VERSION),
    compatibility=st.text(),
    decode_instance=names,
    decode_incarnation=nonzero64,
    ticket=digests,
    attempt=uint32,
    request=requests,
    bytes_per_s=seconds,
    cached_blocks=uint32,
    transports=ways,
    place_blocks=uint32,
    device_ways=st.lists(st.text(max_size=50), max_size=3).map(tuple),
)
layers = st.tuples(uint32, uint32).filter(lambda pair: pair[0] != pair[1])
offers = st.builds(
    Offer,
    attempt=uint32,
    index=uint32,
    layers=layers.map(lambda pair: LayerRange(min(pair), max(pair))),
    first_block=uint32,
    blocks=st.lists(
        st.builds(OfferedBlock, ref=st.builds(BlockRef, uint32, uint64), digest=digests),
        max_size=8,
    ).map(tuple),
    first=st.none()
    | st.builds(
        FirstToken,
        uint32,
        seconds,
        seconds,
        uint32,
        uint32,
        st.none() | logprobs,
        chunk_s=st.lists(seconds, max_size=3).map(tuple),
    ),
)
wants = st.builds(lambda attempt, blocks: Want(attempt, min(blocks), max(blocks)), uint32, layers)
to_prefill = st.one_of(
    opens, offers, st.builds(Received, uint32), st.builds(Abort, uint32, st.text(max_size=50))
)
to_decode = st.one_of(
    offers,
    wants,
    st.builds(Pulled, uint32),
    st.builds(Accepted, nonzero64, layouts, ways, uint32, st.booleans()),
    st.builds(Refused, names, st.text(max_size=50)),
)
by_type: dict[object, st.SearchStrategy] = {str: names, int: uint32, float: seconds}


def told(cls: type) -> st.SearchStrategy:
    """Return what draws every field of a dataclass by its type."""
    return st.builds(cls, **{field.name: by_type[field.type] for field in fields(cls)})


by_type |= {
    tuple[item, ...]: st.lists(drawn, max_size=3).map(tuple)
    for item, drawn in (
        (float, seconds),
        (OfferTrace, told(OfferTrace)),
        (RankTrace, told(RankTrace)),
    )
}
traces = told(HandoverTrace)


def over_the_wire(message):
    """Serialise and parse, as a stream would."""
    return type(message).FromString(message.SerializeToString())


@settings(deadline=None)
@given(requests)
def test_requests_come_back_equal(request: GenerateRequest):
    assert request_core(over_the_wire(request_proto(request))) == request


@settings(deadline=None)
@given(to_prefill)
def test_messages_to_prefill_come_back_equal(message: ToPrefill):
    assert to_prefill_core(over_the_wire(to_prefill_proto(message))) == message


@settings(deadline=None)
@given(to_decode)
def test_messages_to_decode_come_back_equal(message: ToDecode):
    assert to_decode_core(over_the_wire(to_decode_proto(message))) == message


@settings(deadline=None)
@given(traces)
def test_traces_come_back_equal(trace: HandoverTrace):
    assert trace_core(over_the_wire(trace_proto(trace))) == trace


def test_a_trace_on_the_wire_has_the_fields_of_a_trace():
    on_wire = {field.name for field in pb.HandoverTrace.DESCRIPTOR.fields}
    assert on_wire == {field.name for field in fields(HandoverTrace)}


@pytest.mark.parametrize("cls", all_errors().values())
def test_errors_come_back_equal(cls: type[BatonError]):
    refusal = issubclass(cls, (InvalidRequest, InvalidConfig))
    error = cls("max_tokens", 0, "1 or more") if refusal else cls("why")
    back = error_core(over_the_wire(error_proto(error)))
    assert type(back) is cls
    assert (str(back), back.code, back.retryable) == (str(error), error.code, error.retryable)


def test_when_to_come_back_is_told():
    back = error_core(over_the_wire(error_proto(Overloaded("full", 17.5))))
    assert isinstance(back, Overloaded)
    assert back.retry_after_s == 17.5
    assert error_core(pb.Error(code="overloaded", message="of an older instance")).retry_after_s


def test_a_resumed_request_comes_back_equal():
    request = GenerateRequest("r", (1, 2), 4).resume([3, 4, 5])
    assert request_core(over_the_wire(request_proto(request))) == request


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"request_id": ""}, "request_id"),
        ({"resumed": 1}, "resumed"),
        ({"prompt": [1, 2, 3], "resumed": 2, "max_tokens": 2}, "resumed"),
        ({"prompt": []}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"priority": 11}, "priority"),
        ({"priority": -11}, "priority"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"typical_p": 0.0}, "typical_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty"),
        ({"logit_bias": [pb.LogitBias(bias=float("nan"))]}, "logit_bias"),
        ({"bad_words": [pb.TokenSequence()]}, "bad_words"),
        ({"grammar": pb.Grammar()}, "grammar.kind"),
        ({"grammar": pb.Grammar(kind="regex", source="ä" * 40_000)}, "grammar"),
    ],
)
def test_a_request_that_lacks_a_field_is_refused(change: dict[str, object], field: str):
    whole: dict = {"request_id": "r", "prompt": [1], "max_tokens": 1, "top_p": 1.0}
    request_core(pb.Request(**whole))
    with pytest.raises(InvalidRequest) as caught:
        request_core(pb.Request(**(whole | change)))
    assert caught.value.field == field


def test_a_request_that_says_nothing_of_sampling_gets_what_changes_nothing():
    sampling = request_core(pb.Request(request_id="r", prompt=[1], max_tokens=1, top_p=1)).sampling
    assert sampling == SamplingParams(temperature=0.0)
    assert sampling.plain


@pytest.mark.parametrize("field", fields(SamplingParams), ids=lambda field: field.name)
def test_every_sampling_parameter_crosses_the_wire(field):
    """A parameter that is added later and forgotten on the wire is found here."""
    odd = {
        "logit_bias": ((3, 0.5),),
        "bad_words": ((1, 2), (3,)),
        "logprobs": 0,
        "grammar": Grammar("regex", "ä+"),
    }
    value = odd.get(field.name, 0.25 if isinstance(field.default, float) else 7)
    assert value != field.default
    changed = SamplingParams(**{field.name: value})
    request = GenerateRequest("r", (1,), 1, changed)
    assert request_core(over_the_wire(request_proto(request))).sampling == changed


def layout_message(**change: object) -> pb.ShardedLayout:
    sizes = {"layers": 2, "kv_heads": 2, "block_size": 8, "head_dim": 4, "parts": 2, "tp": 1}
    return pb.ShardedLayout(**(sizes | {"dtype": "float32"} | change))


def open_message(**change: object) -> pb.ToPrefill:
    request = pb.Request(request_id="r", prompt=[1], max_tokens=1, top_p=1.0)
    whole: dict = {
        "version": PROTOCOL_VERSION,
        "decode_instance": "d",
        "decode_incarnation": 1,
        "ticket": bytes(16),
        "request": request,
        "layout": layout_message(),
    }
    return pb.ToPrefill(open=pb.Open(**(whole | change)))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.ToPrefill(), "ToPrefill.message"),
        (open_message(ticket=b""), "Open.ticket"),
        (open_message(ticket=bytes(15)), "Open.ticket"),
        (open_message(ticket=bytes(17)), "Open.ticket"),
        (open_message(decode_instance=""), "Open.decode_instance"),
        (open_message(decode_incarnation=0), "Open.decode_incarnation"),
        (open_message(request=None), "Open.request"),
        (open_message(layout=None), "Open.layout.layers"),
        (open_message(layout=layout_message(tp=MOST + 1)), "Open.layout.tp"),
        (open_message(layout=layout_message(tp=3)), "Open.layout.tp"),
        (open_message(layout=layout_message(stages=[2])), "Open.layout.stages"),
        (open_message(layout=layout_message(dtype="int4")), "Open.layout.dtype"),
        (open_message(request=pb.Request()), "request_id"),
    ],
)
def test_malformed_messages_to_prefill_are_refused(message: pb.ToPrefill, field: str):
    to_prefill_core(open_message())
    with pytest.raises((HandoverError, InvalidRequest), match=field):
        to_prefill_core(message)


def test_another_version_is_refused_whatever_else_it_may_say():
    message = pb.ToPrefill(open=pb.Open(version=PROTOCOL_VERSION + 1))
    both = f"protocol {PROTOCOL_VERSION + 1}, prefill {PROTOCOL_VERSION}"
    with pytest.raises(Incompatible, match=both):
        to_prefill_core(message)


def offer_message(**change: object) -> pb.ToDecode:
    block = pb.OfferedBlock(digest=bytes(16))
    return pb.ToDecode(offer=pb.Offer(**({"layer_end": 2, "blocks": [block]} | change)))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.ToDecode(), "ToDecode.message"),
        (pb.ToDecode(accepted=pb.Accepted()), "Accepted.incarnation"),
        (pb.ToDecode(refused=pb.Refused(message="no")), "Refused.code"),
        (pb.ToDecode(want=pb.Want(first_block=2, end_block=2)), "Want.blocks"),
        (offer_message(layer_end=0), "Offer.layers"),
        (offer_message(layer_start=3), "Offer.layers"),
        (offer_message(blocks=[pb.OfferedBlock(digest=bytes(15))]), "OfferedBlock.digest"),
        (offer_message(blocks=[pb.OfferedBlock()]), "OfferedBlock.digest"),
        (
            pb.ToDecode(accepted=pb.Accepted(incarnation=1)),
            "Accepted.layout.layers: 0; allowed: 1 to",
        ),
        (
            offer_message(first=pb.FirstToken(logprobs=pb.TokenLogprobs(top_tokens=[1]))),
            "TokenLogprobs",
        ),
    ],
)
def test_malformed_messages_to_decode_are_refused(message: pb.ToDecode, field: str):
    to_decode_core(offer_message())
    with pytest.raises(HandoverError, match=field):
        to_decode_core(message)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_message_or_one_of_our_errors(data: bytes):
    for message, convert in ((pb.ToPrefill(), to_prefill_core), (pb.ToDecode(), to_decode_core)):
        # DecodeError is protobuf's own; gRPC turns it into a status.
        with suppress(DecodeError, BatonError):
            message.ParseFromString(data)
            convert(message)
