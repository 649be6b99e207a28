"""The asyncio shell, with the real scheduler and a model that is a pure function of its prefix."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from baton.core.config import EngineConfig
from baton.core.errors import DeadlineExceeded, InternalError, InvalidRequest, TransportError
from baton.core.hashing import hash_bytes
from baton.core.ids import BlockId, RequestId, SeqId
from baton.core.request import FinishReason, GenerateRequest
from baton.engine.scheduler import Scheduler
from baton.engine.step import ChunkComputed, EngineEvent, LayerWatch, Reserved, StepPlan, StepResult
from baton.engine.step import TokenSampled as Token
from baton.executor.engine_loop import EngineLoop

BLOCK = 8


def after(state: bytes, token: int) -> bytes:
    return hash_bytes(state, bytes([token]))


class Model:
    """Keeps per slot what a prefix hashes to; can be held up, and can fail."""

    def __init__(self) -> None:
        self.slots: dict[tuple[BlockId, int], bytes] = {}
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.error: BaseException | None = None
        self.failed: dict[SeqId, InvalidRequest] = {}

    def execute(self, plan: StepPlan, watch: LayerWatch | None = None) -> StepResult:
        for layers in watch.ends if watch else ():
            watch.reached(layers)
        self.threads.add(threading.get_ident())
        self.entered.set()
        assert self.gate.wait(20)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        tokens = {p.seq_id: self.write(p.blocks, p.start, p.tokens) for p in plan.sequences}
        sampling = {part.seq_id for part in plan.sequences if part.samples}
        failed = {seq: why for seq, why in self.failed.items() if seq in sampling}
        sampled = {seq: t for seq, t in tokens.items() if seq in sampling}
        return StepResult(plan.step, sampled, failed=failed)

    def write(self, table: Sequence[BlockId], start: int, tokens: Sequence[int]) -> int:
        last = start - 1
        state = self.slots[table[last // BLOCK], last % BLOCK] if start else b""
        for position, token in enumerate(tokens, start):
            state = after(state, token)
            self.slots[table[position // BLOCK], position % BLOCK] = state
        return state[0]


class StagedModel(Model):
    """Takes a step at once; computes it, after those before it, in a thread of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = ThreadPoolExecutor(1)

    def execute(self, plan: StepPlan, watch: LayerWatch | None = None) -> Future[StepResult]:
        return self.stage.submit(super().execute, plan, watch)


def expected(request: GenerateRequest) -> list[int]:
    state, output = b"", []
    for token in request.prompt:
        state = after(state, token)
    for _ in range(request.max_tokens):
        output.append(state[0])
        state = after(state, state[0])
    return output


class Ears:
    """A listener that remembers, and lets a test react."""

    def __init__(self) -> None:
        self.events: list[EngineEvent] = []
        self.plans: list[StepPlan] = []
        self.ran: list[StepPlan] = []
        self.failures: list[tuple[list[SeqId], Exception]] = []
        self.heard = asyncio.Event()
        self.started = asyncio.Event()
        self.react: Callable[[EngineEvent], None] = lambda event: None
        self.on_start: Callable[[StepPlan], None] = lambda plan: None
        self.wanted: tuple[int, ...] = ()
        self.layers: list[tuple[int, int]] = []

    def step_ran(self, plan: StepPlan, seconds: float) -> None:
        assert seconds >= 0
        self.ran.append(plan)

    async def until_started(self, steps: int) -> None:
        async with asyncio.timeout(20):
            while len(self.plans) < steps:
                self.started.clear()
                await self.started.wait()

    def step_started(self, plan: StepPlan) -> tuple[int, ...]:
        self.plans.append(plan)
        self.started.set()
        self.on_start(plan)
        return self.wanted

    def layers_done(self, plan: StepPlan, layers: int) -> None:
        assert plan is self.plans[-1]
        self.layers.append((plan.step, layers))

    def step_done(self, events: Sequence[EngineEvent]) -> None:
        assert events or self.plans
        self.events += events
        for event in events:
            self.react(event)
        self.heard.set()

    def step_failed(self, seq_ids: Sequence[SeqId], error: Exception) -> None:
        self.failures.append((list(seq_ids), error))
        self.heard.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self.heard.clear()
                await self.heard.wait()

    def output(self, seq: SeqId) -> list[int]:
        return [e.token for e in self.events if isinstance(e, Token) and e.seq_id == seq]

    def ended(self, seq: SeqId) -> bool:
        return any(isinstance(e, Token) and e.seq_id == seq and e.finish for e in self.events)


