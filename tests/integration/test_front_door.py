"""The whole way with real parts: openai client or gRPC stub, gateway, prefill, decode, and back."""

import asyncio
import random
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM, AutoTokenizer

from baton.api.gateway import Gateway
from baton.api.serve import FrontDoor
from baton.core.config import GatewayConfig
from baton.core.metrics import GatewayMetrics
from baton.core.served_model import FrontModel
from baton.core.topology import InstanceInfo, Membership, MembershipBoard, Role
from baton.models.tokenizer import Tokenizer, load_tokenizer
from baton.proto import inference_pb2 as pb
from baton.proto import inference_pb2_grpc as pb_grpc

PATIENCE_S = 60.0
CODE = 'def read_config(path):\n    """Read a file."""\n    with open(path) as file:\n'


@dataclass
class House:
    """A front door and the pair behind it."""

    pair: Any
    gateway: Gateway
    door: FrontDoor
    board: MembershipBoard

    @property
    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.door.http_url}/v1", api_key="-", max_retries=0)


Build = Callable[..., Any]


@pytest.fixture
async def build(start_pair: Any, demo_model_dir: Path) -> AsyncIterator[Build]:
    """Build houses; at the end the gateway closes and checks its books, then the workers do."""
    async with AsyncExitStack() as stack:

        async def make(*extra: InstanceInfo, own: bool = True, **options: Any) -> House:
            pair = await start_pair(demo_model_dir)
            mine = (pair.prefill.info, pair.decode.info) if own else ()
            board = MembershipBoard(Membership(1, (*mine, *extra)))
            gateway = Gateway(
                GatewayConfig(http_port=0, grpc_port=0, **options),
                {FrontModel(name="demo", expects_prefill=True): load_tokenizer(demo_model_dir)},
                board,
                GatewayMetrics(),
            )
            await gateway.start()
            door = await FrontDoor.start(gateway)

            async def close() -> None:
                await door.close()
                gateway.check()

            stack.push_async_callback(close)
            return House(pair, gateway, door, board)

        yield make


@pytest.fixture(scope="module")
def reference(demo_model_dir: Path) -> Callable[[str, int], str]:
    """The text that transformers generates greedily in float32."""
    model = AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir)

    def text(prompt: str, max_tokens: int) -> str:
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**ids, do_sample=False, max_new_tokens=max_tokens, pad_token_id=0)
        new = out[0, ids["input_ids"].shape[1] :]
        return str(tokenizer.decode(new, skip_special_tokens=True))

    return text


async def test_openai_client(build: Build, reference: Callable[[str, int], str]) -> None:
    house = await build()
    client = house.client
    assert [m.id for m in (await client.models.list()).data] == ["demo"]
    prompts = [CODE * n for n in (1, 4, 9)]
    answers = await asyncio.gather(
        *(
            client.completions.create(model="demo", prompt=p, max_tokens=24, temperature=0)
            for p in prompts
        )
    )
    assert [a.choices[0].text for a in answers] == [reference(p, 24) for p in prompts]
    for answer in answers:
        trace = house.gateway.trace(answer.id)
        assert trace is not None
        [handover] = trace.handovers
        assert (handover.outcome, handover.transport) == ("ok", "shm")
        assert trace.prompt_tokens == answer.usage.prompt_tokens
        assert trace.output_tokens == answer.usage.completion_tokens
        assert 0 < trace.ttft_s < trace.e2e_s


async def test_streamed_text_is_the_text(
    build: Build, reference: Callable[[str, int], str]
) -> None:
    expected = reference(CODE, 40)  # first: it holds up the loop, and with it the leases
    house = await build()
    stream = await house.client.completions.create(
        model="demo", prompt=CODE, max_tokens=40, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].text async for chunk in stream]
    assert "".join(pieces) == expected
    assert len(pieces) > 5, "it was not streamed"
    chat = await house.client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "a function that reads a file"}],
        max_tokens=16,
        seed=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in chat]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens <= 16
    assert any(c.choices and c.choices[0].delta.content for c in chunks)


async def test_a_stop_string_ends_the_text_and_frees_the_decode_side(
    build: Build, reference: Callable[[str, int], str], tools: Any
) -> None:
    whole = reference(CODE, 60)  # first: it holds up the loop, and with it the leases
    house = await build()
    stop = whole[20:24]
    answer = await house.client.completions.create(
        model="demo", prompt=CODE, max_tokens=2000, temperature=0, stop=[stop]
    )
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    stats = house.pair.decode.stats
    await tools.eventually(lambda: stats()["open_requests"] == 0, "the decode side stops too")


