"""Decode instances die, drain and break off; every stream ends as if nothing had happened.

The tokens are compared with those of a run without faults one by one, the logprobs too, and each
worker that lives closes, which checks that it holds nothing.
"""

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.api.choices import choice_pieces
from baton.api.gateway import Gateway
from baton.api.journey import Journey
from baton.api.validate import Call, completion_call
from baton.core.config import GatewayConfig
from baton.core.metrics import GatewayMetrics
from baton.core.request import SamplingParams
from baton.core.served_model import FrontModel
from baton.core.tenants import ANYBODY
from baton.core.topology import InstanceInfo, Membership, MembershipBoard, Role
from baton.decode_worker.worker import DecodeWorker
from baton.models.tokenizer import load_tokenizer
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as pb_grpc

PATIENCE_S = 120.0
CLOSE = 2e-4
"""Between logprobs of chunks that were cut differently; the native executor gives the same bits."""

LOOKS_BACK = SamplingParams(
    temperature=0.9,
    top_p=0.95,
    seed=17,
    repetition_penalty=1.3,
    presence_penalty=0.7,
    frequency_penalty=0.4,
    min_tokens=6,
    logprobs=3,
)


# ---- one decode instance, resumed by hand at every kind of token -------------------------------


@pytest.mark.parametrize("by_handover", [True, False], ids=["handed over", "computed here"])
async def test_resumed_at_any_token_it_generates_the_same_rest(
    start_pair: Any, demo_model_dir: Path, tools: Any, by_handover: bool
) -> None:
    pair = await start_pair(demo_model_dir)
    prefill = [pair.ref] if by_handover else []
    plain = tools.prompt(tuple(range(100, 133)), 24, sampling=LOOKS_BACK)
    [free] = await pair.session.run([plain])
    bad = (tuple(free.tokens[9:11]), (free.tokens[4],))
    whole = replace(plain, sampling=replace(LOOKS_BACK, bad_words=bad))
    [right] = await pair.session.run([whole])
    assert right.tokens != free.tokens
    for told in (1, 4, 5, 10, 15, 16, 23):  # in bad words, before min_tokens, at a block's end
        resumed = replace(whole, output=tuple(right.tokens[:told]))
        [rest] = await pair.session.run([resumed], prefill)
        assert rest.tokens == right.tokens[told:], told
        assert rest.reason == right.reason
        _same_logprobs(rest.logprobs, right.logprobs[told:])
        assert [t.outcome for t in rest.finish.handovers] == ["ok"] * by_handover


def _same_logprobs(found: Any, right: Any) -> None:
    assert [[t for t, _ in told.top] for told in found] == [[t for t, _ in r.top] for r in right]
    flat = [[told.logprob, *(p for _, p in told.top)] for told in found]
    assert flat == [
        pytest.approx([told.logprob, *(p for _, p in told.top)], abs=CLOSE) for told in right
    ]


# ---- the whole way -----------------------------------------------------------------------------


