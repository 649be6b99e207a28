"""Real workers, real gRPC, real UCX; the gateway's side of a session spoken with the stubs."""

import asyncio
import contextlib
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.core.config import EngineConfig, HandoverConfig, WorkerConfig
from baton.core.ids import RequestId
from baton.core.request import GenerateRequest, SamplingParams, TokenLogprobs
from baton.core.topology import Role
from baton.decode_worker.worker import DecodeWorker
from baton.prefill_worker.worker import PrefillWorker
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as pb_grpc
from baton.proto.convert import request_proto
from baton.proto.convert_sampling import logprobs_core

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Prompt:
    """A request as the tests write it."""

    tokens: tuple[int, ...]
    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[int, ...] = ()
    sampling: SamplingParams | None = None
    """All of it, instead of the four above."""
    tenant: str = ""
    priority: int = 0
    output: tuple[int, ...] = ()
    """What an instance that is gone has generated."""
    traceparent: str = ""


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cached_tokens: int = 0
    backed_up: int = 0
    """Tokens, by the last word about it."""
    finish: pb.Finish | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)
    first: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self) -> "Answer":
        async with asyncio.timeout(PATIENCE_S):
            await self.done.wait()
        return self

    @property
    def reason(self) -> str:
        assert self.finish is not None
        return self.finish.reason


class Session:
    """One gateway's stream to a decode leader."""

    def __init__(self, call: Any) -> None:
        self.frames: list[pb.DecodeFrame] = []
        self._call = call
        self._keys = itertools.count(1)
        self._answers: dict[int, Answer] = {}

    async def submit(
        self,
        prompt: Prompt,
        prefill: Sequence[pb.InstanceRef] = (),
        backup: pb.InstanceRef | None = None,
    ) -> Answer:
        return (await self.submit_keyed(prompt, prefill, backup=backup))[1]

    async def submit_keyed(
        self,
        prompt: Prompt,
        prefill: Sequence[pb.InstanceRef] = (),
        timeout_s: float = PATIENCE_S,
        backup: pb.InstanceRef | None = None,
    ) -> tuple[int, Answer]:
        key = next(self._keys)
        self._answers[key] = Answer()
        sampling = prompt.sampling or SamplingParams(
            prompt.temperature, prompt.top_k, prompt.top_p, prompt.seed
        )
        request = request_proto(
            GenerateRequest(
                RequestId(f"request-{key}"),
                prompt.tokens,
                prompt.max_tokens,
                sampling,
                prompt.stop,
                tenant=prompt.tenant,
                priority=prompt.priority,
                traceparent=prompt.traceparent,
            ).resume(prompt.output)
        )
        submit = pb.Submit(
            key=key, request=request, prefill=prefill, timeout_s=timeout_s, backup=backup
        )
        await self._call.write(pb.GatewayFrame(submit=submit))
        return key, self._answers[key]

    async def cancel(self, key: int) -> None:
        await self._call.write(pb.GatewayFrame(cancel=pb.Cancel(key=key)))

    async def run(
        self, prompts: Sequence[Prompt], prefill: Sequence[pb.InstanceRef] = ()
    ) -> list[Answer]:
        """Submit all at once and wait for all."""
        answers = [await self.submit(prompt, prefill) for prompt in prompts]
        return [await answer.wait() for answer in answers]

    async def pump(self) -> None:
        while (frame := await self._call.read()) is not grpc.aio.EOF:
            self.frames.append(frame)
            for update in frame.updates:
                answer = self._answers[update.key]
                assert not answer.done.is_set(), "an update after the last one"
                answer.tokens += update.tokens
                answer.logprobs += [logprobs_core(told) for told in update.logprobs]
                answer.cached_tokens += update.cached_tokens
                answer.backed_up = update.backed_up_tokens or answer.backed_up
                if update.tokens:
                    answer.first.set()
                if update.HasField("finish"):
                    answer.finish = update.finish
                    answer.done.set()