class World:
    def __init__(self, num_blocks: int = 16, *, depth: int = 1, **config: int) -> None:
        engine = EngineConfig(block_size=BLOCK, **config)
        self.scheduler = Scheduler(engine, num_blocks, depth=depth)
        self.model, self.ears = Model() if depth == 1 else StagedModel(), Ears()
        self.loop = EngineLoop(self.scheduler, self.model, self.ears, depth=depth)
        self.total = num_blocks

    @asynccontextmanager
    async def running(self) -> AsyncIterator["World"]:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.loop.run())
            try:
                yield self
            finally:
                self.model.gate.set()
                await self.loop.close()
        self.loop.check()

    async def in_a_step(self) -> None:
        assert await asyncio.to_thread(self.model.entered.wait, 20)

    @property
    def free(self) -> int:
        return self.scheduler.stats().roster.memory.pool.available


def request_of(prompt: int, max_tokens: int, seed: int = 0) -> GenerateRequest:
    return GenerateRequest(RequestId(f"r{seed}"), tuple(range(seed, seed + prompt)), max_tokens)


async def test_requests_run_to_their_end_in_one_thread():
    async with World(max_batch_tokens=16).running() as world:
        requests = [request_of(5 + 9 * i, 4 + i, seed=i) for i in range(4)]
        seqs = [world.loop.submit(request) for request in requests]
        await world.ears.until(lambda: all(map(world.ears.ended, seqs)))
        assert [world.ears.output(seq) for seq in seqs] == [expected(r) for r in requests]
        assert len(world.model.threads) == 1
        assert world.model.threads != {threading.get_ident()}
        await world.loop.idle()
        stats = world.loop.stats()
        assert stats.steps == len(world.ears.plans) == stats.scheduler.steps
        assert stats.failed_steps == 0
        assert stats.busy_s > 0
        assert world.free == world.total


async def test_a_model_in_stages_has_several_steps_under_way():
    async with World(max_batch_tokens=16, depth=3).running() as world:
        world.model.gate.clear()
        requests = [request_of(5 + 9 * i, 4 + i, seed=i) for i in range(4)]
        seqs = [world.loop.submit(request) for request in requests]
        await world.ears.until_started(3)
        assert not world.ears.ran
        world.model.gate.set()
        await world.ears.until(lambda: all(map(world.ears.ended, seqs)))
        assert [world.ears.output(seq) for seq in seqs] == [expected(r) for r in requests]
        await world.loop.idle()
        assert world.ears.ran == world.ears.plans
        assert world.free == world.total


async def test_a_failed_step_of_a_model_in_stages_ends_its_sequences_alone():
    async with World(max_batch_tokens=16, depth=2).running() as world:
        world.model.gate.clear()
        lost, kept = (world.loop.submit(request_of(16, 3, seed=seed)) for seed in range(2))
        await world.ears.until_started(2)
        world.model.error = ValueError("numbers")
        world.model.gate.set()
        await world.ears.until(lambda: world.ears.ended(kept))
        assert [ids for ids, _ in world.ears.failures] == [[lost]]
        assert world.ears.output(kept) == expected(request_of(16, 3, seed=1))


async def test_a_sequence_that_cannot_go_on_is_told_of_alone():
    async with World(max_batch_tokens=32).running() as world:
        world.model.gate.clear()
        lost, kept = (world.loop.submit(request_of(8, 3, seed=seed)) for seed in range(2))
        why = InvalidRequest("grammar", "a+", "one that can be followed")
        world.model.failed = {lost: why}
        world.model.gate.set()
        await world.ears.until(lambda: world.ears.ended(kept))
        assert world.ears.failures == [([lost], why)]
        assert world.ears.output(lost) == []
        assert world.ears.output(kept) == expected(request_of(8, 3, seed=1))
        assert world.loop.stats().failed_steps == 0


async def test_steps_under_way_end_before_the_loop_does():
    async with World(max_batch_tokens=16, depth=3).running() as world:
        world.model.gate.clear()
        world.loop.submit(request_of(60, 3))
        await world.ears.until_started(3)
    assert not world.loop.in_step
    assert len(world.ears.plans) == 3


async def test_layers_that_are_waited_for_are_told_of_before_the_step_ends():
    async with World().running() as world:
        world.ears.wanted = (2, 5)
        told: list[tuple[int, int]] = []
        world.ears.react = lambda event: told.extend(world.ears.layers)
        seq = world.loop.submit(request_of(5, 1))
        await world.ears.until(lambda: world.ears.ended(seq))
        assert told[:2] == [(1, 2), (1, 5)]


