import asyncio
import contextlib
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.api import grpc_requests, grpc_service
from baton.client import Chunk, Client, Options
from baton.core.errors import InvalidRequest, Overloaded, UnknownModel
from baton.core.request import TokenLogprobs
from baton.core.spans import SPAN_NAMES
from baton.proto import inference_pb2 as pb
from baton.proto import inference_pb2_grpc as pb_grpc

TEXT = "def add(a, b):"
SOON = 10  # a deadline for events that are expected at once


@pytest.fixture
async def channel(front_door):
    async with grpc.aio.insecure_channel(front_door.grpc_address) as channel:
        yield channel


@pytest.fixture
def stub(channel):
    return pb_grpc.InferenceStub(channel)


async def test_generate_streams_text_tokens_and_usage(stub, leader, tokenizer):
    request = pb.GenerateRequest(
        text="hi", max_tokens=40, temperature=0.5, top_k=3, top_p=0.5, seed=2**63 - 1
    )
    responses = [response async for response in stub.Generate(request, timeout=SOON)]
    assert "".join(response.text for response in responses) == TEXT
    tokens = [token for response in responses for token in response.token_ids]
    assert tokens == tokenizer.encode(TEXT)
    assert [r.finish_reason for r in responses[:-1]] == [""] * (len(responses) - 1)
    assert responses[-1].finish_reason == "length"
    assert responses[-1].usage.completion_tokens == len(tokens)
    assert responses[-1].usage.prompt_tokens == len(tokenizer.encode("hi"))
    sent = leader.submits[0].request
    assert sent.request_id == responses[0].request_id
    assert (sent.max_tokens, sent.temperature, sent.top_k, sent.top_p, sent.seed) == (
        40,
        0.5,
        3,
        0.5,
        2**63 - 1,
    )


async def test_where_the_time_went_is_told_on_request_and_adds_up(stub, leader):
    asked = stub.Generate(pb.GenerateRequest(text="hi", n=2, timing=True), timeout=SOON)
    told = [response async for response in asked]
    assert [bool(r.finish_reason) for r in told] == [r.HasField("timing") for r in told]
    for timing in (r.timing for r in told if r.finish_reason):
        assert {span.name for span in timing.spans} <= set(SPAN_NAMES)
        assert "tokenize" in {span.name for span in timing.spans}
        assert sum(span.seconds for span in timing.spans) == pytest.approx(timing.ttft_s)
    plain = [r async for r in stub.Generate(pb.GenerateRequest(text="hi"), timeout=SOON)]
    assert not any(r.HasField("timing") for r in plain)


async def test_token_ids_and_defaults(stub, leader, tokenizer):
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[3, 4, 5]))
    assert [response async for response in stub.Generate(request, timeout=SOON)]
    sent = leader.submits[0].request
    assert list(sent.prompt) == [3, 4, 5]
    assert (sent.max_tokens, sent.temperature, sent.top_k, sent.top_p) == (16, 1.0, 0, 1.0)
    assert tuple(sent.stop_token_ids) == tokenizer.eos_token_ids


async def test_zero_is_a_value_and_not_a_default(stub, leader):
    request = pb.GenerateRequest(text="hi", temperature=0.0, seed=0)
    assert [response async for response in stub.Generate(request, timeout=SOON)]
    assert leader.submits[0].request.temperature == 0.0
    assert leader.submits[0].request.seed == 0


