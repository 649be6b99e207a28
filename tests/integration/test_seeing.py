"""What real workers and a gateway let one see: where the time went, logs, status, and `baton top`.

The spans add up to the time to first token on every way that a request can take.
"""

import asyncio
import io
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from rich.console import Console

from baton.api.gateway import Gateway
from baton.api.serve import FrontDoor
from baton.cli.top import top
from baton.core import log
from baton.core.clock import monotonic
from baton.core.config import GatewayConfig
from baton.core.ids import InstanceId
from baton.core.metrics import GatewayMetrics
from baton.core.served_model import FrontModel
from baton.core.spans import SPAN_NAMES
from baton.core.topology import InstanceInfo, Membership, MembershipBoard, Role
from baton.core.trace import RequestTrace
from baton.models.tokenizer import load_tokenizer

PATIENCE_S = 60.0
CODE = 'def read_config(path):\n    """Read a file."""\n    with open(path) as file:\n'
HANDOVER = {"handshake", "prefill_network", "prefill_queue", "prefill_compute", "prefill_offer"}
LOCAL = {"local_queue", "local_compute"}
ALWAYS = {"tokenize", "gateway_queue", "gateway_network", "decide", "admit", "outbox"}


class House:
    """A front door, and the instances that are published to it."""

    def __init__(
        self, gateway: Gateway, door: FrontDoor, board: MembershipBoard, eventually: Any
    ) -> None:
        self.gateway = gateway
        self.url = f"{door.http_url}/v1/completions"
        self._board = board
        self._eventually = eventually

    def publish(self, *instances: InstanceInfo) -> None:
        self._board.publish(Membership(self._board.current.version + 1, instances))

    async def know(self, *instances: InstanceInfo) -> None:
        """Use exactly these from now on; returns once all decode instances are connected."""
        self.publish(*instances)
        wanted = {i.instance_id for i in instances if i.role is not Role.PREFILL}
        await self._eventually(lambda: self._connected() == wanted, "not connected")

    def _connected(self) -> set[str]:
        return {s.instance_id for s in self.gateway.stats().sessions if s.ready}

    async def ask_health(self) -> None:
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            await client.get(self.url.replace("/v1/completions", "/health"))

    async def ask(self, prompt: str = CODE, **fields: Any) -> RequestTrace:
        """Ask over HTTP and return the trace, which agrees with what the answer tells."""
        body = {"model": "demo", "prompt": prompt, "max_tokens": 4, "temperature": 0, **fields}
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            answer = await client.post(self.url, json=body, headers={"x-baton-timing": "1"})
        assert answer.status_code == 200, answer.text
        [row] = answer.json()["baton"]["timing"]
        await self.gateway.idle()
        trace = self.gateway.trace(row["request_id"])
        assert trace is not None
        assert row["ttft_ms"] == pytest.approx(trace.ttft_s * 1000, rel=0.02)
        assert sum(row["spans_ms"].values()) == pytest.approx(row["ttft_ms"], rel=0.02)
        return trace


Build = Callable[..., Awaitable[House]]
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SAID = ("request ended", "handover failed")


@pytest.fixture
async def build(start_pair: Any, tools: Any, demo_model_dir: Path) -> AsyncIterator[Build]:
    """Build front doors; they close before the workers do, which `start_pair` starts."""
    async with AsyncExitStack() as stack:

        async def make(**options: Any) -> House:
            board = MembershipBoard()
            front = FrontModel(name="demo", expects_prefill=True, **options)
            gateway = Gateway(
                GatewayConfig(http_port=0, grpc_port=0, lease_s=30),
                {front: load_tokenizer(demo_model_dir)},
                board,
                GatewayMetrics(),
            )
            await gateway.start()
            door = await FrontDoor.start(gateway)
            stack.push_async_callback(door.close)
            return House(gateway, door, board, tools.eventually)

        yield make


def spent(trace: RequestTrace) -> set[str]:
    """Return the spans that took any time; all add up to the time to first token."""
    spans = trace.ttft_spans
    assert spans.total_s == pytest.approx(trace.ttft_s, rel=0.02)
    assert all(seconds >= 0 for _, seconds in spans.items())
    # What decode accounts for happened while the gateway waited: nothing is counted twice.
    assert spans.gateway_network_s > 0
    assert 0 < trace.ttft_s < trace.e2e_s
    return {name for name, seconds in spans.items() if seconds > 0}


