"""Tenants and their keys, over real sockets, by both APIs."""

import asyncio
import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import openai
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.api import serve
from baton.api.key_file import new_key
from baton.client import Client, Options
from baton.core.errors import BatonError
from baton.proto import inference_pb2 as pb
from baton.proto import inference_pb2_grpc as pb_grpc

COMPLETION = {"model": "demo", "prompt": "hi", "max_tokens": 5}
SOON = 30


@dataclass
class Keys:
    """A file of keys, and the keys."""

    path: Path
    tenants: dict[str, dict[str, object]] = field(default_factory=dict)
    entries: list[dict[str, object]] = field(default_factory=list)

    def add(self, tenant: str, *, admin: bool = False, **limits: object) -> str:
        key, entry = new_key(tenant, admin=admin)
        self.tenants[tenant] = limits
        self.entries.append(entry.model_dump())
        self.write()
        return key

    def write(self) -> None:
        self.path.write_text(json.dumps({"tenants": self.tenants, "keys": self.entries}))


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.json")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def with_key(door, key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=door.http_url, headers=bearer(key), timeout=SOON)


# HTTP


async def test_the_openai_client_with_its_key_and_with_a_wrong_one(keys, make_front_door, leader):
    key = keys.add("acme")
    door = await make_front_door(api_keys=keys.path)
    async with openai.AsyncOpenAI(
        base_url=f"{door.http_url}/v1", api_key=key, max_retries=0, timeout=SOON
    ) as client:
        answer = await client.completions.create(model="demo", prompt="hi", max_tokens=5)
        assert answer.choices[0].text
        messages = [{"role": "user", "content": "hi"}]
        await client.chat.completions.create(model="demo", messages=messages, max_tokens=5)
        wrong = client.with_options(api_key=new_key("acme")[0])
        with pytest.raises(openai.AuthenticationError) as refused:
            await wrong.completions.create(model="demo", prompt="hi")
    assert refused.value.status_code == 401
    assert refused.value.code == "invalid_api_key"
    assert refused.value.type == "invalid_request_error"
    tenants = [submit.request.tenant for submit in leader.submits]
    assert tenants == ["acme", "acme"], "the salt of its cached prefixes"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/demo"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/openapi.json"),
        ("GET", "/version"),
        ("GET", "/v1/requests/x"),
        ("GET", "/v1/requests/x/explain"),
        ("GET", "/metrics"),
        ("GET", "/v1/status"),
        ("GET", "/no/such/path"),
        ("GET", "//health"),
        ("GET", "/health/"),
        ("OPTIONS", "/v1/models"),
    ],
)
async def test_without_a_key_nothing_but_health_is_open(keys, make_front_door, method, path):
    keys.add("acme")
    door = await make_front_door(api_keys=keys.path)
    async with httpx.AsyncClient(timeout=SOON) as http:
        answer = await http.request(
            method, door.http_url + path, json=COMPLETION, headers={"X-Request-Id": "mine"}
        )
        assert answer.status_code == 401
        assert answer.headers["x-request-id"] == "mine"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert (await http.get(door.http_url + "/health")).status_code == 200


async def test_two_authorization_headers_are_none(keys, make_front_door):
    key = keys.add("acme")
    door = await make_front_door(api_keys=keys.path)
    async with with_key(door, key) as http:
        headers = [("authorization", f"Bearer {key}"), ("authorization", "Bearer x")]
        assert (await http.get("/v1/models")).status_code == 200
        request = http.build_request("GET", "/v1/models")
        request.headers = httpx.Headers([*headers, ("host", "x")])
        assert (await http.send(request)).status_code == 401


@pytest.mark.parametrize("about", ["", "/explain"])
async def test_tenants_cannot_see_each_others_requests(keys, make_front_door, about):
    acme, other, admin = keys.add("acme"), keys.add("other"), keys.add("ops", admin=True)
    door = await make_front_door(api_keys=keys.path)
    async with with_key(door, acme) as http:
        request_id = (await http.post("/v1/completions", json=COMPLETION)).json()["id"]
        await door.gateway.idle()
        seen = await http.get(f"/v1/requests/{request_id}{about}")
        assert seen.json()["tenant"] == "acme"
    async with with_key(door, other) as http:
        hidden = await http.get(f"/v1/requests/{request_id}{about}")
        nothing = await http.get(f"/v1/requests/{request_id[:-1]}x{about}")
    assert hidden.status_code == nothing.status_code == 404
    assert hidden.text == nothing.text.replace(f"{request_id[:-1]}x", request_id)
    async with with_key(door, admin) as http:
        assert (await http.get(f"/v1/requests/{request_id}{about}")).status_code == 200