@asynccontextmanager
async def open_session(address: str) -> AsyncIterator[Session]:
    async with grpc.aio.insecure_channel(address) as channel:
        call = pb_grpc.DecodeStub(channel).Session()
        hello = await asyncio.wait_for(call.read(), PATIENCE_S)
        assert hello.hello.incarnation
        session = Session(call)
        pump = asyncio.create_task(session.pump())
        try:
            yield session
        finally:
            call.cancel()
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                await pump


def ref_of(info: Any) -> pb.InstanceRef:
    return pb.InstanceRef(
        instance_id=info.instance_id, address=info.address, incarnation=info.incarnation
    )


@dataclass
class Pair:
    """A prefill and a decode worker of this process, and a session with the latter."""

    prefill: PrefillWorker
    decode: DecodeWorker
    session: Session

    @property
    def ref(self) -> pb.InstanceRef:
        return ref_of(self.prefill.info)


def worker_config(role: Role, name: str, model_dir: Path, **options: Any) -> WorkerConfig:
    # Who names a prefill instance wants to see a handover, unless he says otherwise.
    # As in a cluster, all know one secret.
    usual = {"local_prefill": "fallback", "secret": "the secret of the test cluster"}
    handover = HandoverConfig(**(usual | options.pop("handover", {})))
    return WorkerConfig(
        instance_id=name,
        role=role,
        model_dir=model_dir,
        model_name="demo",
        engine=EngineConfig(**({"kv_memory_mib": 64} | options)),
        handover=handover,
    )


def quiet(_: str) -> None:
    pass


StartPair = Callable[..., Awaitable[Pair]]


@pytest.fixture
async def start_pair() -> AsyncIterator[StartPair]:
    """Start pairs; at the end each worker closes, which checks that nothing is held."""
    async with AsyncExitStack() as stack:

        async def start(
            model_dir: Path,
            *,
            prefill: dict[str, Any] | None = None,
            decode: dict[str, Any] | None = None,
        ) -> Pair:
            one = await stack.enter_async_context(
                await PrefillWorker.start(
                    worker_config(Role.PREFILL, "prefill-0", model_dir, **(prefill or {})),
                    on_progress=quiet,
                )
            )
            two = await stack.enter_async_context(
                await DecodeWorker.start(
                    worker_config(Role.DECODE, "decode-0", model_dir, **(decode or {})),
                    on_progress=quiet,
                )
            )
            session = await stack.enter_async_context(open_session(two.info.address))
            return Pair(one, two, session)

        yield start


@dataclass(frozen=True)
class Info:
    instance_id: str
    address: str
    incarnation: int


class WorkerProcess:
    """A worker in a process of its own, to be killed, stopped, restarted."""

    def __init__(self, process: subprocess.Popen[str], info: Info) -> None:
        self.process = process
        self.info = info

    @property
    def ref(self) -> pb.InstanceRef:
        return ref_of(self.info)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        """Close it in good order; it checks its books and fails if something is held."""
        _, errors = self.process.communicate("close\n", timeout=PATIENCE_S)
        assert self.process.returncode == 0, errors


StartProcess = Callable[..., WorkerProcess]


@pytest.fixture
def start_process() -> Any:
    """Start workers as processes; whatever is left at the end is killed by its pid."""
    started: list[subprocess.Popen[str]] = []

    def start(config: WorkerConfig, *die_after: int) -> WorkerProcess:
        script = Path(__file__).with_name("worker_process.py")
        process = subprocess.Popen(
            [sys.executable, str(script), config.model_dump_json(), *map(str, die_after)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            _, errors = process.communicate(timeout=10)
            raise AssertionError(f"the worker did not start: {errors}")
        return WorkerProcess(process, Info(**json.loads(line)))

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=10)


async def eventually(holds: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Wait until something holds that another process or task brings about."""
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110 (the other side is not ours to wake us)
            await asyncio.sleep(0.005)
    assert holds(), what


@pytest.fixture
def tools() -> Any:
    """What the tests of this folder share; they cannot import one another."""

    class Tools:
        prompt = Prompt
        open_session = staticmethod(open_session)
        worker_config = staticmethod(worker_config)
        eventually = staticmethod(eventually)
        ref_of = staticmethod(ref_of)

    return Tools
