"""Bytes that nobody expects, at the public gRPC service: a status that says so, and no crash."""

import asyncio

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.proto import inference_pb2 as pb

SOON = 60
BOUNDED = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
METHODS = ("Generate", "GenerateBatch", "Tokenize", "Detokenize", "Cancel")
REQUEST = pb.GenerateRequest(text="hi", max_tokens=5, seed=7, stop=["x"])
VALID = [
    REQUEST.SerializeToString(),
    pb.BatchRequest(id="a", generate=REQUEST).SerializeToString(),
    pb.TokenizeRequest(text="hi").SerializeToString(),
    pb.DetokenizeRequest(token_ids=[3, 4, 5]).SerializeToString(),
    pb.CancelRequest(request_id="r").SerializeToString(),
]
ANSWERS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
}


def damaged(message: bytes, at: int, byte: int) -> bytes:
    at %= len(message)
    return message[:at] + bytes([byte]) + message[at + 1 :]


messages = st.builds(
    damaged, st.sampled_from(VALID), st.integers(0, 99), st.integers(0, 255)
) | st.binary(max_size=40)


def parses(data: bytes, method: str) -> bool:
    kind = pb.DESCRIPTOR.services_by_name["Inference"].methods_by_name[method].input_type
    try:
        getattr(pb, kind.name).FromString(data)
    except DecodeError:
        return False
    return True


def status(channel: grpc.Channel, method: str, data: bytes) -> grpc.StatusCode:
    """Send these bytes as a message; return how the call ended."""
    path = f"/baton.v1.Inference/{method}"
    try:
        if method == "GenerateBatch":
            list(channel.stream_stream(path)(iter([data]), timeout=SOON))
        elif method == "Generate":
            list(channel.unary_stream(path)(data, timeout=SOON))
        else:
            channel.unary_unary(path)(data, timeout=SOON)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("method", METHODS)
async def test_any_message_is_answered(front_door, method: str):
    def run() -> None:
        with grpc.insecure_channel(front_door.grpc_address) as channel:

            @BOUNDED
            @given(messages)
            def try_one(data: bytes) -> None:
                told = status(channel, method, data)
                assert told in ANSWERS
                readable = parses(data, method) or method == "GenerateBatch"
                assert readable or told is grpc.StatusCode.INVALID_ARGUMENT

            try_one()

    await asyncio.to_thread(run)
    async with asyncio.timeout(SOON):
        await front_door.gateway.idle()
    front_door.gateway.check()