async def test_metrics_are_for_admins_unless_they_are_open(keys, make_front_door):
    acme, admin = keys.add("acme"), keys.add("ops", admin=True)
    door = await make_front_door(api_keys=keys.path)
    async with with_key(door, acme) as http:
        await http.post("/v1/completions", json=COMPLETION)
        await door.gateway.idle()
        refused = await http.get("/metrics")
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "forbidden"
    async with with_key(door, admin) as http:
        told = (await http.get("/metrics")).text
    assert 'baton_tenant_requests_total{tenant="acme"} 1.0' in told
    assert 'baton_tenant_tokens_total{kind="output",tenant="acme"} 5.0' in told
    assert acme not in told
    open_door = await make_front_door(api_keys=keys.path, open_metrics=True)
    async with httpx.AsyncClient(base_url=open_door.http_url, timeout=SOON) as http:
        assert (await http.get("/metrics")).status_code == 200
        assert (await http.get("/v1/status")).status_code == 401


async def test_the_status_is_for_admins(keys, make_front_door):
    acme, admin = keys.add("acme"), keys.add("ops", admin=True)
    door = await make_front_door(api_keys=keys.path)
    async with with_key(door, acme) as http:
        await http.post("/v1/completions", json=COMPLETION)
        await door.gateway.idle()
        assert (await http.get("/v1/status")).status_code == 403
    async with with_key(door, admin) as http:
        told = (await http.get("/v1/status")).json()
    assert [request["tenant"] for request in told["recent"]] == ["acme"]


async def test_a_model_that_a_tenant_may_not_use_is_not_there(keys, make_front_door):
    key = keys.add("acme", models=["another"])
    door = await make_front_door(api_keys=keys.path)
    async with with_key(door, key) as http:
        assert (await http.get("/v1/models")).json()["data"] == []
        assert (await http.get("/v1/models/demo")).status_code == 404
        for body in (COMPLETION, {"prompt": "hi"}):
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "model_not_found"


async def test_limits_of_a_tenant(keys, make_front_door, leader):
    key = keys.add("acme", max_prompt_tokens=4, max_output_tokens=3, priority_min=2)
    door = await make_front_door(api_keys=keys.path)
    async with with_key(door, key) as http:

        async def ask(**fields: object) -> httpx.Response:
            return await http.post("/v1/completions", json={"prompt": [3] * 4} | fields)

        described = (await http.get("/openapi.json")).json()["components"]["schemas"]
        fields = described["Completion"]["properties"]
        assert fields["max_tokens"]["maximum"] == 3
        assert fields["priority"]["minimum"] == 2
        assert (await ask()).json()["usage"]["completion_tokens"] == 3
        assert leader.submits[0].request.priority == 2
        assert (await ask(max_tokens=3, priority=5)).status_code == 200
        for field_name, value in (("prompt", [3] * 5), ("max_tokens", 4), ("priority", 1)):
            refused = await ask(**{field_name: value})
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == field_name


async def test_a_file_that_changes_changes_who_may_call(keys, make_front_door, monkeypatch):
    monkeypatch.setattr(serve, "_LOOK_S", 0.01)
    old = keys.add("acme")
    door = await make_front_door(api_keys=keys.path)
    async with with_key(door, old) as http:
        assert (await http.get("/v1/models")).status_code == 200
        keys.entries.clear()
        keys.add("acme")
        while (await http.get("/v1/models")).status_code == 200:
            pass  # until it has been looked at


# gRPC


def calls_of(stub: pb_grpc.InferenceStub, metadata: tuple[tuple[str, str], ...]) -> list[object]:
    """Begin a call of every method that the service has."""
    methods = pb.DESCRIPTOR.services_by_name["Inference"].methods
    pool = {name: getattr(pb, name) for name in dir(pb)}
    calls = []
    for method in methods:
        one = pool[method.input_type.name]()
        request = iter([one]) if method.client_streaming else one
        calls.append(getattr(stub, method.name)(request, metadata=metadata, timeout=SOON))
    return calls