async def test_usage_tells_what_a_prefix_cache_had(build: Build) -> None:
    house = await build()
    prompt = CODE * 9

    async def ask(**options: Any) -> tuple[int, int]:
        answer = await house.client.completions.create(
            model="demo", prompt=prompt, max_tokens=40, temperature=0, **options
        )
        trace = house.gateway.trace(answer.id)
        cached = answer.usage.prompt_tokens_details.cached_tokens
        assert trace is None or trace.cached_tokens == cached
        return answer.usage.prompt_tokens, cached

    tokens, first = await ask()
    hit = (tokens - 1) // 16 * 16
    assert (first, await ask()) == (0, (tokens, hit))
    assert await ask(stop=["e"]) == (tokens, hit)  # its end comes from the gateway
    async with grpc.aio.insecure_channel(house.door.grpc_address) as channel:
        call = pb_grpc.InferenceStub(channel).Generate(
            pb.GenerateRequest(text=prompt, max_tokens=4, temperature=0)
        )
        messages = [message async for message in call]
    assert messages[-1].usage.cached_prompt_tokens == hit
    await house.gateway.idle()
    told = f'baton_cached_prompt_tokens_total{{model="demo"}} {3 * hit:.1f}'
    assert told in house.gateway.metrics.render().decode()


async def test_grpc_stub(build: Build, reference: Callable[[str, int], str]) -> None:
    house = await build()
    async with grpc.aio.insecure_channel(house.door.grpc_address) as channel:
        call = pb_grpc.InferenceStub(channel).Generate(
            pb.GenerateRequest(text=CODE, max_tokens=24, temperature=0)
        )
        messages = [message async for message in call]
    assert "".join(m.text for m in messages) == reference(CODE, 24)
    assert messages[-1].finish_reason == "length"
    assert messages[-1].usage.completion_tokens == 24


@pytest.mark.parametrize("when", ["while prefill computes", "while decode streams"])
async def test_a_client_that_goes_away_cancels_on_both_sides(
    build: Build, tools: Any, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    house = await build()
    prompt = CODE * 60 if when == "while prefill computes" else CODE
    url = f"{house.door.http_url}/v1/completions"
    body = {"prompt": prompt, "max_tokens": 1500, "stream": True, "model": "demo", "seed": 1}
    decode, prefill = house.pair.decode.stats, house.pair.prefill.stats
    async with httpx.AsyncClient() as client:
        if when == "while decode streams":
            async with client.stream("POST", url, json=body) as response:
                assert await anext(response.aiter_lines())
                assert decode()["open_requests"] == 1
        else:
            runner, go_on = house.pair.prefill.instance.engine._runner, threading.Event()
            execute = runner.execute

            def slow(plan: Any, watch: Any) -> Any:
                go_on.wait(PATIENCE_S)
                return execute(plan, watch)

            monkeypatch.setattr(runner, "execute", slow)
            task = asyncio.create_task(client.post(url, json=body))
            await tools.eventually(lambda: prefill()["sessions"] == 1, "prefill has it")
            task.cancel()
            await asyncio.wait([task])
            await tools.eventually(lambda: prefill()["sessions"] == 0, "prefill is told")
            go_on.set()
    await tools.eventually(lambda: decode()["open_requests"] == 0, "decode forgets it")
    await tools.eventually(lambda: prefill()["sessions"] == 0, "prefill forgets it")
    async with asyncio.timeout(PATIENCE_S):
        await house.gateway.idle()
    await tools.eventually(lambda: decode()["blocks_used"] == 0, "decode's blocks are free")
    await tools.eventually(lambda: prefill()["blocks_used"] == 0, "prefill's blocks are free")
    if when == "while prefill computes":
        assert prefill()["handover_cancelled"] == 1, "prefill went on to the end"


async def test_with_no_decode_instance_left_open_requests_get_a_clear_error(
    build: Build, start_process: Any, tools: Any, demo_model_dir: Path
) -> None:
    victim = start_process(tools.worker_config(Role.DECODE, "decode-7", demo_model_dir))
    house = await build(migration_wait_s=0.2)
    info = house.pair.decode.info
    lost = InstanceInfo(
        **{name: getattr(info, name) for name in info.__slots__}
        | {
            "instance_id": victim.info.instance_id,
            "address": victim.info.address,
            "incarnation": victim.info.incarnation,
        }
    )
    house.board.publish(Membership(2, (house.pair.prefill.info, lost)))
    await tools.eventually(
        lambda: [s.instance_id for s in house.gateway.stats().sessions if s.ready] == ["decode-7"],
        "the gateway has moved on",
    )
    stream = await house.client.completions.create(
        model="demo",
        prompt=CODE,
        max_tokens=3000,
        stream=True,
        seed=1,
        extra_body={"ignore_eos": True},
    )
    iterator = aiter(stream)
    await anext(iterator)
    victim.send(signal.SIGKILL)
    with pytest.raises(openai.APIError) as caught:
        async for _ in iterator:
            pass
    assert "decode-7" in str(caught.value)
    assert caught.value.code == "instance_lost"
    async with httpx.AsyncClient() as client:
        health = await client.get(f"{house.door.http_url}/health")
        assert health.status_code == 503
        assert "no decode instance" in health.text


async def test_more_than_the_bound_is_429_and_nothing_is_lost(build: Build) -> None:
    house = await build(max_open_requests=3, max_queued_requests=0)
    draw = random.Random(2)
    results = await asyncio.gather(
        *(
            house.client.completions.create(
                model="demo", prompt=CODE * draw.randrange(1, 4), max_tokens=16, seed=i
            )
            for i in range(12)
        ),
        return_exceptions=True,
    )
    refused = [r for r in results if isinstance(r, openai.RateLimitError)]
    served = [r for r in results if isinstance(r, openai.types.Completion)]
    assert len(refused) + len(served) == 12
    assert len(served) >= 3
    assert refused
    assert float(refused[0].response.headers["retry-after"]) >= 1


async def test_metrics_and_the_trace_by_http(build: Build) -> None:
    house = await build()
    answer = await house.client.completions.create(model="demo", prompt=CODE * 9, max_tokens=5)
    async with httpx.AsyncClient(base_url=house.door.http_url) as client:
        metrics = (await client.get("/metrics")).text
        trace = (await client.get(f"/v1/requests/{answer.id}")).json()
    layout = house.pair.decode.instance.layout
    moved = layout.blocks_for(answer.usage.prompt_tokens) * layout.block_bytes
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
    }
    assert samples["baton_handover_bytes_total", "shm"] == moved
    assert samples["baton_handovers_total", "ok"] == 1
    assert samples["baton_output_tokens_total", "demo"] == answer.usage.completion_tokens
    assert trace["handovers"][0]["bytes"] == moved


