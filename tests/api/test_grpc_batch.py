"""GenerateBatch, and the other calls beside Generate, over real sockets."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from baton.api import grpc_batch
from baton.api.key_file import new_key
from baton.proto import inference_pb2 as pb
from baton.proto import inference_pb2_grpc as pb_grpc

SOON = 60
TEXT = "def add(a, b):"


@pytest.fixture
async def channel(front_door):
    async with grpc.aio.insecure_channel(front_door.grpc_address) as channel:
        yield channel


@pytest.fixture
def stub(channel):
    return pb_grpc.InferenceStub(channel)


class Caller:
    """Holds one call of GenerateBatch."""

    def __init__(self, stub: pb_grpc.InferenceStub) -> None:
        self.requests: asyncio.Queue[pb.BatchRequest | None] = asyncio.Queue()
        self.call = stub.GenerateBatch(self._requests(), timeout=SOON)
        self._responses = aiter(self.call)
        self.told: dict[str, list[pb.BatchResponse]] = {}

    async def _requests(self) -> AsyncIterator[pb.BatchRequest]:
        while (request := await self.requests.get()) is not None:
            yield request

    def generate(self, name: str, **fields: object) -> None:
        generate = pb.GenerateRequest(**({"text": "hi", "max_tokens": 40} | fields))
        self.requests.put_nowait(pb.BatchRequest(id=name, generate=generate))

    def cancel(self, name: str) -> None:
        self.requests.put_nowait(pb.BatchRequest(id=name, cancel=pb.BatchCancel()))

    def done(self) -> None:
        self.requests.put_nowait(None)

    async def next(self) -> pb.BatchResponse:
        response = await anext(self._responses)
        self.told.setdefault(response.id, []).append(response)
        return response

    async def read_all(self) -> None:
        async for response in self._responses:
            self.told.setdefault(response.id, []).append(response)

    def text(self, name: str, index: int = 0) -> str:
        responses = [told.response for told in self.told[name]]
        return "".join(told.text for told in responses if told.index == index)

    def code(self, name: str) -> str:
        return self.told[name][-1].error.code


async def test_many_requests_by_one_call_each_with_its_own_end(stub, leader):
    caller = Caller(stub)
    assert (await caller.next()).opened.max_open == grpc_batch.MAX_OPEN
    for index in range(20):
        caller.generate(f"r{index}", n=1 + index % 2)
    caller.generate("bad", max_tokens=0)
    caller.generate("chat", text=None, chat={"messages": [{"role": "user", "content": "hi"}]})
    caller.done()
    await caller.read_all()
    assert await caller.call.code() is grpc.StatusCode.OK
    for index in range(20):
        assert caller.text(f"r{index}", index % 2) == TEXT
        ends = [r for r in caller.told[f"r{index}"] if r.response.finish_reason]
        assert len(ends) == 1 + index % 2
    assert caller.text("chat") == TEXT
    assert caller.code("bad") == "invalid_request"
    assert "max_tokens" in caller.told["bad"][-1].error.message
    assert len(leader.submits) == 31


async def test_one_request_of_a_batch_is_cancelled_and_its_id_is_free(
    stub, leader, text_script, until
):
    leader.script = text_script(TEXT, hold_after=1)
    caller = Caller(stub)
    await caller.next()
    for name in ("a", "b"):
        caller.generate(name)
    await until(lambda: leader.running == 2)
    caller.cancel("a")
    caller.cancel("nobody")
    while not ("a" in caller.told and caller.told["a"][-1].HasField("error")):
        await caller.next()
    assert caller.code("a") == "cancelled"
    caller.generate("a")
    await until(lambda: len(leader.submits) == 3)
    leader.resume()
    caller.done()
    await caller.read_all()
    assert caller.text("b") == TEXT
    assert caller.told["a"][-1].response.finish_reason


async def test_a_cancel_right_behind_its_request_is_told(stub, front_door, leader, text_script):
    leader.script = text_script(TEXT, hold_after=1)
    caller = Caller(stub)
    for name in ("a", "b", "c"):
        caller.generate(name)
        caller.cancel(name)
    caller.done()
    await caller.read_all()
    assert [caller.code(name) for name in "abc"] == ["cancelled"] * 3
    await front_door.gateway.idle()


async def test_open_requests_of_a_batch_are_bounded(stub, leader, text_script, until, monkeypatch):
    monkeypatch.setattr(grpc_batch, "MAX_OPEN", 2)
    leader.script = text_script(TEXT, hold_after=1)
    caller = Caller(stub)
    assert (await caller.next()).opened.max_open == 2
    for index in range(6):
        caller.generate(str(index))
    await until(lambda: leader.running == 2)
    # The first answers are here, and nothing but the bound keeps the others back.
    assert {(await caller.next()).id, (await caller.next()).id} == {"0", "1"}
    assert len(leader.submits) == 2
    leader.resume()
    caller.done()
    await caller.read_all()
    assert [caller.text(str(index)) for index in range(6)] == [TEXT] * 6


@pytest.mark.parametrize("name", ["", "x" * 65, "taken"])
async def test_a_bad_id_ends_the_call_and_all_its_requests(
    stub, front_door, leader, text_script, until, name
):
    leader.script = text_script(TEXT, hold_after=1)
    caller = Caller(stub)
    caller.generate("taken")
    await until(lambda: leader.running == 1)
    caller.generate(name)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await caller.read_all()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details().startswith("invalid_request: id: ")
    await front_door.gateway.idle()


async def test_a_batch_that_is_cut_off_takes_its_requests_with_it(
    stub, front_door, leader, text_script, until
):
    leader.script = text_script(TEXT, hold_after=1)
    caller = Caller(stub)
    for index in range(5):
        caller.generate(str(index))
    await until(lambda: leader.running == 5)
    caller.call.cancel()
    async with asyncio.timeout(SOON):
        await front_door.gateway.idle()


async def test_a_batch_that_is_never_read_is_cut(make_front_door, leader, text_script, until):
    leader.script = text_script("word " * 200)
    door = await make_front_door(limits={"reader_timeout_s": 1.0})
    async with grpc.aio.insecure_channel(door.grpc_address) as channel:
        caller = Caller(pb_grpc.InferenceStub(channel))
        for index in range(16):
            caller.generate(str(index), n=4, max_tokens=200, logprobs=20, ignore_eos=True)
        await until(lambda: len(leader.submits) >= 4)
        async with asyncio.timeout(SOON):
            await door.gateway.idle()
        caller.call.cancel()


async def test_cancel_by_the_id_that_the_metadata_tells_early(
    stub, front_door, leader, text_script, until
):
    leader.script = text_script(TEXT, hold_after=0)
    call = stub.Generate(pb.GenerateRequest(text="hi", n=2), timeout=SOON)
    request_id = dict(await call.initial_metadata())["x-request-id"]
    await until(lambda: leader.running == 2)
    for wrong in ("gen", request_id[:-1], f"{request_id}-2"):
        assert (await stub.Cancel(pb.CancelRequest(request_id=wrong))).cancelled == 0
    told = await stub.Cancel(pb.CancelRequest(request_id=request_id), timeout=SOON)
    assert told.cancelled == 2
    assert await call.code() is grpc.StatusCode.CANCELLED
    assert (await call.details()).startswith("cancelled: ")
    await front_door.gateway.idle()
    with pytest.raises(grpc.aio.AioRpcError, match="request_id"):
        await stub.Cancel(pb.CancelRequest(), timeout=SOON)


async def test_nobody_cancels_the_request_of_another_tenant(
    make_front_door, leader, text_script, until, tmp_path
):
    path = tmp_path / "keys.json"
    keys, entries = zip(*(new_key(name) for name in ("acme", "other")), strict=True)
    rows = ", ".join(entry.model_dump_json() for entry in entries)
    path.write_text(f'{{"tenants": {{"acme": {{}}, "other": {{}}}}, "keys": [{rows}]}}')
    door = await make_front_door(api_keys=path)
    leader.script = text_script(TEXT, hold_after=1)
    acme, other = ((("authorization", f"Bearer {key}"),) for key in keys)
    async with grpc.aio.insecure_channel(door.grpc_address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        call = stub.Generate(pb.GenerateRequest(text="hi"), metadata=acme, timeout=SOON)
        request_id = (await call.read()).request_id
        ask = pb.CancelRequest(request_id=request_id)
        assert (await stub.Cancel(ask, metadata=other, timeout=SOON)).cancelled == 0
        assert leader.running == 1
        assert (await stub.Cancel(ask, metadata=acme, timeout=SOON)).cancelled == 1
        assert await call.code() is grpc.StatusCode.CANCELLED


async def test_tokens_and_back(stub, tokenizer):
    text = "def añ😀 b"
    told = await stub.Tokenize(pb.TokenizeRequest(text=text), timeout=SOON)
    assert list(told.token_ids) == tokenizer.encode(text)
    assert told.max_model_len == 256
    back = await stub.Detokenize(pb.DetokenizeRequest(token_ids=told.token_ids), timeout=SOON)
    assert back.text == text
    with pytest.raises(grpc.aio.AioRpcError, match=r"token_ids\[1\]"):
        await stub.Detokenize(pb.DetokenizeRequest(token_ids=[1, 2**31]), timeout=SOON)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Tokenize(pb.TokenizeRequest(model="x"), timeout=SOON)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_request_has_a_limit_of_its_own(stub, leader, text_script):
    leader.script = text_script(TEXT, hold_after=0)
    call = stub.Generate(pb.GenerateRequest(text="hi", timeout_s=0.05), timeout=SOON)
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "0.05 s" in await call.details()
    for seconds in (0.0, -1.0, float("nan")):
        call = stub.Generate(pb.GenerateRequest(text="hi", timeout_s=seconds), timeout=SOON)
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_calls_deadline_ends_the_request(stub, front_door, leader, text_script, until):
    leader.script = text_script(TEXT, hold_after=1)
    call = stub.Generate(pb.GenerateRequest(text="hi"), timeout=0.5)
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(SOON):
        await front_door.gateway.idle()


async def test_a_refusal_says_when_to_come_back(make_front_door, leader, text_script, until):
    leader.script = text_script(TEXT, hold_after=1)
    door = await make_front_door(max_open_requests=1, max_queued_requests=0)
    async with grpc.aio.insecure_channel(door.grpc_address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        held = stub.Generate(pb.GenerateRequest(text="hi"), timeout=SOON)
        await until(lambda: leader.running == 1)
        call = stub.Generate(pb.GenerateRequest(text="hi"), timeout=SOON)
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(await call.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
        caller = Caller(stub)
        caller.generate("a")
        caller.done()
        await caller.read_all()
        assert caller.code("a") == "overloaded"
        assert caller.told["a"][-1].error.retry_after_ms > 0
        held.cancel()


async def test_compressed_requests_are_understood(stub):
    call = stub.Generate(
        pb.GenerateRequest(text="word " * 20, max_tokens=40),
        compression=grpc.Compression.Gzip,
        timeout=SOON,
    )
    assert "".join([told.text async for told in call]) == TEXT
