"""What the console reads: instances and load, and the requests that ended last."""

import json

import httpx
import pytest

from baton.api.key_file import new_key

COMPLETION = {"model": "demo", "prompt": "hi", "max_tokens": 5}


async def test_status_tells_instances_load_and_totals(http, front_door, leader, until):
    await http.post("/v1/completions", json=COMPLETION)
    await front_door.gateway.idle()
    status = (await http.get("/v1/status")).json()
    assert [model["name"] for model in status["models"]] == ["demo"]
    assert status["problems"] == []
    assert status["requests"]["open"] == 0
    assert status["requests"]["admitted"] == 1
    assert status["requests"]["output_tokens"] == 5
    assert status["requests"]["prompt_tokens"] > 0
    assert status["last_minute"]["ttft_s"]["p90"] > 0
    [pool] = status["pools"]
    assert (pool["role"], pool["size"]) == ("decode", 1)
    [row] = pool["instances"]
    assert (row["instance_id"], row["ranks"], row["usable"]) == ("decode-0", 1, True)
    assert row["incarnation"] == str(leader.incarnation)
    assert row["our_requests"] == 0


async def test_status_counts_tokens_of_open_requests(http, front_door, leader, text_script, until):
    leader.script = text_script("def add(a, b):", hold_after=2)
    async with http.stream("POST", "/v1/completions", json=COMPLETION | {"stream": True}) as held:
        await until(lambda: front_door.gateway.stats().output_tokens == 2)
        status = (await http.get("/v1/status")).json()
        assert status["requests"]["open"] == 1
        assert status["requests"]["output_tokens"] == 2
        assert status["pools"][0]["instances"][0]["our_requests"] == 1
        leader.resume()
        await held.aread()
    await front_door.gateway.idle()
    assert (await http.get("/v1/status")).json()["requests"]["output_tokens"] == 5


async def test_requests_are_listed_newest_first(http, front_door):
    ids = []
    for _ in range(3):
        ids.insert(0, (await http.post("/v1/completions", json=COMPLETION)).json()["id"])
        await front_door.gateway.idle()
    told = (await http.get("/v1/requests")).json()
    assert [row["request_id"] for row in told["data"]] == ids
    assert all("itl_s" not in row and row["ended_at"] > 1e9 for row in told["data"])
    two = (await http.get("/v1/requests?limit=2")).json()
    assert [row["request_id"] for row in two["data"]] == ids[:2]
    one = (await http.get(f"/v1/requests/{ids[2]}")).json()
    assert len(one["itl_s"]) == 4


@pytest.mark.parametrize("limit", ["0", "201", "-1", "", "x", "1.5", "²", "9" * 5000])
async def test_a_limit_that_is_not_allowed_is_named(http, limit):
    answer = await http.get("/v1/requests", params={"limit": limit})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "limit"
    assert "from 1 to 200" in answer.json()["error"]["message"]


async def test_tenants_see_their_own_requests_and_admins_all(tmp_path, make_front_door):
    keys = {name: new_key(name, admin=name == "ops") for name in ("acme", "zeta", "ops")}
    path = tmp_path / "keys.json"
    entries = [entry.model_dump() for _, entry in keys.values()]
    path.write_text(json.dumps({"tenants": {name: {} for name in keys}, "keys": entries}))
    # Metrics that are open do not open this: it names instances.
    door = await make_front_door(api_keys=path, open_metrics=True)

    def client(name: str) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {keys[name][0]}"}
        return httpx.AsyncClient(base_url=door.http_url, headers=headers, timeout=30)

    seen = {}
    for name in ("acme", "zeta"):
        async with client(name) as http:
            await http.post("/v1/completions", json=COMPLETION)
    await door.gateway.idle()
    for name in keys:
        async with client(name) as http:
            seen[name] = [row["tenant"] for row in (await http.get("/v1/requests")).json()["data"]]
            assert (await http.get("/v1/status")).status_code == (200 if name == "ops" else 403)
    assert seen == {"acme": ["acme"], "zeta": ["zeta"], "ops": ["zeta", "acme"]}
    async with httpx.AsyncClient(base_url=door.http_url, timeout=30) as http:
        assert (await http.get("/v1/requests")).status_code == 401
        assert (await http.get("/v1/status")).status_code == 401
        assert (await http.get("/console/")).status_code == 200