async def test_a_handover(build: Build, start_pair: Any, demo_model_dir: Path) -> None:
    house, pair = await build(), await start_pair(demo_model_dir)
    await house.know(pair.prefill.info, pair.decode.info)
    first = await house.ask(CODE * 5)
    names = spent(first)
    assert names >= ALWAYS | {"handshake", "prefill_queue", "prefill_compute", "prefill_offer"}
    assert not names & (LOCAL | {"lost", "failed_handovers"})
    [handover] = first.handovers
    decode = first.ttft_spans.decode
    assert decode.prefill_compute_s == pytest.approx(handover.compute_s)
    assert decode.prefill_queue_s == pytest.approx(handover.queue_s)
    assert decode.transfer_s >= handover.exposed_s * 0.98
    again = await house.ask(CODE * 5)  # both caches have it now
    assert again.handovers[0].blocks_saved > 0
    assert spent(again) >= ALWAYS | {"handshake", "prefill_queue", "prefill_compute"}


async def test_a_prompt_that_decode_computes_and_then_has(
    build: Build, start_pair: Any, demo_model_dir: Path
) -> None:
    house, pair = await build(), await start_pair(demo_model_dir)
    await house.know(pair.decode.info)
    for cached in (False, True):
        trace = await house.ask(CODE * 5)
        assert trace.local_prefill
        assert (trace.cached_tokens > 0) == cached
        names = spent(trace)
        assert names >= (ALWAYS - {"admit"}) | LOCAL
        assert not names & (HANDOVER | {"room", "connect", "transfer"})


async def test_prefill_that_is_gone(build: Build, start_pair: Any, demo_model_dir: Path) -> None:
    house, pair = await build(), await start_pair(demo_model_dir)
    nobody = replace(pair.prefill.info, instance_id=InstanceId("prefill-9"), address="127.0.0.1:1")
    await house.know(nobody, pair.decode.info)
    trace = await house.ask(max_tokens=3)
    assert trace.local_prefill
    if trace.handovers:  # unless the gateway has noticed that nobody is there
        assert spent(trace) >= LOCAL | {"failed_handovers"}


async def test_a_request_that_waits_for_an_instance_to_come(
    build: Build, start_pair: Any, tools: Any, demo_model_dir: Path
) -> None:
    house, pair = await build(may_be_empty=True), await start_pair(demo_model_dir)
    house.publish(pair.decode.info)
    await house.know(pair.decode.info)
    house.publish()
    await tools.eventually(lambda: not house.gateway.stats().sessions, "still connected")
    asked = asyncio.create_task(house.ask())
    await tools.eventually(lambda: house.gateway.stats().waiting == 1, "it does not wait")
    seen_at = monotonic()
    await house.ask_health()
    waited_s = monotonic() - seen_at
    house.publish(pair.prefill.info, pair.decode.info)
    trace = await asked
    spent(trace)
    assert trace.ttft_spans.wake_s >= waited_s


async def test_an_instance_that_is_lost_before_the_first_token(
    build: Build, start_pair: Any, start_process: Any, tools: Any, demo_model_dir: Path
) -> None:
    """It stands still, then gets the request, and then is killed."""
    house, pair = await build(), await start_pair(demo_model_dir)
    doomed = await asyncio.to_thread(
        start_process, tools.worker_config(Role.DECODE, "a-decode", demo_model_dir)
    )
    told = doomed.info
    info = replace(
        pair.decode.info,
        instance_id=told.instance_id,
        address=told.address,
        incarnation=told.incarnation,
    )
    await house.know(info)
    doomed.send(signal.SIGSTOP)
    asked = asyncio.create_task(house.ask())
    await tools.eventually(lambda: house.gateway.stats().open_requests == 1, "nothing is open")
    doomed.process.kill()
    await house.know(pair.decode.info)
    trace = await asked
    [move] = trace.migrations
    assert move.output_tokens == 0
    assert spent(trace) >= {"lost"} | LOCAL
    assert trace.ttft_spans.lost_s >= move.wait_s