def ids_by_bytes(tokenizer: Tokenizer) -> dict[bytes, int]:
    return {tokenizer.token_bytes(id_): id_ for id_ in range(tokenizer.vocab_size)}


async def test_choices_and_logprobs_by_the_official_client(
    build: Build, demo_model_dir: Path
) -> None:
    """Each choice is what its seed gives alone; each logprob is transformers' log-softmax."""
    house = await build()
    ask = {"model": "demo", "prompt": CODE, "max_tokens": 12, "temperature": 1.3, "seed": 11}
    whole = await house.client.completions.create(**ask, n=3, logprobs=4)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.text for choice in whole.choices}) == 3
    again = await house.client.completions.create(**ask)
    assert again.choices[0].text == whole.choices[0].text
    tokenizer = load_tokenizer(demo_model_dir)
    prompt = tokenizer.encode(CODE)
    assert whole.usage.prompt_tokens == len(prompt)
    model = AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype=torch.float32).eval()
    chunks = [
        chunk.choices[0]
        async for chunk in await house.client.completions.create(
            **ask, n=3, logprobs=4, stream=True
        )
    ]
    for choice in whole.choices:
        streamed = [c for c in chunks if c.index == choice.index]
        assert "".join(c.text for c in streamed) == choice.text
        told = choice.logprobs
        parts = [token for c in streamed if c.logprobs for token in c.logprobs.tokens]
        assert parts == told.tokens
        ids = [ids_by_bytes(tokenizer)[token.encode()] for token in told.tokens]
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 :]
        for id_, found, top, row in zip(
            ids, told.token_logprobs, told.top_logprobs, logits.log_softmax(-1), strict=False
        ):
            assert found == pytest.approx(row[id_].item(), abs=2e-4)
            likeliest = sorted(top.values(), reverse=True)[:4]
            assert likeliest == pytest.approx(row.topk(4).values.tolist(), abs=2e-4)


async def test_what_the_official_client_forbids_does_not_come(build: Build) -> None:
    house = await build()
    ask = {"model": "demo", "prompt": CODE, "max_tokens": 30, "temperature": 0}
    [choice] = (await house.client.completions.create(**ask, logprobs=0)).choices
    plain = choice.text
    word = plain.split()[0]
    without = await house.client.completions.create(**ask, extra_body={"bad_words": [word]})
    assert f" {word} " not in without.choices[0].text
    assert without.choices[0].text != plain
    tokenizer = load_tokenizer(house.pair.decode.instance.config.model_dir)
    first = ids_by_bytes(tokenizer)[choice.logprobs.tokens[0].encode()]
    biased = await house.client.completions.create(**ask, logit_bias={str(first): -100})
    assert biased.choices[0].text != plain
    stopped = await house.client.completions.create(
        **ask, extra_body={"stop_token_ids": [first], "min_tokens": 3}
    )
    assert stopped.usage.completion_tokens >= 4