class HastyModel(Model):
    """Has computed layers of a step before anybody can have heard that the last one has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.last: tuple[Future[StepResult], StepResult] | None = None
        self.returned = threading.Semaphore(0)

    def execute(self, plan: StepPlan, watch: LayerWatch | None = None) -> Future[StepResult]:
        assert self.gate.wait(20)
        result, future = super().execute(plan), Future[StepResult]()
        if self.last is not None:
            self.last[0].set_result(self.last[1])
        for layers in watch.ends if watch else ():
            watch.reached(layers)
        self.last = future, result
        self.returned.release()
        return future


async def test_layers_of_a_step_are_told_of_after_what_came_of_the_last_one():
    world = World(max_batch_tokens=16, depth=2)
    world.model = world.loop._runner = model = HastyModel()
    heard: list[object] = []
    world.ears.layers_done = lambda plan, layers: heard.append((plan.step, layers))
    world.ears.react = heard.append
    world.ears.wanted = (2,)
    async with world.running():
        model.gate.clear()
        seq = world.loop.submit(request_of(32, 1))
        await world.ears.until_started(2)
        model.gate.set()
        await world.ears.until(lambda: bool(heard[1:]))
        for _ in range(2):  # until then `last` is the step that has ended
            assert await asyncio.to_thread(model.returned.acquire, timeout=20)
        assert model.last is not None
        model.last[0].set_result(model.last[1])
        await world.ears.until(lambda: world.ears.ended(seq))
    assert heard[:3] == [(1, 2), ChunkComputed(seq, 16), (2, 2)]


async def test_a_command_wakes_an_idle_loop():
    async with World().running() as world:
        for seed in range(3):
            await world.loop.idle()
            seq = world.loop.submit(request_of(4, 2, seed=seed))
            await world.ears.until(lambda seq=seq: world.ears.ended(seq))


async def test_refusals_come_straight_back():
    async with World(2).running() as world:
        with pytest.raises(InvalidRequest):
            world.loop.submit(request_of(17, 1))
        with pytest.raises(InvalidRequest):
            world.loop.reserve(request_of(17, 1))
        await world.loop.idle()
        assert not world.ears.plans


async def test_hold_keeps_blocks_until_release():
    async with World().running() as world:
        seq = world.loop.submit(request_of(20, 1), hold=True)
        await world.ears.until(lambda: bool(world.ears.output(seq)))
        assert isinstance(world.ears.events[0], ChunkComputed)
        assert len(world.loop.blocks(seq)) == 3
        world.loop.release(seq)
        assert world.free == world.total


async def test_a_reservation_is_granted_admitted_and_decoded():
    request = request_of(12, 5)
    async with World().running() as world:

        def hand_over(event: EngineEvent) -> None:
            if isinstance(event, Reserved):
                table = [ref.block for ref in event.blocks]
                token = world.model.write(table, 0, request.prompt)
                world.ears.events.append(world.loop.admit(event.seq_id, token))

        world.ears.react = hand_over
        seq = world.loop.reserve(request)
        await world.ears.until(lambda: world.ears.ended(seq))
        assert world.ears.output(seq) == expected(request)


async def test_grants_do_not_wait_for_the_step_under_way():
    async with World().running() as world:
        world.model.gate.clear()
        world.loop.submit(request_of(4, 2))
        await world.in_a_step()
        seq = world.loop.reserve(request_of(12, 2, seed=1))
        await world.ears.until(lambda: bool(world.ears.events))
        assert [event.seq_id for event in world.ears.events] == [seq]
        assert isinstance(world.ears.events[0], Reserved)


async def test_a_fence_lets_the_next_reservation_in_only_when_passed():
    async with World(2).running() as world:
        first, second = (world.loop.reserve(request_of(16, 1, seed=s)) for s in (0, 1))
        await world.ears.until(lambda: len(world.ears.events) == 1)
        world.loop.fence(first)
        await world.loop.idle()
        assert len(world.ears.events) == 1
        world.loop.fence_passed(first)
        await world.ears.until(lambda: len(world.ears.events) == 2)
        assert world.ears.events[1].seq_id == second


async def test_release_during_a_step_frees_blocks_when_it_ends_and_tells_nothing():
    async with World(2).running() as world:
        world.model.gate.clear()
        seq = world.loop.submit(request_of(14, 3))
        await world.in_a_step()
        world.loop.release(seq)
        waiting = world.loop.reserve(request_of(16, 1))
        assert world.free == 0
        world.model.gate.set()
        await world.ears.until(lambda: bool(world.ears.events))
        assert [event.seq_id for event in world.ears.events] == [waiting]
        assert not world.ears.failures


async def test_a_failed_step_is_told_and_the_loop_goes_on():
    async with World(max_batch_tokens=16).running() as world:
        error = world.model.error = RuntimeError("the device is on fire")
        first, second = (world.loop.submit(request_of(8, 3, seed=s)) for s in (0, 1))
        await world.ears.until(lambda: bool(world.ears.failures))
        assert world.ears.failures == [([first, second], error)]
        third = world.loop.submit(request_of(8, 3, seed=2))
        await world.ears.until(lambda: world.ears.ended(third))
        assert world.ears.output(third) == expected(request_of(8, 3, seed=2))
        await world.loop.idle()
        assert world.loop.stats().failed_steps == 1
        assert world.free == world.total


async def test_a_sequence_without_a_sound_token_ends_alone():
    async with World().running() as world:
        execute, requests = world.model.execute, [request_of(8, 3, seed=s) for s in (0, 1)]
        poor, well = (world.loop.submit(request) for request in requests)

        def unsound(plan: StepPlan, watch: LayerWatch | None = None) -> StepResult:
            result = execute(plan, watch)
            if result.tokens.pop(poor, None) is None:
                return result
            return replace(result, unsound=(poor,))

        world.model.execute = unsound
        await world.ears.until(lambda: world.ears.ended(well) and bool(world.ears.failures))
        ((ended, error),) = world.ears.failures
        assert ended == [poor]
        assert isinstance(error, InternalError)
        assert world.ears.output(poor) == []
        assert world.ears.output(well) == expected(requests[1])
        await world.loop.idle()
        assert world.loop.stats().failed_steps == 0
        assert world.free == world.total


async def test_a_failed_step_says_nothing_of_what_was_released_in_it():
    async with World().running() as world:
        world.model.gate.clear()
        world.model.error = TransportError("gone")
        seqs = [world.loop.submit(request_of(8, 3, seed=s)) for s in (0, 1)]
        await world.in_a_step()
        world.loop.release(seqs[0])
        world.model.gate.set()
        await world.ears.until(lambda: bool(world.ears.failures))
        assert world.ears.failures[0][0] == [seqs[1]]


async def test_a_callback_may_give_commands():
    async with World().running() as world:
        more = [request_of(4, 2, seed=s) for s in (1, 2)]
        seqs = []

        def go_on(event: EngineEvent) -> None:
            if isinstance(event, Token) and event.finish and more:
                seqs.append(world.loop.submit(more.pop()))

        world.ears.react = go_on
        world.loop.submit(request_of(4, 2))
        await world.ears.until(lambda: len(seqs) == 2 and world.ears.ended(seqs[1]))


@pytest.mark.parametrize("where", ["react", "on_start"])
async def test_what_a_listener_raises_ends_the_loop(where: str):
    world = World()

    def burst(_: object) -> None:
        raise ZeroDivisionError("a bug")

    setattr(world.ears, where, burst)
    world.loop.submit(request_of(4, 2))
    with pytest.raises(ZeroDivisionError):
        await world.loop.run()
    await world.loop.close()
    world.loop.check()
    for seq in (0, 1):
        world.loop.release(SeqId(seq))
    assert world.free == world.total


async def test_a_model_thread_that_is_told_to_exit_ends_the_loop():
    world = World()
    world.model.error = SystemExit(3)
    world.loop.submit(request_of(4, 2))
    with pytest.raises(SystemExit):
        await world.loop.run()
    await world.loop.close()
    assert world.free == world.total


async def test_close_waits_for_the_step_and_begins_no_other():
    world = World()
    run = asyncio.create_task(world.loop.run())
    world.model.gate.clear()
    seq = world.loop.submit(request_of(4, 5))
    await world.in_a_step()
    close = asyncio.create_task(world.loop.close())
    with pytest.raises(DeadlineExceeded, match="longer than 0"):
        await world.loop.close(timeout_s=0.01)
    assert not close.done()
    assert not run.done()
    world.model.gate.set()
    await close
    await run
    assert world.ears.output(seq) == expected(request_of(4, 1))
    assert len(world.ears.plans) == 1
    assert world.scheduler.has_work
    world.loop.release(seq)
    world.loop.check()
    assert world.free == world.total
    await world.loop.idle()


async def test_cancellation_waits_for_the_step():
    world = World()
    run = asyncio.create_task(world.loop.run())
    world.model.gate.clear()
    world.loop.submit(request_of(4, 5))
    await world.in_a_step()
    run.cancel()
    done, _ = await asyncio.wait([run], timeout=0.05)
    assert not done
    world.model.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await run
    await world.loop.close()
    assert not world.ears.events
    assert world.free == world.total


async def test_close_before_run_and_twice():
    world = World()
    await world.loop.close()
    await world.loop.close()
    world.loop.submit(request_of(4, 2))
    async with asyncio.timeout(5):
        await world.loop.run()
    assert not world.ears.plans


async def test_it_runs_once_at_a_time():
    async with World().running() as world:
        await world.loop.idle()
        with pytest.raises(AssertionError, match="runs already"):
            await world.loop.run()


async def test_finish_reasons_reach_the_listener():
    async with World().running() as world:
        request = request_of(4, 3)
        stop = expected(request)[1]
        seq = world.loop.submit(
            GenerateRequest(RequestId("s"), request.prompt, 9, stop_token_ids=(stop,))
        )
        await world.ears.until(lambda: world.ears.ended(seq))
        assert world.ears.events[-1] == Token(seq, stop, FinishReason.STOP)