async def status_of(call: object) -> grpc.StatusCode:
    """Read what comes, without which a status is not seen, and return the status."""
    assert isinstance(call, grpc.aio.Call)
    with contextlib.suppress(grpc.aio.AioRpcError):
        if isinstance(call, grpc.aio.UnaryStreamCall | grpc.aio.StreamStreamCall):
            async for _ in call:
                pass
    return await call.code()


async def test_every_grpc_method_asks_for_a_key(keys, make_front_door):
    key = keys.add("acme")
    door = await make_front_door(api_keys=keys.path)
    async with grpc.aio.insecure_channel(door.grpc_address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        for wrong in (
            (),
            (("authorization", f"Bearer {new_key('acme')[0]}"),),
            (("authorization", f"Bearer {key}"), ("authorization", f"Bearer {key}")),
        ):
            statuses = {await status_of(call) for call in calls_of(stub, wrong)}
            assert statuses == {grpc.StatusCode.UNAUTHENTICATED}
        right = (("authorization", f"Bearer {key}"),)
        statuses = {await status_of(call) for call in calls_of(stub, right)}
        assert grpc.StatusCode.UNAUTHENTICATED not in statuses
        health = health_pb2_grpc.HealthStub(channel)
        found = await health.Check(health_pb2.HealthCheckRequest(), timeout=SOON)
        assert found.status == health_pb2.HealthCheckResponse.SERVING


async def test_the_python_client_with_a_key(keys, make_front_door, leader):
    key = keys.add("acme", max_output_tokens=3, priority_min=2)
    door = await make_front_door(api_keys=keys.path)

    def use() -> tuple[dict[str, int], str, BatonError]:
        with Client(door.grpc_address, api_key=key, timeout_s=SOON) as client:
            assert key not in repr(client)
            told = client.models(), "".join(client.generate("hi", Options(max_tokens=3)))
        with (
            Client(door.grpc_address, timeout_s=SOON) as client,
            pytest.raises(BatonError) as refused,
        ):
            client.models()
        return *told, refused.value

    models, text, error = await asyncio.to_thread(use)
    assert list(models) == ["demo"]
    assert text
    assert error.code == "invalid_api_key"
    sent = leader.submits[0].request
    assert (sent.tenant, sent.priority) == ("acme", 2)


async def test_grpc_lists_no_model_that_a_tenant_may_not_use(keys, make_front_door):
    key = keys.add("acme", models=["another"])
    door = await make_front_door(api_keys=keys.path)
    async with grpc.aio.insecure_channel(door.grpc_address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        metadata = (("authorization", f"Bearer {key}"),)
        listed = await stub.ListModels(pb.ListModelsRequest(), metadata=metadata, timeout=SOON)
        assert not listed.models
        call = stub.Generate(pb.GenerateRequest(text="hi"), metadata=metadata, timeout=SOON)
        assert await status_of(call) is grpc.StatusCode.NOT_FOUND


# Nothing tells a key


async def test_no_log_line_and_no_answer_has_a_key_in_it(keys, make_front_door):
    key, stranger = keys.add("acme"), new_key("acme")[0]
    door = await make_front_door(api_keys=keys.path)
    secrets = [key, stranger, key.split("_", 2)[2], stranger.split("_", 2)[2]]
    said: list[str] = []
    paths = ("/v1/models", "/metrics", f"/v1/requests/{key}"[:20], "/v1/models/x")
    async with httpx.AsyncClient(base_url=door.http_url, timeout=SOON) as http:
        for headers in (bearer(key), bearer(stranger), {"authorization": stranger}):
            said += [(await http.get(path, headers=headers)).text for path in paths]
    with structlog.testing.capture_logs() as lines:
        keys.path.write_text(f'{{"keys": [{{"id": "{key}"}}]}}')
        assert not door.gateway.identity.refresh()
    assert lines
    said += map(str, lines)
    said += [repr(door.gateway), repr(door.gateway.identity), repr(door.gateway.config)]
    assert not [secret for secret in secrets for text in said if secret in text]
