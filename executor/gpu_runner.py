"""Runs step plans on a device, one step ahead of what the host knows.

    model thread    launch n    launch n+1          launch n+2             and no waiting in between
    device          ── n ──────────────│── n+1 ────────────│── n+2 ──
    reading thread             … wait for n: tokens …  wait for n+1: tokens …
    event loop                         apply n, plan n+2        apply n+1, plan n+3

Sequences whose sampling the device cannot do (penalties, biases, log-probabilities, typical-p) are
sampled on the host, by executor/sampler.py. A step that has any waits for its logits there, all its
rows are sampled there, and the next step is not launched before.
"""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from baton.core.errors import InternalError
from baton.core.ids import SeqId
from baton.engine.step import LayerWatch, StepPlan, StepResult
from baton.executor.batch import SampledRow
from baton.executor.device_sampler import serves
from baton.executor.gpu_pass import GpuPass, Launched
from baton.executor.gpu_queue import GpuQueue
from baton.executor.kv_cache import KVCache, copy_blocks
from baton.executor.last_tokens import LastTokens
from baton.executor.runner import RunnerStats
from baton.executor.sampler import Sampler


class GpuRunner:
    """Implements the engine loop's Runner; `close` it."""

    def __init__(
        self, steps: GpuPass, queue: GpuQueue, kv: KVCache, host: KVCache | None, *, depth: int
    ) -> None:
        """`host` has the KV of preempted sequences; without it no plan may copy.

        `depth` is how many steps may be under way at once.
        """
        self._pass = steps
        self._queue = queue
        self._kv = kv
        self._host = host
        self._stats = RunnerStats(0, 0, 0, 0.0)
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step results")
        # The rest is the reading thread's.
        self._sampler = Sampler(depth)
        self._last = LastTokens(depth)
        self._failed: deque[frozenset[SeqId]] = deque(maxlen=depth - 1)
        """Who was in the last steps, of each that failed."""

    def __repr__(self) -> str:
        return f"<GpuRunner {self._pass}, {self._stats.steps} steps>"

    def stats(self) -> RunnerStats:
        """Return what was launched so far; `busy_s` is the host's time."""
        return self._stats

    def execute(self, plan: StepPlan, watch: LayerWatch | None = None) -> Future[StepResult]:
        """Launch a step; its result comes later.

        It is an InternalError if logits are not finite. Sequences that were in a step that failed
        have ended: the results of steps that were planned before that was known are without them.
        """
        began = time.perf_counter()
        try:
            self._swap(plan)
            if all(serves(s.sampling) for s in plan.sequences if s.samples):
                launched = self._pass.launch(plan.sequences, watch)
                future = self._reader.submit(self._read, plan, launched)
            else:
                future = self._sampled_on_host(plan, watch)
        except BaseException:
            self._reader.submit(self._lose, plan)
            raise
        done = self._stats
        self._stats = RunnerStats(
            steps=done.steps + 1,
            tokens=done.tokens + plan.num_tokens,
            sampled=done.sampled + sum(s.samples for s in plan.sequences),
            busy_s=done.busy_s + time.perf_counter() - began,
        )
        return future

    def close(self) -> None:
        """End the reading thread, after what was launched, and let go of captured steps."""
        self._reader.shutdown()
        self._pass.close()

    def _swap(self, plan: StepPlan) -> None:
        if not (plan.swap_out or plan.swap_in):
            return
        kv, host = self._kv, self._host
        assert host is not None, "no pool to copy blocks to"

        def copy() -> None:
            copy_blocks(kv, host, [(c.device, c.host) for c in plan.swap_out])
            copy_blocks(host, kv, [(c.host, c.device) for c in plan.swap_in])

        self._queue.launch(copy)

    def _sampled_on_host(self, plan: StepPlan, watch: LayerWatch | None) -> Future[StepResult]:
        """Run a step up to its logits, wait for its tokens, and give them to the device."""
        launched = self._pass.launch(plan.sequences, watch, sample=False)
        future = self._reader.submit(self._sample, plan, launched)
        if future.exception() is None:
            tokens = future.result().tokens
            sampled = [s for s in plan.sequences if s.seq_id in tokens]
            self._pass.take_tokens(sampled, [tokens[s.seq_id] for s in sampled])
        return future

    # In the reading thread, step after step

    def _read(self, plan: StepPlan, launched: Launched) -> StepResult:
        """Wait for a step, and return its tokens."""
        launched.done.wait()
        lost = self._lost()
        tokens, sound = launched.found.tolist()
        rows = [
            (s.seq_id, token, fine)
            for s, token, fine in zip(launched.sampled, tokens, sound, strict=True)
            if s.samples and s.seq_id not in lost
        ]
        self._expect_sound(plan, all(fine for _, _, fine in rows))
        return self._told(plan, StepResult(plan.step, {seq_id: token for seq_id, token, _ in rows}))

    def _sample(self, plan: StepPlan, launched: Launched) -> StepResult:
        """Wait for a step's logits, and sample."""
        launched.done.wait()
        (logits,) = launched.logits
        known = {s.seq_id: s for s in self._last.known(plan).sequences}
        lost = self._lost()
        kept = [
            (row, known[s.seq_id])
            for row, s in enumerate(launched.sampled)
            if s.samples and s.seq_id in known and s.seq_id not in lost
        ]
        logits = logits[[row for row, _ in kept]]
        self._expect_sound(plan, bool(torch.isfinite(logits.sum())))
        rows = [SampledRow(s.seq_id, s.end, s.sampling, s.tokens, s.context) for _, s in kept]
        tokens, logprobs = self._sampler.step(logits, rows)
        found = {s.seq_id: token for (_, s), token in zip(kept, tokens, strict=True)}
        return self._told(plan, StepResult(plan.step, found, logprobs))

    def _lost(self) -> frozenset[SeqId]:
        """Return who has ended with a step that failed, and may be in steps that follow."""
        return frozenset[SeqId]().union(*self._failed)

    def _expect_sound(self, plan: StepPlan, sound: bool) -> None:
        if not sound:
            self._lose(plan)
            raise InternalError(f"step {plan.step}: the model's logits are not finite")

    def _lose(self, plan: StepPlan) -> None:
        self._failed.append(frozenset(s.seq_id for s in plan.sequences))

    def _told(self, plan: StepPlan, result: StepResult) -> StepResult:
        self._failed.append(frozenset())
        self._last.take(plan, result)
        return result
