"""A decode leader that follows a script, behind the real session protocol on a real socket."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import pytest
from prometheus_client import CollectorRegistry

from baton.api.gateway import Gateway
from baton.api.peers import ALONE, Peers
from baton.api.serve import FrontDoor
from baton.api.validate import ServedModel
from baton.core.config import GatewayConfig
from baton.core.errors import BatonError
from baton.core.ids import InstanceId, new_incarnation
from baton.core.metrics import GatewayMetrics
from baton.core.served_model import FrontModel
from baton.core.spans import DecodeSpans
from baton.core.topology import InstanceInfo, Membership, MembershipBoard, Role
from baton.core.trace import HandoverTrace
from baton.models.tokenizer import Tokenizer, load_tokenizer
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as pb_grpc
from baton.proto.convert import error_proto, spans_proto, trace_proto
from baton.proto.grpc_runtime import WorkerServer

MODEL = "demo"
MAX_MODEL_LEN = 256
DEMO_MODEL = Path(__file__).resolve().parents[2] / "demo_model" / "main"
HERMES = (
    "{% if tools %}tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}\n"
    "Answer <tool_call>{...}</tool_call>\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}"
    "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}\n{% endfor %}"
    "{% if style %}style {{ style }}\n{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A chat template that knows tools: the demo model's own does not."""


@dataclass
class Script:
    """What the leader does with one request."""

    tokens: Sequence[int]
    finish: str = "length"
    error: BatonError | None = None
    """Ends the request instead of `finish`."""
    hold_after: int | None = None
    """Tokens after which it waits for `ScriptedLeader.go`, or for a cancel."""
    handovers: tuple[HandoverTrace, ...] = ()
    logprobs: int | None = None
    """Each token comes with its own logprob, -0.5, and those of as many tokens."""
    cached_tokens: int = 0
    """Told with the last token."""
    backed_up_tokens: int = 0
    """Told with every token."""
    spans: DecodeSpans | None = None
    """Told with the first token."""

    def told(self, tokens: Sequence[int]) -> list[pb.TokenLogprobs]:
        if self.logprobs is None:
            return []
        top = range(self.logprobs)
        return [
            pb.TokenLogprobs(
                logprob=-0.5,
                top_tokens=[1000 + i for i in top],
                top_logprobs=[-0.25 * i for i in top],
            )
            for _ in tokens
        ]


@dataclass
class _Running:
    script: Script
    sent: int = 0


@dataclass
class _Stream:
    running: dict[int, _Running] = field(default_factory=dict)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    dropped: asyncio.Event = field(default_factory=asyncio.Event)
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """gRPC refuses a message while another is on its way to the connection."""