@dataclass
class Shown:
    """What the reader of one choice was shown."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Any, ...] = ()
    finish: str | None = None

    def expect(self, right: "Shown") -> None:
        assert (self.tokens, self.text) == (right.tokens, right.text)
        assert self.finish == right.finish
        _same_logprobs(self.logprobs, right.logprobs)


class House:
    """A gateway, and whom it knows of."""

    def __init__(self, gateway: Gateway, board: MembershipBoard) -> None:
        self.gateway = gateway
        self._board = board

    async def know(self, *instances: InstanceInfo) -> None:
        """Use exactly these from now on; returns once all are connected."""
        self._board.publish(Membership(self._board.current.version + 1, instances))
        wanted = {i.instance_id for i in instances if i.role is not Role.PREFILL}
        async with asyncio.timeout(PATIENCE_S):
            while self.connected != wanted:  # noqa: ASYNC110 - by other processes
                await asyncio.sleep(0.01)

    @property
    def connected(self) -> set[str]:
        """The decode instances that requests are sent to."""
        return {s.instance_id for s in self.gateway.stats().sessions if s.ready}

    def call(self, prompt: str, **fields: Any) -> Call:
        body = {"prompt": prompt, "max_tokens": 40, "ignore_eos": True, "seed": 5, **fields}
        return completion_call(body, self.gateway.model(ANYBODY))

    async def read(self, call: Call, seen: Callable[[int], Any] = lambda tokens: None) -> list[Any]:
        """Read all choices of a call; `seen` hears how many tokens of it there are so far."""
        shown = [Shown() for _ in call.requests]
        async with asyncio.timeout(PATIENCE_S), aclosing(choice_pieces(self.gateway, call)) as all_:
            async for index, piece in all_:
                one = shown[index]
                one.text += piece.text
                one.tokens += piece.tokens
                one.logprobs += piece.logprobs
                one.finish = piece.finish
                seen(sum(len(choice.tokens) for choice in shown))
        return shown

    async def read_all(self, calls: list[Call]) -> list[Shown]:
        return [s for shown in await asyncio.gather(*map(self.read, calls)) for s in shown]


@pytest.fixture
async def house(demo_model_dir: Path) -> AsyncIterator[House]:
    """A gateway without instances; it has given everything back at the end."""
    board = MembershipBoard()
    config = GatewayConfig(http_port=0, grpc_port=0)
    models = {FrontModel(name="demo", expects_prefill=True): load_tokenizer(demo_model_dir)}
    gateway = Gateway(config, models, board, GatewayMetrics())
    async with gateway:
        yield House(gateway, board)
    gateway.check()


def info_of(process: Any, like: InstanceInfo) -> InstanceInfo:
    """Return what a decode process would say of itself."""
    told = process.info
    return replace(
        like, instance_id=told.instance_id, address=told.address, incarnation=told.incarnation
    )


CODE = 'def read_config(path):\n    """Read a file."""\n    with open(path) as file:\n'


async def test_three_instances_are_killed_and_no_stream_shows_it(
    house: House, start_pair: Any, start_process: Any, tools: Any, demo_model_dir: Path
) -> None:
    """Each dies, as by kill -9, at its own token; greedy, sampled, two choices, a stop string."""
    pair = await start_pair(demo_model_dir)
    await house.know(pair.prefill.info, pair.decode.info)
    looks_back = {"temperature": 0.9, "presence_penalty": 0.8, "frequency_penalty": 0.3}
    stack = {"temperature": 0.7, "repetition_penalty": 1.4, "logit_bias": {"9": 3}}
    calls = [
        house.call(CODE, temperature=0, logprobs=2),
        house.call(CODE * 5, temperature=1.1, top_p=0.9, logprobs=0),
        house.call("import os\n", n=2, logprobs=1, min_tokens=20, **looks_back),
        house.call("class Stack:\n", **stack),
    ]
    [plain] = await house.read(calls[-1])
    middle = len(plain.text) // 2
    calls.append(house.call("class Stack:\n", stop=[plain.text[middle : middle + 9]], **stack))
    right = await house.read_all(calls)

    def start(name: str, tokens: int) -> Any:
        return start_process(tools.worker_config(Role.DECODE, name, demo_model_dir), tokens)

    dying = await asyncio.gather(
        *(asyncio.to_thread(start, f"decode-{i}x", n) for i, n in enumerate((1, 17, 33)))
    )
    doomed = [info_of(process, pair.decode.info) for process in dying]
    await house.know(pair.prefill.info, pair.decode.info, *doomed)
    shown = await house.read_all(calls)
    for one, other in zip(shown, right, strict=True):
        one.expect(other)
    assert [one.finish for one in shown] == ["length"] * 5 + ["stop"]
    codes = [process.process.wait(PATIENCE_S) for process in dying]
    assert codes == [-9, -9, -9]
    text = house.gateway.metrics.render().decode()
    [line] = [n for n in text.splitlines() if n.startswith("baton_migrations_total{")]
    assert 'reason="instance_lost"' in line
    assert float(line.split()[-1]) >= 3


async def test_what_was_backed_up_is_not_computed_again(
    house: House,
    start_pair: Any,
    start_process: Any,
    tools: Any,
    demo_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The instance dies as soon as its peer has something: the whole prompt, at first."""
    backup = {"backup": "peer", "backup_every_blocks": 1}
    pair = await start_pair(demo_model_dir, decode={"handover": backup})
    config = tools.worker_config(Role.DECODE, "a-decode", demo_model_dir, handover=backup)
    process = await asyncio.to_thread(start_process, config)
    doomed = info_of(process, pair.decode.info)
    await house.know(doomed)
    call = house.call(CODE * 5, max_tokens=400, temperature=0.8, logprobs=1)
    [right] = await house.read(call)
    [request] = call.requests
    whole_blocks = len(request.generate.prompt) // 16 * 16
    heard: list[int] = []

    def backed_up(journey: Journey, tokens: int) -> None:
        heard.append(tokens)
        journey._backed_up = tokens
        process.send(signal.SIGKILL)

    monkeypatch.setattr(Journey, "backed_up", backed_up)
    await house.know(pair.decode.info, doomed)
    [shown] = await house.read(call)
    shown.expect(right)
    assert process.process.wait(PATIENCE_S) == -9
    trace = house.gateway.trace(request.generate.request_id)
    assert trace is not None
    [move] = trace.migrations
    assert (move.instance, trace.decode_instance) == ("a-decode", "decode-0")
    assert heard[-1] == move.backed_up_tokens >= whole_blocks
    assert move.cached_tokens >= move.backed_up_tokens


