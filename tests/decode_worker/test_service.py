"""What a decode leader does with sessions that misbehave."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.core.config import EngineConfig, WorkerConfig
from baton.core.topology import Role
from baton.decode_worker.outbox import Outbox
from baton.decode_worker.worker import DecodeWorker
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as pb_grpc

TIMEOUT_S = 30.0


def mixed(model_dir: Path) -> WorkerConfig:
    return WorkerConfig(
        instance_id="mixed-0",
        role=Role.MIXED,
        model_dir=model_dir,
        model_name="tiny",
        engine=EngineConfig(kv_memory_mib=8, max_sequences=2, max_waiting=3),
    )


@pytest.fixture
async def worker(tiny_llama_dir: Path) -> AsyncIterator[DecodeWorker]:
    config = mixed(tiny_llama_dir)
    async with await DecodeWorker.start(config, on_progress=lambda _: None) as worker:
        yield worker


@pytest.fixture
async def call(worker: DecodeWorker) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(worker.info.address) as channel:
        call = pb_grpc.DecodeStub(channel).Session()
        hello = (await call.read()).hello
        assert (hello.instance_id, hello.incarnation) == ("mixed-0", worker.info.incarnation)
        yield call
        call.cancel()


def submit(key: int, max_tokens: int = 4, **request: Any) -> pb.GatewayFrame:
    fields = {"request_id": f"r{key}", "prompt": [1, 2, 3], "max_tokens": max_tokens, "top_p": 1.0}
    message = pb.Submit(key=key, request=pb.Request(**(fields | request)), timeout_s=TIMEOUT_S)
    return pb.GatewayFrame(submit=message)


async def finishes(call: Any, count: int, *, last: int = 0) -> dict[int, pb.Finish]:
    """The requests that end, by key: the first `count`, and on until the one with key `last`."""
    found: dict[int, pb.Finish] = {}
    async with asyncio.timeout(TIMEOUT_S):
        while len(found) < count or (last and last not in found):
            for update in (await call.read()).updates:
                if update.HasField("finish"):
                    assert update.key not in found
                    found[update.key] = update.finish
    return found


@pytest.mark.parametrize(
    ("frame", "what"),
    [(pb.GatewayFrame(), "GatewayFrame.frame"), (submit(1), "Submit.key")],
    ids=["empty frame", "key in use"],
)
async def test_a_gateway_that_makes_no_sense_is_told_so_and_loses_its_stream(
    call: Any, worker: DecodeWorker, frame: pb.GatewayFrame, what: str
) -> None:
    await call.write(submit(1, max_tokens=200))
    await call.write(frame)

    async def read_on() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(read_on(), TIMEOUT_S)
    assert what in str(caught.value.details())
    assert worker.stats()["open_requests"] == 0


async def test_a_session_that_cannot_write_ends_instead_of_keeping_silent(
    call: Any, worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(outbox: Outbox) -> Any:
        raise RuntimeError("no frame")

    monkeypatch.setattr(Outbox, "next_frame", broken)
    await call.write(submit(1))  # the writer already waits for this frame, and fails at the next
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await finishes(call, 1)
    assert "the session broke: RuntimeError('no frame')" in str(caught.value.details())
    assert worker.stats()["open_requests"] == 0


async def test_a_malformed_request_fails_alone(call: Any) -> None:
    await call.write(submit(1, top_p=0.0))
    await call.write(submit(2))
    found = await finishes(call, 2)
    assert found[1].error.code == "invalid_request"
    assert "top_p" in found[1].error.message
    assert found[2].reason == "length"


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan"), float("inf")])
async def test_a_deadline_that_makes_no_sense_is_refused(call: Any, timeout_s: float) -> None:
    frame = submit(1)
    frame.submit.timeout_s = timeout_s
    await call.write(frame)
    error = (await finishes(call, 1))[1].error
    assert (error.code, "timeout_s" in error.message) == ("invalid_request", True)


async def test_requests_beyond_engine_and_queue_are_refused(
    call: Any, worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, all_there = worker.instance.engine._runner, threading.Event()
    execute = runner.execute

    def wait_for_all(plan: Any, watch: Any) -> Any:
        assert all_there.wait(TIMEOUT_S)
        return execute(plan, watch)

    monkeypatch.setattr(runner, "execute", wait_for_all)
    for key in range(1, 9):
        await call.write(submit(key, max_tokens=40))
    found = await finishes(call, 1, last=8)
    all_there.set()
    found |= await finishes(call, 8 - len(found))
    refused = {key for key, finish in found.items() if finish.error.code == "overloaded"}
    # Five fit engine and queue; of these, how many the queue takes at once depends on the step.
    assert {6, 7, 8} <= refused
    assert len(refused) <= 5
    assert {finish.reason for key, finish in found.items() if key not in refused} == {"length"}
    assert worker.stats()["open_requests"] == 0


async def test_cancel_ends_a_request_with_exactly_one_finish(call: Any) -> None:
    await call.write(submit(1, max_tokens=400))
    await call.write(pb.GatewayFrame(cancel=pb.Cancel(key=1)))
    await call.write(pb.GatewayFrame(cancel=pb.Cancel(key=1)))
    await call.write(pb.GatewayFrame(cancel=pb.Cancel(key=99)))
    await call.write(submit(2))
    found = await finishes(call, 2)
    assert (found[1].reason, found[2].reason) == ("cancelled", "length")


async def test_a_drain_ends_what_is_open_and_refuses_what_comes(
    call: Any, worker: DecodeWorker
) -> None:
    for key in (1, 2):
        await call.write(submit(key, max_tokens=400))
    begun: set[int] = set()
    async with asyncio.timeout(TIMEOUT_S):
        while begun != {1, 2}:
            begun |= {update.key for update in (await call.read()).updates}
    assert await worker.drain(0.0) == 2
    await call.write(submit(3))
    found = await finishes(call, 3)
    assert [found[key].reason for key in (1, 2, 3)] == ["error"] * 3
    assert [found[key].error.code for key in (1, 2, 3)] == ["draining"] * 3
    stats = worker.stats()
    assert (stats["draining"], stats["open_requests"], stats["finished_error"]) == (1, 0, 2)


async def test_a_step_that_raises_ends_its_requests_and_not_the_worker(
    call: Any, worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = worker.instance.engine._runner

    def broken(plan: Any, watch: Any) -> Any:
        raise RuntimeError("a kernel failed")

    with monkeypatch.context() as patched:
        patched.setattr(runner, "execute", broken)
        await call.write(submit(1))
        failed = (await finishes(call, 1))[1]
    assert failed.error.code == "internal"
    assert "a kernel failed" in failed.error.message
    await call.write(submit(2))
    assert (await finishes(call, 1))[2].reason == "length"


async def test_a_crashed_task_does_not_keep_a_closing_worker_open(tiny_llama_dir: Path) -> None:
    worker = await DecodeWorker.start(mixed(tiny_llama_dir), on_progress=lambda _: None)
    worker._host.tasks.crashed.append(RuntimeError("a bug"))
    with pytest.raises(AssertionError, match="a bug"):
        await worker.close()
    assert worker.instance._running.done(), "the engine runs on"