class ScriptedLeader(pb_grpc.DecodeServicer):
    """Serves Decode.Session; each step is one message with a token of every running request.

    A request that is resumed goes on where the other leader's script ended.
    """

    def __init__(self, name: str, script: Callable[[pb.Request], Script]) -> None:
        self.name = name
        self.incarnation = new_incarnation()
        self.claimed_incarnation = self.incarnation
        """What Hello says; changed to play an instance that was restarted unnoticed."""
        self.script = script
        self.greeting = asyncio.Event()
        """Cleared: it is fenced, and greets nobody."""
        self.greeting.set()
        self.go = asyncio.Event()
        self.submits: list[pb.Submit] = []
        self.cancelled: asyncio.Queue[int] = asyncio.Queue()
        self.frames = 0
        self.answers_cancel = True
        self._streams: list[_Stream] = []
        self._server: WorkerServer | None = None

    async def start(self) -> None:
        self._server = await WorkerServer.start(
            "127.0.0.1", 0, lambda server: pb_grpc.add_DecodeServicer_to_server(self, server)
        )

    async def close(self) -> None:
        assert self._server is not None
        await self._server.close(0)

    def info(self, role: Role = Role.DECODE, model: str = MODEL) -> InstanceInfo:
        assert self._server is not None
        return InstanceInfo(
            instance_id=InstanceId(self.name),
            role=role,
            address=self._server.address,
            incarnation=self.incarnation,
            pid=1,
            model=model,
            compatibility="same",
            max_model_len=MAX_MODEL_LEN,
            kv_tokens=1 << 16,
            max_sequences=16,
            load_s=0.0,
        )

    def drop_sessions(self) -> None:
        """End every stream, but go on serving."""
        for stream in self._streams:
            stream.dropped.set()

    def resume(self) -> None:
        """Let held requests go on."""
        self.go.set()
        for stream in self._streams:
            stream.wake.set()

    @property
    def running(self) -> int:
        return sum(len(stream.running) for stream in self._streams)

    async def Session(
        self,
        request_iterator: AsyncIterator[pb.GatewayFrame],
        context: grpc.aio.ServicerContext[pb.GatewayFrame, pb.DecodeFrame],
    ) -> None:
        await self.greeting.wait()
        hello = pb.Hello(instance_id=self.name, incarnation=self.claimed_incarnation)
        await context.write(pb.DecodeFrame(hello=hello))
        stream = _Stream()
        self._streams.append(stream)
        tasks = [
            asyncio.create_task(self._run(stream, context)),
            asyncio.create_task(self._read(stream, request_iterator, context)),
            asyncio.create_task(stream.dropped.wait()),
        ]
        try:
            await asyncio.wait(tasks[1:], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._streams.remove(stream)
            for task in tasks:
                task.cancel()

    async def _read(
        self,
        stream: _Stream,
        frames: AsyncIterator[pb.GatewayFrame],
        context: grpc.aio.ServicerContext[pb.GatewayFrame, pb.DecodeFrame],
    ) -> None:
        async for frame in frames:
            if frame.WhichOneof("frame") == "submit":
                self.submits.append(frame.submit)
                script = self.script(frame.submit.request)
                run = _Running(script, sent=frame.submit.request.resumed)
                stream.running[frame.submit.key] = run
                stream.wake.set()
            else:
                await self._cancel(stream, frame.cancel.key, context)

    async def _cancel(
        self,
        stream: _Stream,
        key: int,
        context: grpc.aio.ServicerContext[pb.GatewayFrame, pb.DecodeFrame],
    ) -> None:
        self.cancelled.put_nowait(key)
        async with stream.writing:
            if self.answers_cancel and stream.running.pop(key, None) is not None:
                update = pb.Update(key=key, finish=pb.Finish(reason="cancelled"))
                await context.write(pb.DecodeFrame(updates=[update]))

    async def _run(
        self,
        stream: _Stream,
        context: grpc.aio.ServicerContext[pb.GatewayFrame, pb.DecodeFrame],
    ) -> None:
        while True:
            async with stream.writing:
                updates = [
                    update
                    for key in list(stream.running)
                    if (update := self._step(stream, key)) is not None
                ]
                if updates:
                    self.frames += 1
                    await context.write(pb.DecodeFrame(updates=updates))
                    continue
                stream.wake.clear()
            await stream.wake.wait()

    def _step(self, stream: _Stream, key: int) -> pb.Update | None:
        run = stream.running[key]
        if run.sent == run.script.hold_after and not self.go.is_set():
            return None
        tokens = run.script.tokens[run.sent : run.sent + 1]
        run.sent += 1
        spans = run.script.spans
        held = run.sent == run.script.hold_after and not self.go.is_set()
        if run.sent < len(run.script.tokens) or held:
            return pb.Update(
                key=key,
                tokens=tokens,
                logprobs=run.script.told(tokens),
                backed_up_tokens=run.script.backed_up_tokens,
                first_token=spans_proto(spans) if spans and run.sent == 1 else None,
            )
        del stream.running[key]
        error = run.script.error
        finish = pb.Finish(
            reason="error" if error else run.script.finish,
            error=error_proto(error) if error else None,
            handovers=[trace_proto(trace) for trace in run.script.handovers],
            local_prefill=not run.script.handovers,
        )
        told = run.script.told(tokens)
        return pb.Update(
            key=key,
            tokens=tokens,
            finish=finish,
            logprobs=told,
            cached_tokens=run.script.cached_tokens,
        )


@pytest.fixture
def until():
    """Wait, with a deadline, until something that happens on this event loop is true."""

    async def wait(predicate: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not predicate():  # noqa: ASYNC110 - each turn of the loop may make it true
                await asyncio.sleep(0)

    return wait


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(DEMO_MODEL)


@pytest.fixture(scope="session")
def tokenizer_with(tmp_path_factory) -> Callable[[str], Tokenizer]:
    """Make the demo model's tokenizer with another chat template."""

    def make(template: str) -> Tokenizer:
        folder = tmp_path_factory.mktemp("model")
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO_MODEL / name, folder)
        (folder / "chat_template.jinja").write_text(template)
        return load_tokenizer(folder)

    return make


@pytest.fixture(scope="session")
def tool_tokenizer(tokenizer_with) -> Tokenizer:
    return tokenizer_with(HERMES)


@pytest.fixture(scope="session")
def served_model(tokenizer) -> ServedModel:
    return ServedModel(MODEL, tokenizer, MAX_MODEL_LEN)


@pytest.fixture
def text_script(tokenizer) -> Callable[..., Callable[[pb.Request], Script]]:
    """Make a script that answers every request with the tokens of one text."""

    def make(text: str, **options: object) -> Callable[[pb.Request], Script]:
        tokens = tokenizer.encode(text)

        def script(request: pb.Request) -> Script:
            asked = {"logprobs": request.logprobs} if request.HasField("logprobs") else {}
            return Script(tokens[: request.max_tokens], **(asked | options))  # type: ignore[arg-type]

        return script

    return make


@pytest.fixture
async def make_leader(text_script) -> AsyncIterator[Callable[..., object]]:
    """Start leaders; all are closed at the end."""
    leaders: list[ScriptedLeader] = []

    async def make(name: str = "decode-0", text: str = "def add(a, b):", **options: object):
        leader = ScriptedLeader(name, text_script(text, **options))
        await leader.start()
        leaders.append(leader)
        return leader

    yield make
    for leader in leaders:
        await leader.close()


@pytest.fixture
async def leader(make_leader) -> ScriptedLeader:
    return await make_leader()


@pytest.fixture
def board(leader) -> MembershipBoard:
    return MembershipBoard(Membership(1, (leader.info(),)))


@pytest.fixture
def make_gateway(tokenizer, board):
    """Build a gateway over the board; settings are those of GatewayConfig."""

    def make(
        *,
        expects_prefill: bool = False,
        may_be_empty: bool = False,
        board: MembershipBoard = board,
        peers: Peers = ALONE,
        **settings: object,
    ) -> Gateway:
        config = GatewayConfig.checked(**({"http_port": 0, "grpc_port": 0} | settings))
        metrics = GatewayMetrics(CollectorRegistry())
        front = FrontModel(name=MODEL, expects_prefill=expects_prefill, may_be_empty=may_be_empty)
        return Gateway(config, {front: tokenizer}, board, metrics, peers=peers)

    return make


@pytest.fixture
async def gateway(make_gateway) -> AsyncIterator[Gateway]:
    gateway = make_gateway()
    async with gateway:
        yield gateway
    gateway.check()


@pytest.fixture
async def make_front_door(make_gateway):
    """Start a gateway with both APIs; each is closed and checked at the end."""
    doors: list[FrontDoor] = []

    async def make(**settings: object) -> FrontDoor:
        gateway = make_gateway(**settings)
        await gateway.start()
        door = await FrontDoor.start(gateway)
        doors.append(door)
        return door

    yield make
    for door in doors:
        await door.close(grace_s=0.0)
        door.gateway.check()


@pytest.fixture
async def front_door(make_front_door) -> FrontDoor:
    return await make_front_door()


@pytest.fixture
async def http(front_door) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=front_door.http_url, timeout=20) as client:
        yield client
