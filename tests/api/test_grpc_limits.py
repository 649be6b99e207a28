"""Clients of the gRPC API that take nothing, or too much."""

import asyncio
import contextlib

import grpc
import pytest

from baton.proto import inference_pb2 as pb
from baton.proto import inference_pb2_grpc as pb_grpc

SOON = 60


async def test_a_grpc_client_that_never_reads_is_cut_and_others_go_on(
    make_front_door, leader, text_script, until
):
    leader.script = text_script("word " * 200)
    door = await make_front_door(limits={"reader_timeout_s": 1.0})
    async with grpc.aio.insecure_channel(door.grpc_address) as channel:
        ask = pb.GenerateRequest(text="hi", n=64, max_tokens=200, logprobs=20, ignore_eos=True)
        stub = pb_grpc.InferenceStub(channel)
        call = stub.Generate(ask)
        await until(lambda: len(leader.submits) == 64 and leader.running == 0)
        others = [stub.Generate(pb.GenerateRequest(text="hi"), timeout=SOON) for _ in range(5)]
        for other in others:
            assert [response async for response in other][-1].finish_reason
        async with asyncio.timeout(SOON):
            await door.gateway.idle()
        call.cancel()


async def test_calls_on_one_connection_are_bounded(make_front_door, leader, text_script, until):
    leader.script = text_script("one two three", hold_after=1)
    door = await make_front_door(limits={"streams_per_connection": 2})

    async def answer(stub: pb_grpc.InferenceStub) -> str:
        request = pb.GenerateRequest(text="hi", max_tokens=50)
        return "".join([told.text async for told in stub.Generate(request, timeout=SOON)])

    own = (("grpc.use_local_subchannel_pool", 1),)
    async with (
        grpc.aio.insecure_channel(door.grpc_address, options=own) as channel,
        grpc.aio.insecure_channel(door.grpc_address, options=own) as another,
    ):
        stub = pb_grpc.InferenceStub(channel)
        answers = [asyncio.create_task(answer(stub)) for _ in range(5)]
        await until(lambda: leader.running == 2)
        other = asyncio.create_task(answer(pb_grpc.InferenceStub(another)))
        await until(lambda: leader.running == 3)
        assert len(leader.submits) == 3, "the rest waits in the client, or is refused"
        leader.resume()
        assert await other == "one two three"
        told = await asyncio.gather(*answers, return_exceptions=True)
        assert told.count("one two three") >= 2


async def test_grpc_messages_and_metadata_are_bounded(make_front_door):
    door = await make_front_door(limits={"max_body_bytes": 2048, "max_header_bytes": 2048})
    async with grpc.aio.insecure_channel(door.grpc_address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        fine = stub.ListModels(pb.ListModelsRequest(), metadata=(("x", "y" * 100),), timeout=SOON)
        assert await fine.code() is grpc.StatusCode.OK
        for request, metadata in (
            (pb.GenerateRequest(text="x" * 3000), ()),
            (pb.GenerateRequest(text="x"), (("x", "y" * 4000),)),
        ):
            call = stub.Generate(request, metadata=metadata, timeout=SOON)
            assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_connections_are_bounded(make_front_door):
    door = await make_front_door(limits={"max_connections": 2})
    own = (("grpc.use_local_subchannel_pool", 1),)
    async with (
        grpc.aio.insecure_channel(door.grpc_address, options=own) as one,
        grpc.aio.insecure_channel(door.grpc_address, options=own) as two,
    ):
        for channel in (one, two):
            asked = pb_grpc.InferenceStub(channel).ListModels(pb.ListModelsRequest(), timeout=SOON)
            assert await asked.code() is grpc.StatusCode.OK
        reader, writer = await asyncio.open_connection(*door.grpc_address.rsplit(":", 1))
        async with asyncio.timeout(SOON):
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b"", "closed without a word"
        writer.close()
        asked = pb_grpc.InferenceStub(one).ListModels(pb.ListModelsRequest(), timeout=SOON)
        assert await asked.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("method", ["Generate", "ListModels", "Cancel"])
async def test_a_request_that_does_not_come_ends_its_call(make_front_door, leader, method):
    door = await make_front_door(limits={"body_timeout_s": 0.05})
    async with grpc.aio.insecure_channel(door.grpc_address) as channel:
        call = channel.stream_stream(f"/baton.v1.Inference/{method}")(timeout=SOON)
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "the request took longer than 0.05 s" in await call.details()
    assert b'baton_connections_cut_total{reason="slow_sender"} 1.0' in door.gateway.metrics.render()


async def test_a_call_that_ends_without_a_request_is_no_bug(front_door):
    async with grpc.aio.insecure_channel(front_door.grpc_address) as channel:
        call = channel.stream_stream("/baton.v1.Inference/Cancel")(timeout=SOON)
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
        assert await call.details() == "a call without a request"
        unknown = channel.unary_unary("/baton.v1.Inference/Nothing")(b"", timeout=SOON)
        assert await unknown.code() is grpc.StatusCode.UNIMPLEMENTED