async def test_a_stream_tells_in_its_last_chunk_and_only_on_request(
    build: Build, start_pair: Any, demo_model_dir: Path
) -> None:
    house, pair = await build(), await start_pair(demo_model_dir)
    await house.know(pair.prefill.info, pair.decode.info)
    body = {"model": "demo", "prompt": CODE, "max_tokens": 3, "n": 2, "stream": True}
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        told = await client.post(house.url, json=body, headers={"x-baton-timing": "1"})
        silent = await client.post(house.url, json=body)
    assert "baton" not in silent.text
    *chunks, done = [line[6:] for line in told.text.split("\n\n") if line]
    assert done == "[DONE]"
    rows = json.loads(chunks[-1])["baton"]["timing"]
    assert [row["index"] for row in rows] == [0, 1]
    assert all("baton" not in json.loads(chunk) for chunk in chunks[:-1])
    assert all(set(row["spans_ms"]) <= set(SPAN_NAMES) for row in rows)
    await house.gateway.idle()
    text = house.gateway.metrics.render().decode()
    counts = [n for n in text.splitlines() if n.startswith("baton_ttft_seconds_count")]
    assert [float(n.split()[-1]) for n in counts] == [4.0]


async def test_every_line_about_a_request_has_its_id_and_that_of_its_trace(
    build: Build,
    start_pair: Any,
    tools: Any,
    demo_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BATON_LOG_FORMAT", "json")
    monkeypatch.setenv("BATON_LOG_LEVEL", "info")
    house = await build()
    pair = await start_pair(demo_model_dir)
    log.configure()
    try:
        await house.know(pair.prefill.info, pair.decode.info)
        trace = await house.ask()
        nobody = tools.ref_of(replace(pair.prefill.info, address="127.0.0.1:1"))
        submitted = await pair.session.submit(  # nobody is at the first one's address
            tools.prompt((5, 6, 7), traceparent=f"00-{TRACE_ID}-b7ad6b7169203331-01"),
            [nobody, pair.ref],
        )
        await submitted.wait()
    finally:
        structlog.reset_defaults()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line[:1] == "{"]
    of = {event: [n["request"] for n in lines if n["event"] == event] for event in SAID}
    assert of == {"request ended": [trace.request_id], "handover failed": ["request-1"]}
    assert [n.get("trace") for n in lines if n["event"] in SAID] == [None, TRACE_ID]


async def test_status_and_top_show_what_is_there(
    build: Build, start_pair: Any, tools: Any, demo_model_dir: Path
) -> None:
    house, pair = await build(), await start_pair(demo_model_dir)
    await house.know(pair.prefill.info, pair.decode.info)
    trace = await house.ask(CODE * 5)
    url = house.url.removesuffix("/v1/completions")

    async def status() -> Any:
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            return (await client.get(f"{url}/v1/status")).json()

    def reported() -> bool:
        reports = [member.report for member in house.gateway.reading().instances]
        return all(r is not None and r.steps > 0 and r.open_requests == 0 for r in reports)

    await tools.eventually(reported, "not all instances have told of their steps")
    told = await status()
    assert {p["role"]: [i["instance_id"] for i in p["instances"]] for p in told["pools"]} == {
        "prefill": ["prefill-0"],
        "decode": ["decode-0"],
    }
    [request] = told["recent"]
    assert request["request_id"] == trace.request_id
    assert sum(request["ttft_spans"].values()) == pytest.approx(request["ttft_s"], rel=0.02)
    assert told["requests"]["output_tokens"] == trace.output_tokens
    assert told["last_minute"]["requests"] == 1
    decode = told["pools"][-1]["instances"][0]
    assert decode["stats"]["blocks_cached"] > 0
    assert decode["blocks_total"] == 512
    text = house.gateway.metrics.render().decode()
    told = 'baton_instance_up{instance_id="prefill-0",model="demo",role="prefill"} 1.0'
    assert told in text
    console = Console(width=120, record=True, file=io.StringIO())
    await asyncio.to_thread(top, url, console, once=True)
    shown = console.export_text()
    for word in ("prefill 1/1", "decode-0", trace.request_id[-12:], "TTFT p50"):
        assert word in shown
