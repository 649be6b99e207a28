"""Runs the engine: an asyncio shell around the pure scheduler and the blocking model.

    worker ──submit, reserve, admit, release, fence──▶ Scheduler ──StepPlan──▶ model thread
    worker ◀─ step_started, layers_done, step_done … ─ EngineLoop ◀─StepResult──────┘

Everything but the model runs on the event loop, so nothing is locked. The loop sleeps on one
event, which every command and every finished step sets.

A model that is computed in stages takes the next step while the last ones are still on their way
through: up to `depth` of them, which end in the order in which they began. So does one that runs
ahead of the host: its thread has the next step at hand when one ends.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from baton.core.clock import Clock, monotonic
from baton.core.errors import DeadlineExceeded, InternalError
from baton.core.handover import BlockRef
from baton.core.ids import SeqId
from baton.core.instance_events import InstanceLoad
from baton.core.request import GenerateRequest
from baton.engine.kv_events import KVEvents
from baton.engine.scheduler import Scheduler, SchedulerStats
from baton.engine.step import (
    EngineEvent,
    LayerWatch,
    Outlook,
    Pinned,
    StepPlan,
    StepResult,
    TokenSampled,
)


class Runner(Protocol):
    """The model."""

    def execute(
        self, plan: StepPlan, watch: LayerWatch | None = None
    ) -> StepResult | Future[StepResult]:
        """Compute a step; blocks. Called from one thread, always the same.

        A model in stages returns as soon as it can take the next step, with a future of the result.
        """
        ...


class Listener(Protocol):
    """Whoever gave the engine its work. Called on the event loop, and must not block.

    A callback may give the loop commands. What it raises ends the loop: it is a bug.
    """

    def step_started(self, plan: StepPlan) -> Sequence[int]:
        """The model computes `plan` from now on.

        Returns the layers before which the KV of the step is wanted early: `layers_done` is called
        for each, in rising order, while the model goes on.
        """
        ...

    def layers_done(self, plan: StepPlan, layers: int) -> None:
        """The KV of all layers before `layers` is in the blocks of the oldest plan under way."""
        ...

    def step_ran(self, plan: StepPlan, seconds: float) -> None:
        """The model has computed `plan`; it took so long, not counting what ran before it."""
        ...

    def step_done(self, events: Sequence[EngineEvent]) -> None:
        """These things happened: in a step, or, for grants alone, without one."""
        ...

    def step_failed(self, seq_ids: Sequence[SeqId], error: Exception) -> None:
        """They have ended: the model raised `error`, or it is why these alone cannot go on."""
        ...


@dataclass(frozen=True, slots=True)
class EngineLoopStats:
    """What the loop did since it was made."""

    steps: int
    failed_steps: int
    busy_s: float
    """Seconds for which a step was under way."""
    scheduler: SchedulerStats


@dataclass(slots=True)
class _Step:
    plan: StepPlan
    future: asyncio.Future[Any]
    """Of the StepResult, or, from a model in stages, first of a future of it."""
    started: float
    layers: deque[int] = field(default_factory=deque)
    """Computed, and not told yet."""


class EngineLoop:
    """Use it from one event loop: start `run()` as a task, give commands, then `close()`.

    `depth` is that of the scheduler.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        listener: Listener,
        *,
        depth: int = 1,
        clock: Clock = monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._listener = listener
        self._clock = clock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._wake = asyncio.Event()
        self.moved = asyncio.Event()
        """Set after every turn; for one who waits for news, and clears it."""
        self._idle = asyncio.Event()
        self._ended = asyncio.Event()
        self._ended.set()
        self.depth = depth
        """Steps that may be under way at once."""
        self._under_way: deque[_Step] = deque()
        self._last_end = clock()
        self._closing = False
        self._steps = self._failed_steps = 0
        self._busy_s = 0.0

    def __repr__(self) -> str:
        state = "closing" if self._closing else "in a step" if self._under_way else "idle"
        return f"<EngineLoop {state}, {self._scheduler!r}>"

    # Commands: see the methods of the same names in engine/scheduler.py

    def submit(self, request: GenerateRequest, *, hold: bool = False) -> SeqId:
        """Queue a prompt to be computed here."""
        seq_id = self._scheduler.submit(request, hold=hold)
        self._woken()
        return seq_id

    def reserve(self, request: GenerateRequest) -> SeqId:
        """Queue a prompt that is handed over; `Reserved` is told once it has blocks."""
        seq_id = self._scheduler.reserve(request)
        self._woken()
        return seq_id

    def admit(self, seq_id: SeqId, first_token: int) -> TokenSampled:
        """Let a granted sequence, whose KV is verified, decode from the next step."""
        event = self._scheduler.admit(seq_id, first_token)
        self._woken()
        return event

    def adopt(self, seq_id: SeqId) -> None:
        """End a granted sequence, whose KV is verified, and cache its full blocks."""
        self._scheduler.adopt(seq_id)
        self._woken()

    def pin(self, request: GenerateRequest, blocks: int) -> SeqId | None:
        """Hold what the prefix cache has of a prompt's first `blocks` blocks, until `release`."""
        return self._scheduler.pin(request, blocks)

    def pin_committed(self, seq_id: SeqId) -> Pinned | None:
        """Hold what a sequence has in the prefix cache, until `release`."""
        return self._scheduler.pin_committed(seq_id)

    def release(self, seq_id: SeqId) -> None:
        """End a sequence in any state."""
        self._scheduler.release(seq_id)
        self._woken()

    def fence(self, seq_id: SeqId) -> None:
        """End a sequence whose blocks reads may still write."""
        self._scheduler.fence(seq_id)
        self._woken()

    def fence_passed(self, seq_id: SeqId) -> None:
        """Free the blocks of a fenced sequence."""
        self._scheduler.fence_passed(seq_id)
        self._woken()

    @property
    def in_step(self) -> bool:
        """Whether the model is computing."""
        return bool(self._under_way)

    def expect_fits(self, request: GenerateRequest) -> None:
        """Raise InvalidRequest if the request can never fit the pool."""
        self._scheduler.expect_fits(request)

    def outlook(self, request: GenerateRequest) -> Outlook:
        """Return what a request would meet here; asking changes nothing."""
        return self._scheduler.outlook(request)

    def known_tokens(self, request: GenerateRequest) -> int:
        """Return how many tokens of a prompt, from the first, the prefix cache has now."""
        return self._scheduler.known_tokens(request)

    def blocks(self, seq_id: SeqId) -> tuple[BlockRef, ...]:
        """Return the block table of a sequence that has not ended (else KeyError)."""
        return self._scheduler.blocks(seq_id)

    def drain_kv_events(self) -> tuple[KVEvents, ...]:
        """Return what each partition's prefix cache gained and lost since the last call."""
        return self._scheduler.drain_kv_events()

    def cached_hashes(self) -> tuple[Iterable[bytes], ...]:
        """Return the hashes of all prefixes that each partition's prefix cache has now."""
        return self._scheduler.cached_hashes()

    def load(self) -> InstanceLoad:
        """Return what there is to do; for the router."""
        return self._scheduler.load()

    # Life

    async def run(self) -> None:
        """Run steps until `close` or cancellation; either way, steps under way end first."""
        assert self._ended.is_set(), "it runs already"
        self._ended.clear()
        try:
            self._wake.set()
            while self._under_way or not self._closing:
                await self._wake.wait()
                self._wake.clear()
                self._turn()
        finally:
            await self._abandon_steps()
            self._ended.set()
            self._idle.set()

    async def idle(self) -> None:
        """Wait until no step is under way and none can begin."""
        await self._idle.wait()

    async def close(self, *, timeout_s: float = 60.0) -> None:
        """Begin no more steps, wait for those under way, and end the model thread.

        What has not ended stays in the scheduler, and no more is heard of it. Raises
        DeadlineExceeded if the step takes longer than `timeout_s`.
        """
        self._closing = True
        self._wake.set()
        try:
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        except TimeoutError:
            raise DeadlineExceeded(f"a step takes longer than {timeout_s} s") from None
        finally:
            self._thread.shutdown(wait=False)

    def stats(self) -> EngineLoopStats:
        """Return a snapshot."""
        return EngineLoopStats(
            self._steps, self._failed_steps, self._busy_s, self._scheduler.stats()
        )

    def check(self) -> None:
        """Assert that no block has leaked."""
        self._scheduler.check()

    # How

    def _woken(self) -> None:
        if not self._ended.is_set():
            self._idle.clear()
        self._wake.set()

    def _turn(self) -> None:
        """Do all that can be done without waiting."""
        events: list[EngineEvent] = []
        while self._under_way and self._has_ended(self._under_way[0]):
            if events:  # what is done about them counts before the next step's are taken in
                self._listener.step_done(events)
            self._tell_layers()
            events = self._end_step(self._under_way.popleft())
        if not self._closing:
            events += self._scheduler.grant()
        if events:
            self._listener.step_done(events)
        self._tell_layers()
        while len(self._under_way) < self.depth and not self._closing and self._begin_step():
            pass
        self.moved.set()
        if not self._under_way and not self._wake.is_set():
            self._idle.set()

    def _begin_step(self) -> bool:
        """Begin one more step; False if there is nothing to run."""
        plan = self._scheduler.plan()
        if plan is None:
            return False
        # Prompts that the plan has started may have been all that reservations waited behind.
        self._wake.set()
        loop = asyncio.get_running_loop()
        try:
            ends = tuple(self._listener.step_started(plan))
        except BaseException:
            self._scheduler.fail_step(plan)  # it never runs
            raise
        watch = LayerWatch(
            ends, lambda layers: loop.call_soon_threadsafe(self._layers_done, plan, layers)
        )
        future = loop.run_in_executor(
            self._thread, self._runner.execute, plan, watch if ends else None
        )
        future.add_done_callback(lambda _: self._wake.set())
        self._under_way.append(_Step(plan, future, self._clock()))
        return True

    def _has_ended(self, step: _Step) -> bool:
        future = step.future
        if future.done() and future.exception() is None and isinstance(future.result(), Future):
            step.future = asyncio.wrap_future(future.result())  # the other stages
            step.future.add_done_callback(lambda _: self._wake.set())
        return step.future.done()

    def _layers_done(self, plan: StepPlan, layers: int) -> None:
        # Called before the step's own end: the event loop keeps the order of what threads tell it.
        steps = [step for step in self._under_way if step.plan is plan]
        assert steps, "layers of an ended step"
        steps[0].layers.append(layers)
        self._tell_layers()

    def _tell_layers(self) -> None:
        """Tell of the oldest step's layers: a later one's wait until what came of it is told."""
        while self._under_way and self._under_way[0].layers:
            step = self._under_way[0]
            self._listener.layers_done(step.plan, step.layers.popleft())

    def _end_step(self, step: _Step) -> list[EngineEvent]:
        began, self._last_end = max(step.started, self._last_end), self._clock()
        seconds = self._last_end - began
        self._steps += 1
        self._busy_s += seconds
        error = step.future.exception()
        if error is None:
            result: StepResult = step.future.result()
            unsound = self._scheduler.fail_unsound(result)
            events = self._scheduler.apply(result)
            self._listener.step_ran(step.plan, seconds)
            if unsound:
                what = f"step {step.plan.step}: the model's logits are not finite"
                self._listener.step_failed(unsound, InternalError(what))
            for seq_id, why in result.failed.items():
                self._listener.step_failed([seq_id], why)
            return events
        self._failed_steps += 1
        seq_ids = self._scheduler.fail_step(step.plan)
        if not isinstance(error, Exception):
            raise error
        self._listener.step_failed(seq_ids, error)
        return []

    async def _abandon_steps(self) -> None:
        """Wait for steps that were under way when `run` was cancelled or a callback raised.

        Nobody hears of them: their sequences just end.
        """
        while self._under_way:
            step = self._under_way[0]
            await asyncio.gather(step.future, return_exceptions=True)
            if self._has_ended(step):
                self._scheduler.fail_step(step.plan)
                self._under_way.popleft()