# ---- an instance that hangs --------------------------------------------------------------------


async def test_what_a_hung_instance_has_goes_on_elsewhere_and_it_comes_back(
    house: House, start_pair: Any, start_process: Any, tools: Any, demo_model_dir: Path
) -> None:
    """Stopped in the middle of a stream: nobody refuses anything, it is just silent."""
    pair = await start_pair(demo_model_dir)
    config = tools.worker_config(Role.DECODE, "decode-1", demo_model_dir)
    process = await asyncio.to_thread(start_process, config)
    hanging = info_of(process, pair.decode.info)
    await house.know(pair.prefill.info, pair.decode.info)
    call = house.call(CODE, max_tokens=300, temperature=0.8, logprobs=1)
    [right] = await house.read(call)
    await house.know(pair.prefill.info, hanging)
    tasks: list[asyncio.Task[None]] = []

    def seen(tokens: int) -> None:
        if tokens and not tasks:
            process.send(signal.SIGSTOP)
            tasks.append(asyncio.create_task(house.know(pair.prefill.info, pair.decode.info)))

    [shown] = await house.read(call, seen)
    await tasks[0]
    shown.expect(right)
    trace = house.gateway.trace(call.requests[0].generate.request_id)
    assert trace is not None
    assert [(m.instance, m.error) for m in trace.migrations] == [("decode-1", "instance_lost")]
    process.send(signal.SIGCONT)
    await house.know(pair.prefill.info, hanging)
    # It was fenced when it woke up; it serves again once it has heard that it may.
    await tools.eventually(lambda: not house.gateway.health(), "it serves again", PATIENCE_S)
    [again] = await house.read(call)
    again.expect(right)
    await house.know(pair.prefill.info, pair.decode.info)
    process.close()


# ---- drain -------------------------------------------------------------------------------------


@pytest.fixture
async def two(
    house: House, start_pair: Any, tools: Any, demo_model_dir: Path
) -> AsyncIterator[tuple[Any, DecodeWorker]]:
    """A pair, and a second decode instance; the gateway knows all three."""
    pair = await start_pair(demo_model_dir)
    config = tools.worker_config(Role.DECODE, "decode-1", demo_model_dir)
    async with await DecodeWorker.start(config, on_progress=lambda _: None) as other:
        await house.know(pair.prefill.info, pair.decode.info, other.info)
        yield pair, other


