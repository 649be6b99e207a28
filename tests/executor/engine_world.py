"""A whole engine around a runner: requests in, their outputs out; for tests of executors."""

import asyncio
from collections.abc import Callable, Mapping, Sequence

from baton.core.config import EngineConfig
from baton.core.ids import RequestId, SeqId
from baton.core.request import GenerateRequest, SamplingParams, TokenLogprobs
from baton.engine.scheduler import Scheduler
from baton.engine.step import EngineEvent, StepPlan, TokenSampled
from baton.executor.engine_loop import EngineLoop, Runner
from baton.executor.kv_cache import KVCache, make_layout
from baton.models.loader import Model

LIMIT_S = 120.0


class EngineWorld:
    """Serves requests with one engine; a listener that remembers."""

    def __init__(
        self,
        model: Model,
        make_runner: Callable[[KVCache], Runner],
        *,
        num_blocks: int,
        depth: int,
        ahead: bool,
        **config: int | bool,
    ) -> None:
        self.config = EngineConfig(**config)
        layout = make_layout(model.spec, self.config.block_size, model.dtype)
        self.runner = make_runner(KVCache(layout, num_blocks))
        self.scheduler = Scheduler(self.config, num_blocks, depth=depth, ahead=ahead)
        self.loop = EngineLoop(self.scheduler, self.runner, self, depth=depth)
        self.outputs: dict[SeqId, list[int]] = {}
        self.logprobs: dict[SeqId, list[TokenLogprobs | None]] = {}
        self.steps = 0
        self.most_under_way = 0
        self._open: set[SeqId] = set()
        self._aborts: dict[SeqId, int] = {}
        self._under_way = 0
        self._done = asyncio.Event()
        self._failure: Exception | None = None

    async def serve(
        self, requests: Sequence[GenerateRequest], aborts: Mapping[int, int] | None = None
    ) -> list[list[int]]:
        """Return what each request generates; `aborts` says after how many tokens some end."""
        running = asyncio.create_task(self.loop.run())
        try:
            ids = [self.loop.submit(request) for request in requests]
            self.outputs = {seq_id: [] for seq_id in ids}
            self.logprobs = {seq_id: [] for seq_id in ids}
            self._aborts = {ids[index]: count for index, count in (aborts or {}).items()}
            self._open = set(ids)
            async with asyncio.timeout(LIMIT_S):
                await self._done.wait()
                await self.loop.idle()
        finally:
            await self.loop.close()
            await running
        if self._failure is not None:
            raise self._failure
        self.loop.check()
        pool = self.scheduler.stats().roster.memory.pool
        assert pool.used == 0, f"blocks leaked: {pool}"
        return [self.outputs[seq_id] for seq_id in ids]

    # Listener

    def step_started(self, plan: StepPlan) -> Sequence[int]:
        self.steps += 1
        self._under_way += 1
        self.most_under_way = max(self.most_under_way, self._under_way)
        return ()

    def layers_done(self, plan: StepPlan, layers: int) -> None:
        raise AssertionError("nobody asked for layers")

    def step_ran(self, plan: StepPlan, seconds: float) -> None:
        self._under_way -= 1

    def step_done(self, events: Sequence[EngineEvent]) -> None:
        for event in events:
            if isinstance(event, TokenSampled):
                self.outputs[event.seq_id].append(event.token)
                self.logprobs[event.seq_id].append(event.logprobs)
                ends = len(self.outputs[event.seq_id]) == self._aborts.get(event.seq_id)
                if ends:
                    self.loop.release(event.seq_id)
                if ends or event.finish is not None:
                    self._open.discard(event.seq_id)
        if not self._open:
            self._done.set()

    def step_failed(self, seq_ids: Sequence[SeqId], error: Exception) -> None:
        self._under_way -= 1
        self._failure = error
        self._open.difference_update(seq_ids)
        if not self._open:
            self._done.set()


def request(
    number: int,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: SamplingParams,
    stop: tuple[int, ...] = (),
) -> GenerateRequest:
    """Return a request by its number."""
    return GenerateRequest(RequestId(f"r{number}"), tuple(prompt), max_tokens, sampling, stop)
