"""Two models behind one front door: nothing of one is ever the other's."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from baton.api.gateway import Gateway
from baton.api.key_file import new_key
from baton.api.serve import FrontDoor
from baton.core.config import GatewayConfig
from baton.core.errors import InvalidConfig
from baton.core.metrics import GatewayMetrics
from baton.core.served_model import FrontModel, ModelLimits
from baton.core.topology import Membership, MembershipBoard, Role
from baton.proto import inference_pb2 as pb
from baton.proto import inference_pb2_grpc as pb_grpc

SOON = 60
ONE, TWO = "def one():", "class Two:"


@dataclass
class House:
    """A gateway with a leader for each model."""

    door: FrontDoor
    http: httpx.AsyncClient
    board: MembershipBoard
    one: Any
    two: Any

    @property
    def gateway(self) -> Gateway:
        return self.door.gateway

    async def ask(self, **fields: object) -> httpx.Response:
        body = {"prompt": "hi", "max_tokens": 50, **fields}
        return await self.http.post("/v1/completions", json=body)

    def key(self, key: str) -> None:
        self.http.headers["authorization"] = f"Bearer {key}"


Build = Callable[..., Any]


@pytest.fixture
async def build(make_leader: Any, tokenizer: Any, tokenizer_with: Any) -> AsyncIterator[Build]:
    """Open front doors of the models one, alias code, and two; each is checked at the end."""
    other = tokenizer_with("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    async with AsyncExitStack() as stack:

        async def make(limits: ModelLimits = ModelLimits(), **settings: object) -> House:  # noqa: B008
            one, two = await make_leader("one-0", ONE), await make_leader("two-0", TWO)
            board = MembershipBoard()
            models = {
                FrontModel(name="one", aliases=("code", "team/code")): tokenizer,
                FrontModel(name="two", limits=limits): other,
            }
            config = GatewayConfig.checked(**({"http_port": 0, "grpc_port": 0} | settings))
            gateway = Gateway(config, models, board, GatewayMetrics())
            board.publish(Membership(1, (one.info(model="one"), two.info(model="two"))))
            await gateway.start()
            door = await FrontDoor.start(gateway)

            async def close() -> None:
                await door.close(grace_s=0.0)
                gateway.check()

            stack.push_async_callback(close)
            http = httpx.AsyncClient(base_url=door.http_url, timeout=SOON)
            return House(door, await stack.enter_async_context(http), board, one, two)

        yield make


@pytest.fixture
def keys(tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    """Write a file with one key, of a tenant with these limits."""

    def make(**limits: object) -> tuple[Path, str]:
        key, entry = new_key("acme", admin=False)
        path = tmp_path / "keys.json"
        path.write_text(json.dumps({"tenants": {"acme": limits}, "keys": [entry.model_dump()]}))
        return path, key

    return make


async def test_each_request_goes_to_its_own_model_by_name_and_alias(build: Build) -> None:
    house = await build()
    asked = ("one", "code", "team/code", "two")
    answers = await asyncio.gather(*(house.ask(model=name) for name in asked))
    told = [(a.json()["model"], a.json()["choices"][0]["text"]) for a in answers]
    assert told == [("one", ONE)] * 3 + [("two", TWO)]
    assert (len(house.one.submits), len(house.two.submits)) == (3, 1)
    await house.gateway.idle()
    metrics = (await house.http.get("/metrics")).text
    assert 'baton_requests_total{model="one",outcome="length"} 3.0' in metrics
    assert 'baton_requests_total{model="two",outcome="length"} 1.0' in metrics
    row = (await house.http.get(f"/v1/requests/{answers[1].json()['id']}")).json()
    assert (row["model"], row["decode_instance"]) == ("one", "one-0")
    for answer in answers:
        path = f"/v1/requests/{answer.json()['id']}/explain"
        assert (await house.http.get(path)).status_code == 200


async def test_each_model_has_its_own_chat_template(build: Build) -> None:
    house = await build()
    body = {"messages": [{"role": "user", "content": "hi"}]}
    path = "/tokenize"
    one, two = [
        (await house.http.post(path, json={**body, "model": name})).json()["tokens"]
        for name in ("one", "two")
    ]
    shown = (await house.http.post("/detokenize", json={"tokens": two, "model": "two"})).json()
    assert (shown["prompt"], one == two) == ("[hi]", False)


async def test_an_unknown_model_is_refused_with_the_list(build: Build) -> None:
    house = await build()
    answer = await house.ask(model="three")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "one, code, team/code, two" in error["message"]
    answer = await house.http.get("/v1/models/three")
    assert (answer.status_code, "one, code" in answer.text) == (404, True)
    unnamed = await house.ask()
    assert (unnamed.status_code, unnamed.json()["error"]["param"]) == (400, "model")
    assert "one of: one, code, team/code, two" in unnamed.text
    wrong = await house.ask(model=7)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "model")


async def test_models_are_listed_by_all_their_names(build: Build) -> None:
    house = await build()
    rows = (await house.http.get("/v1/models")).json()["data"]
    assert {row["id"]: row["root"] for row in rows} == {
        "one": "one",
        "code": "one",
        "team/code": "one",
        "two": "two",
    }
    assert (await house.http.get("/v1/models/team/code")).json()["root"] == "one"
    described = (await house.http.get("/openapi.json?model=code")).json()
    body = described["components"]["schemas"]["Completion"]["properties"]
    assert body["model"]["enum"][:3] == ["one", "code", "team/code"]


async def test_grpc_knows_the_same_names(build: Build) -> None:
    house = await build()
    async with grpc.aio.insecure_channel(house.door.grpc_address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        listed = (await stub.ListModels(pb.ListModelsRequest(), timeout=SOON)).models
        assert [(m.id, m.root) for m in listed][1:] == [
            ("code", "one"),
            ("team/code", "one"),
            ("two", "two"),
        ]
        call = stub.Generate(pb.GenerateRequest(text="hi", model="code", max_tokens=50))
        assert "".join([message.text async for message in call]) == ONE
        for name, status in (
            ("three", grpc.StatusCode.NOT_FOUND),
            ("", grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match="one, code") as refused:
                await stub.Tokenize(pb.TokenizeRequest(text="hi", model=name), timeout=SOON)
            assert refused.value.code() is status


@pytest.mark.parametrize("allowed", ["one", "code"])
async def test_a_tenant_has_the_models_that_it_is_told_by_all_names(
    build: Build, keys: Any, allowed: str
) -> None:
    path, key = keys(models=[allowed])
    house = await build(api_keys=path)
    house.key(key)
    listed = (await house.http.get("/v1/models")).json()["data"]
    assert [row["id"] for row in listed] == ["one", "code", "team/code"]
    for name in ("one", "code"):
        assert (await house.ask(model=name)).json()["choices"][0]["text"] == ONE
    assert (await house.ask()).json()["model"] == "one", "the only one that there is"
    answer = await house.ask(model="two")
    assert (answer.status_code, "two" in answer.text.partition("allowed")[2]) == (404, False)


async def test_a_model_without_instances_does_not_hurt_the_other(build: Build, until: Any) -> None:
    house = await build()
    house.board.publish(Membership(2, (house.one.info(model="one"),)))
    await until(lambda: house.gateway.health() == ["two: no decode instance is ready"])
    gone = await house.ask(model="two")
    assert (gone.status_code, "model 'two'" in gone.text) == (503, True)
    assert (await house.ask(model="one")).json()["choices"][0]["text"] == ONE
    health = await house.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (200, "degraded")
    status = (await house.http.get("/v1/status")).json()
    problems = {model["name"]: model["problems"] for model in status["models"]}
    assert problems == {"one": [], "two": ["no decode instance is ready"]}
    assert [(pool["model"], pool["role"]) for pool in status["pools"]] == [("one", "decode")]
    house.board.publish(Membership(3))
    await until(lambda: not house.gateway.serves)
    assert (await house.http.get("/health")).status_code == 503


async def test_prefill_instances_of_another_model_are_not_asked(build: Build) -> None:
    house = await build()
    infos = (house.one.info(model="one"), house.two.info(model="two"))
    prefill = house.two.info(Role.PREFILL, "two")
    house.board.publish(Membership(2, (*infos, prefill)))
    assert (await house.ask(model="one")).status_code == 200
    assert (await house.ask(model="two")).status_code == 200
    assert not house.one.submits[0].prefill
    assert [member.instance_id for member in house.two.submits[0].prefill] == ["two-0"]


async def test_one_model_full_leaves_room_for_the_other(
    build: Build, text_script: Any, until: Any
) -> None:
    house = await build(ModelLimits(max_open_requests=1), max_queued_requests=0)
    house.two.script = text_script(TWO, hold_after=1)
    first = asyncio.create_task(house.ask(model="two"))
    await until(lambda: house.two.running == 1)
    assert (await house.ask(model="two")).status_code == 429
    assert (await house.ask(model="one")).status_code == 200
    stats = house.gateway.stats()
    assert {name: lane.open_requests for name, lane in stats.models.items()}["two"] == 1
    house.two.resume()
    assert (await first).status_code == 200


async def test_a_models_own_limits_hold(build: Build) -> None:
    house = await build(ModelLimits(max_prompt_tokens=4, max_output_tokens=3))
    long = [1] * 5
    refused = await house.ask(model="two", prompt=long)
    assert (refused.status_code, "at most 4 tokens for two" in refused.text) == (400, True)
    refused = await house.ask(model="two")
    assert (refused.status_code, "1 to 3 for two" in refused.text) == (400, True)
    assert (await house.ask(model="two", max_tokens=None)).json()["usage"]["completion_tokens"] == 3
    assert (await house.ask(model="one", prompt=long)).status_code == 200


async def test_a_tenants_limits_are_of_all_models_together(
    build: Build, keys: Any, text_script: Any, until: Any
) -> None:
    path, key = keys(max_concurrent=1)
    house = await build(api_keys=path)
    house.key(key)
    house.one.script = text_script(ONE, hold_after=1)
    first = asyncio.create_task(house.ask(model="one"))
    await until(lambda: house.one.running == 1)
    second = asyncio.create_task(house.ask(model="two"))
    await until(lambda: house.gateway.stats().models["two"].queued == 1)
    assert not house.two.submits, "it began before the other had ended"
    house.one.resume()
    assert (await first).status_code == (await second).status_code == 200


def test_a_name_stands_for_one_model(tokenizer: Any) -> None:
    models = {
        FrontModel(name="one"): tokenizer,
        FrontModel(name="two", aliases=("one",)): tokenizer,
    }
    with pytest.raises(InvalidConfig, match="'one'"):
        Gateway(GatewayConfig(), models, MembershipBoard(), GatewayMetrics())
