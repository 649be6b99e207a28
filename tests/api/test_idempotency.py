"""One key, one run: over real sockets, and by the clients that resume."""

import asyncio

import grpc
import pytest

from baton.api import idempotency
from baton.client import AsyncClient, Client, Options, Retry, Unavailable, async_client, sync_client
from baton.proto import inference_pb2 as pb
from baton.proto import inference_pb2_grpc as pb_grpc

SOON = 60
TEXT = "one two three"
RESUMING = Retry(attempts=20, backoff_s=0.0, budget=1000, resumes=True)


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Let a slow machine be slow."""
    monkeypatch.setattr(idempotency, "LINGER_S", 600.0)
    monkeypatch.setattr(idempotency, "KEEP_S", 600.0)
    for client in (sync_client, async_client):
        monkeypatch.setattr(client, "_END_S", SOON)


@pytest.fixture
async def stub(front_door):
    async with grpc.aio.insecure_channel(front_door.grpc_address) as channel:
        yield pb_grpc.InferenceStub(channel)


def ask(key: str, **fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(**({"text": "hi", "max_tokens": 50, "idempotency_key": key} | fields))


async def all_of(call) -> list[pb.GenerateResponse]:
    return [response async for response in call]


async def test_a_repeated_key_gets_the_same_answer_during_and_after_the_run(
    stub, leader, text_script, until
):
    leader.script = text_script(TEXT, hold_after=1)
    first = stub.Generate(ask("k", n=2), timeout=SOON)
    await until(lambda: leader.running == 2)
    second = stub.Generate(ask("k", n=2), timeout=SOON)
    assert dict(await first.initial_metadata()) == dict(await second.initial_metadata())
    leader.resume()
    told = await all_of(first)
    assert await all_of(second) == told
    assert await all_of(stub.Generate(ask("k", n=2), timeout=SOON)) == told
    assert len(leader.submits) == 2
    assert await all_of(stub.Generate(ask("another", n=2), timeout=SOON)) != told


async def test_a_key_of_another_request_or_too_long_is_refused(stub, leader):
    await all_of(stub.Generate(ask("k"), timeout=SOON))
    for wrong in (ask("k", seed=7), ask("x" * 129)):
        with pytest.raises(grpc.aio.AioRpcError, match="idempotency_key") as refused:
            await all_of(stub.Generate(wrong, timeout=SOON))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_what_failed_runs_again(stub, leader, text_script):
    leader.script = text_script(TEXT, error=Unavailable("not now"))
    with pytest.raises(grpc.aio.AioRpcError, match="not now"):
        await all_of(stub.Generate(ask("k"), timeout=SOON))
    leader.script = text_script(TEXT)
    told = await all_of(stub.Generate(ask("k"), timeout=SOON))
    assert "".join(response.text for response in told) == TEXT


async def test_a_run_waits_for_its_client_and_then_ends(
    stub, front_door, leader, text_script, until, monkeypatch
):
    leader.script = text_script(TEXT, hold_after=1)
    first = stub.Generate(ask("k"), timeout=SOON)
    await first.read()
    first.cancel()
    again = stub.Generate(ask("k"), timeout=SOON)
    await again.read()
    assert len(leader.submits) == 1
    monkeypatch.setattr(idempotency, "LINGER_S", 0.0)
    again.cancel()
    async with asyncio.timeout(SOON):
        await front_door.gateway.idle()


async def test_cancel_ends_a_run_at_once(stub, front_door, leader, text_script, until):
    leader.script = text_script(TEXT, hold_after=1)
    call = stub.Generate(ask("k"), timeout=SOON)
    request_id = (await call.read()).request_id
    call.cancel()
    told = await stub.Cancel(pb.CancelRequest(request_id=request_id), timeout=SOON)
    assert told.cancelled == 1
    async with asyncio.timeout(SOON):
        await front_door.gateway.idle()


async def test_whole_answers_are_kept_up_to_a_bound_and_for_a_while(stub, leader, monkeypatch):
    monkeypatch.setattr(idempotency, "MAX_KEPT", 2)
    for key in "abc":
        await all_of(stub.Generate(ask(key), timeout=SOON))
    await all_of(stub.Generate(ask("b"), timeout=SOON))
    assert len(leader.submits) == 3
    await all_of(stub.Generate(ask("a"), timeout=SOON))
    assert len(leader.submits) == 4
    monkeypatch.setattr(idempotency, "KEEP_S", 0.0)
    for _ in range(2):
        await all_of(stub.Generate(ask("d"), timeout=SOON))
        await stub.ListModels(pb.ListModelsRequest(), timeout=SOON)
    assert len(leader.submits) == 6


class Breaking:
    """Ends each call after one message, some times, as a bad line would."""

    def __init__(self, times: int) -> None:
        self.times = times

    async def intercept_service(self, go_on, details):
        handler = await go_on(details)
        if not details.method.endswith("/Generate"):
            return handler

        async def generate(request, context):
            write = context.write

            async def once(response):
                await write(response)
                if self.times:
                    self.times -= 1
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the line broke")

            class Line:
                """The context, but for `write`."""

                def __getattr__(self, name):
                    return once if name == "write" else getattr(context, name)

            return await handler.unary_stream(request, Line())

        return grpc.unary_stream_rpc_method_handler(
            generate, handler.request_deserializer, handler.response_serializer
        )


@pytest.fixture
def bad_line(monkeypatch):
    """Let the front door break calls."""

    def make(times: int) -> None:
        server = grpc.aio.server
        line = type("Line", (Breaking, grpc.aio.ServerInterceptor), {})(times)

        def with_line(interceptors=(), **options):
            return server(interceptors=[*interceptors, line], **options)

        monkeypatch.setattr(grpc.aio, "server", with_line)

    return make


@pytest.mark.parametrize("blocking", [True, False])
async def test_a_client_that_resumes_goes_on_where_the_line_broke(
    bad_line, make_front_door, leader, text_script, blocking
):
    leader.script = text_script(TEXT)
    bad_line(3)
    door = await make_front_door()
    options = Options(max_tokens=50, n=2)
    if blocking:

        def use() -> tuple[list[str], int]:
            with Client(door.grpc_address, timeout_s=SOON, retry=RESUMING) as client:
                whole = client.complete("hi", options)
                return [choice.text for choice in whole.choices], whole.timing.attempts

        told = await asyncio.to_thread(use)
    else:
        async with AsyncClient(door.grpc_address, timeout_s=SOON, retry=RESUMING) as client:
            whole = await client.complete("hi", options)
            told = [choice.text for choice in whole.choices], whole.timing.attempts
    assert told == ([TEXT, TEXT], 4)
    assert len(leader.submits) == 2


async def test_a_client_never_joins_two_answers(bad_line, make_front_door, text_script, leader):
    bad_line(1)
    door = await make_front_door()
    async with AsyncClient(door.grpc_address, timeout_s=SOON) as client:
        with pytest.raises(Unavailable, match="the line broke"):
            await client.complete("hi")


async def test_leaving_a_stream_ends_its_run(front_door, leader, text_script, until):
    leader.script = text_script(TEXT, hold_after=1)
    async with AsyncClient(front_door.grpc_address, timeout_s=SOON, retry=RESUMING) as client:
        async with client.stream("hi") as stream:
            await anext(stream)
        async with asyncio.timeout(SOON):
            await front_door.gateway.idle()

    def use() -> None:
        with Client(front_door.grpc_address, timeout_s=SOON, retry=RESUMING) as blocking:
            next(blocking.generate("hi"))

    await asyncio.to_thread(use)
    async with asyncio.timeout(SOON):
        await front_door.gateway.idle()