@pytest.mark.parametrize(
    ("fields", "status", "word"),
    [
        ({}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        ({"text": ""}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        ({"token_ids": {"ids": [2**31]}}, grpc.StatusCode.INVALID_ARGUMENT, "prompt[0]"),
        ({"text": "a", "max_tokens": 0}, grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        ({"text": "a", "seed": 2**64 - 1}, grpc.StatusCode.INVALID_ARGUMENT, "seed"),
        (
            {"text": "a", "temperature": float("nan")},
            grpc.StatusCode.INVALID_ARGUMENT,
            "temperature",
        ),
        ({"text": "a", "top_p": 0.0}, grpc.StatusCode.INVALID_ARGUMENT, "top_p"),
        ({"text": "a", "stop": ["x"] * 5}, grpc.StatusCode.INVALID_ARGUMENT, "stop"),
        ({"text": "a", "model": "other"}, grpc.StatusCode.NOT_FOUND, "model"),
    ],
)
async def test_bad_input_is_refused_with_its_status(stub, fields, status, word):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async for _ in stub.Generate(pb.GenerateRequest(**fields), timeout=SOON):
            pass
    assert refused.value.code() is status
    assert word in refused.value.details()


async def test_a_cancelled_call_cancels_its_request(stub, leader, front_door, text_script):
    leader.script = text_script("one two three", hold_after=1)
    call = stub.Generate(pb.GenerateRequest(text="hi"))
    assert (await call.read()).text
    call.cancel()
    async with asyncio.timeout(SOON):
        await leader.cancelled.get()
        await front_door.gateway.idle()
    assert leader.running == 0


async def test_a_call_whose_deadline_passes_cancels_its_request(
    stub, leader, front_door, text_script
):
    leader.script = text_script("one two three", hold_after=1)
    timeout_s = 0.3
    while not leader.submits:  # on a busy machine it may pass before the request gets that far
        with pytest.raises(grpc.aio.AioRpcError) as late:
            async for _ in stub.Generate(pb.GenerateRequest(text="hi"), timeout=timeout_s):
                pass
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        timeout_s *= 2
    async with asyncio.timeout(SOON):
        await leader.cancelled.get()
        await front_door.gateway.idle()


async def test_the_deadline_of_a_call_is_that_of_its_request(stub, leader, text_script, until):
    leader.script = text_script("one two three", hold_after=1)
    call = stub.Generate(pb.GenerateRequest(text="hi"), timeout=SOON)
    await until(lambda: len(leader.submits) == 1)
    assert 0 < leader.submits[0].timeout_s < 1.1 * SOON  # gRPC rounds it up on its way
    call.cancel()


async def test_a_client_that_never_reads_does_not_hold_its_place_for_ever(
    make_front_door, leader, text_script, monkeypatch, until
):
    monkeypatch.setattr(grpc_service, "SLOW_READER_S", 0.1)
    leader.script = text_script("word " * 200)
    door = await make_front_door(request_timeout_s=2, decode_fill=16)
    async with grpc.aio.insecure_channel(door.grpc_address) as channel:
        # The choices together are far more than what fits between server and client.
        ask = pb.GenerateRequest(text="hi", n=128, max_tokens=200, logprobs=20, ignore_eos=True)
        call = pb_grpc.InferenceStub(channel).Generate(ask)
        await until(lambda: len(leader.submits) == 128 and leader.running == 0)
        assert door.gateway.stats().open_requests > 0, "the client's not reading holds them open"
        async with asyncio.timeout(SOON):
            await door.gateway.idle()
        call.cancel()


async def test_a_long_prompt_is_read_in_a_thread(stub, monkeypatch):
    checked_in = []
    check = grpc_requests.completion_call

    def note(*arguments, **options):
        checked_in.append(threading.current_thread())
        return check(*arguments, **options)

    monkeypatch.setattr(grpc_requests, "completion_call", note)
    for text in ("hi", "hi " * 20_000):
        with contextlib.suppress(grpc.aio.AioRpcError):  # the long one is too long
            async for _ in stub.Generate(pb.GenerateRequest(text=text), timeout=SOON):
                pass
    short, long = checked_in
    assert short is threading.main_thread() is not long


async def test_models_health_and_reflection(stub, channel):
    models = await stub.ListModels(pb.ListModelsRequest(), timeout=SOON)
    assert [(m.id, m.max_model_len) for m in models.models] == [("demo", 256)]
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "baton.v1.Inference"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=SOON)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
    await reflection.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {s.name for s in (await reflection.read()).list_services_response.service}
    assert {"baton.v1.Inference", "grpc.health.v1.Health"} <= names
    reflection.cancel()


async def test_the_python_client(front_door, leader, tokenizer):
    def use() -> tuple[str, list[str], dict[str, int]]:
        with Client(front_door.grpc_address, timeout_s=SOON) as client:
            text = "".join(client.generate("hi", Options(max_tokens=50)))
            reasons = [chunk.finish_reason for chunk in client.stream([1, 2, 3])]
            return text, reasons, client.models()

    text, reasons, models = await asyncio.to_thread(use)
    assert text == TEXT
    assert [reason for reason in reasons if reason] == ["length"]
    assert models == {"demo": 256}
    assert list(leader.submits[1].request.prompt) == [1, 2, 3]


async def test_the_python_client_raises_what_the_server_raised(
    make_front_door, leader, text_script, until
):
    leader.script = text_script("one two three", hold_after=1)
    door = await make_front_door(max_open_requests=1, max_queued_requests=0)

    def use(prompt: str, options: Options) -> str:
        with Client(door.grpc_address, timeout_s=SOON) as client:
            return "".join(client.generate(prompt, options))

    with pytest.raises(InvalidRequest, match="top_p") as refused:
        await asyncio.to_thread(use, "hi", Options(top_p=5.0))
    assert refused.value.field == "top_p"
    with pytest.raises(UnknownModel):
        await asyncio.to_thread(use, "hi", Options(model="other"))
    first = asyncio.create_task(asyncio.to_thread(use, "hi", Options()))
    await until(lambda: leader.running == 1)
    with pytest.raises(Overloaded):
        await asyncio.to_thread(use, "hi", Options())
    leader.resume()
    assert await first == "one two three"


async def test_closing_the_iterator_of_the_python_client_cancels(front_door, leader, text_script):
    leader.script = text_script("one two three", hold_after=1)

    def use() -> str:
        with Client(front_door.grpc_address) as client:
            texts = client.generate("hi")
            first = next(texts)
            texts.close()
            return first

    assert await asyncio.to_thread(use) == "one"
    async with asyncio.timeout(SOON):
        await leader.cancelled.get()
        await front_door.gateway.idle()


async def test_every_sampling_option_reaches_the_decode_instance(stub, leader, tokenizer):
    request = pb.GenerateRequest(
        text="hi",
        min_p=0.1,
        typical_p=0.9,
        repetition_penalty=1.2,
        presence_penalty=-0.5,
        frequency_penalty=0.5,
        logit_bias={7: -100.0},
        bad_words=["zebra"],
        min_tokens=2,
        stop_token_ids=[9],
        seed=5,
        n=2,
        logprobs=3,
    )
    [_ async for _ in stub.Generate(request, timeout=SOON)]
    first, second = (submit.request for submit in leader.submits)
    assert (first.seed, first.min_p, first.typical_p) == (5, 0.1, 0.9)
    assert second.seed != 5
    penalties = (first.repetition_penalty, first.presence_penalty, first.frequency_penalty)
    assert penalties == (1.2, -0.5, 0.5)
    assert [(b.token, b.bias) for b in first.logit_bias] == [(7, -100.0)]
    assert list(tokenizer.encode("zebra")) in [list(w.tokens) for w in first.bad_words]
    assert (first.min_tokens, first.logprobs) == (2, 3)
    assert list(first.stop_token_ids) == [*tokenizer.eos_token_ids, 9]


async def test_choices_are_told_apart_and_each_has_logprobs_and_an_end(stub, tokenizer):
    request = pb.GenerateRequest(text="hi", max_tokens=50, n=3, logprobs=1)
    responses = [r async for r in stub.Generate(request, timeout=SOON)]
    assert {r.index for r in responses} == {0, 1, 2}
    for index in range(3):
        mine = [r for r in responses if r.index == index]
        assert "".join(r.text for r in mine) == TEXT
        assert [bool(r.finish_reason) for r in mine] == [False] * (len(mine) - 1) + [True]
        tokens = [token for r in mine for token in r.token_ids]
        told = [t for r in mine for t in r.logprobs]
        assert len(told) == len(tokens) == mine[-1].usage.completion_tokens
        assert all(t.logprob == -0.5 and t.top[0].token_id == 1000 for t in told)
        assert mine[-1].usage.prompt_tokens == len(tokenizer.encode("hi"))


async def test_choices_and_logprobs_of_the_python_client(front_door, leader):
    def use() -> tuple[list[Chunk], str]:
        options = Options(max_tokens=50, n=2, logprobs=2, logit_bias={3: 1.5}, bad_words=("no",))
        with Client(front_door.grpc_address, timeout_s=SOON) as client:
            return list(client.stream("hi", options)), "".join(client.generate("hi", options))

    chunks, text = await asyncio.to_thread(use)
    assert text == TEXT
    assert {chunk.index for chunk in chunks} == {0, 1}
    told = [t for chunk in chunks for t in chunk.logprobs]
    assert told[0] == TokenLogprobs(-0.5, ((1000, 0.0), (1001, -0.25)))
    assert [b.token for b in leader.submits[0].request.logit_bias] == [3]