async def test_what_is_open_at_the_deadline_of_a_drain_goes_on_elsewhere(
    house: House, two: tuple[Any, DecodeWorker]
) -> None:
    workers = {"decode-0": two[0].decode, "decode-1": two[1]}
    call = house.call(CODE, max_tokens=300, logprobs=1)
    [right] = await house.read(call)
    drains: list[asyncio.Task[int]] = []
    left: list[str] = []

    def seen(tokens: int) -> None:
        if tokens and not drains:
            left.extend(name for name, worker in workers.items() if worker.admission.open)
            drains.append(asyncio.create_task(workers[left[0]].drain(0.0)))

    [shown] = await house.read(call, seen)
    shown.expect(right)
    assert [await drain for drain in drains] == [1]
    trace = house.gateway.trace(call.requests[0].generate.request_id)
    assert trace is not None
    [gone] = left
    assert [(m.instance, m.error) for m in trace.migrations] == [(gone, "draining")]
    # From now on the gateway itself knows better than to ask.
    assert house.connected == workers.keys() - {gone}
    [again] = await house.read(call)
    again.expect(right)
    assert workers[gone].stats()["finished_error"] == 1
    assert workers[gone].stats()["open_requests"] == 0


async def test_a_drain_waits_for_what_is_open_and_admits_nothing_more(
    house: House, two: tuple[Any, DecodeWorker]
) -> None:
    """Asked for by the call that a control plane makes."""
    pair, _ = two
    call, late = house.call(CODE, max_tokens=300), house.call(CODE * 2)
    asked: list[asyncio.Task[Any]] = []

    def seen(tokens: int) -> None:
        if tokens and not asked:
            asked.append(asyncio.create_task(_drain(pair.decode, PATIENCE_S)))

    [shown] = await house.read(call, seen)
    assert len(shown.tokens) == 300
    assert (await asked[0]).handed_over == 0
    [shown] = await house.read(late)
    assert len(shown.tokens) == 40
    trace = house.gateway.trace(late.requests[0].generate.request_id)
    assert trace is not None
    assert trace.decode_instance == "decode-1"
    assert pair.decode.stats()["draining"] == 1


async def _drain(worker: Any, deadline_s: float) -> pb.DrainReply:
    stub = pb_grpc.PrefillStub if worker.info.role is Role.PREFILL else pb_grpc.DecodeStub
    async with grpc.aio.insecure_channel(worker.info.address) as channel:
        reply: pb.DrainReply = await stub(channel).Drain(pb.DrainRequest(deadline_s=deadline_s))
        return reply


async def test_a_deadline_that_makes_no_sense_is_refused(two: tuple[Any, DecodeWorker]) -> None:
    pair, _ = two
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _drain(pair.prefill, -1.0)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not pair.prefill.stats()["draining"]


async def test_prefill_that_drains_hands_over_what_is_left_of_its_sessions(
    house: House, two: tuple[Any, DecodeWorker], tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, _ = two
    call = house.call(CODE * 5)
    [right] = await house.read(call)
    runner, go_on = pair.prefill.instance.engine._runner, threading.Event()
    execute = runner.execute

    def late(plan: Any, watch: Any) -> Any:
        assert go_on.wait(PATIENCE_S)
        return execute(plan, watch)

    monkeypatch.setattr(runner, "execute", late)
    reading = asyncio.create_task(house.read(call))
    await tools.eventually(lambda: pair.prefill.stats()["sessions"] == 1, "prefill computes")
    assert (await _drain(pair.prefill, 0.0)).handed_over == 1
    [shown] = await reading
    shown.expect(right)
    go_on.set()
    assert _outcomes(house, call) == ["draining"]
    call = house.call(CODE * 6)
    [shown] = await house.read(call)
    assert len(shown.tokens) == 40
    assert _outcomes(house, call) == ["draining"], "it takes no new ones"
    assert pair.prefill.stats()["sessions"] == 0


def _outcomes(house: House, call: Call) -> list[str]:
    trace = house.gateway.trace(call.requests[0].generate.request_id)
    assert trace is not None
    return [handover.outcome for handover in trace.handovers]
