"""Runs step plans on a device, one step ahead of what the host knows.

    model thread    launch n    launch n+1          launch n+2             and no waiting in between
    device          ── n ──────────────│── n+1 ────────────│── n+2 ──
    reading thread             … wait for n: tokens …  wait for n+1: tokens …
    event loop                         apply n, plan n+2        apply n+1, plan n+3

Sequences with a grammar, and those whose sampling the device has no room for (gpu_options.py), are
sampled on the host, by executor/sampler.py. A step that has any waits for their logits there, and
the next step is not launched before. What grammars allow is found out while the device computes.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from baton.core.errors import DeadlineExceeded
from baton.core.ids import SeqId
from baton.core.request import TokenLogprobs
from baton.engine.step import LayerWatch, ScheduledSequence, StepPlan, StepResult
from baton.executor.batch import SampledRow
from baton.executor.gpu_logprobs import told_logprobs
from baton.executor.gpu_pass import GpuPass, Launched
from baton.executor.gpu_queue import GpuQueue
from baton.executor.grammar_masks import GrammarMasks, StepMasks
from baton.executor.kv_cache import KVCache, copy_blocks
from baton.executor.last_tokens import LastTokens
from baton.executor.runner import RunnerStats
from baton.executor.sampler import Sampler

if TYPE_CHECKING:  # at run time only who has a grammar needs its library
    from baton.models.grammar import GrammarCompiler


class GpuRunner:
    """Implements the engine loop's Runner; `close` it."""

    def __init__(
        self,
        steps: GpuPass,
        queue: GpuQueue,
        kv: KVCache,
        host: KVCache | None,
        *,
        depth: int,
        limit_s: float = 60.0,
        compiler: "Callable[[], GrammarCompiler] | None" = None,
    ) -> None:
        """`host` has the KV of preempted sequences; without it no plan may copy.

        `depth` is how many steps may be under way at once, and `limit_s` how long one may take that
        is waited for; `compiler` is asked once there is a grammar.
        """
        self._pass = steps
        self._queue = queue
        self._kv = kv
        self._host = host
        self._limit_s = limit_s
        self._stats = RunnerStats(0, 0, 0, 0.0)
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step results")
        # The rest is the reading thread's.
        self._sampler = Sampler(depth)
        self._grammars = None if compiler is None else GrammarMasks(compiler, depth)
        self._last = LastTokens(depth)
        self._failed: deque[frozenset[SeqId]] = deque(maxlen=depth - 1)
        """Who has failed in each of the last steps."""

    def __repr__(self) -> str:
        return f"<GpuRunner {self._pass}, {self._stats.steps} steps>"

    def stats(self) -> RunnerStats:
        """Return what was launched so far; `busy_s` is the host's time."""
        return self._stats

    def execute(self, plan: StepPlan, watch: LayerWatch | None = None) -> Future[StepResult]:
        """Launch a step; its result comes later.

        Sequences whose logits are not finite are `unsound` in it. They, and all that were in a step
        that failed, have ended: the results of steps that were planned before that was known are
        without them. Raises DeadlineExceeded if the host is to sample, and cannot within `limit_s`.
        """
        began = time.perf_counter()
        try:
            self._swap(plan)
            launched = self._pass.launch(plan.sequences, watch)
            future = self._reader.submit(self._read, plan, launched)
            if launched.on_host:
                self._wait_for_host(launched, future)
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

    def _wait_for_host(self, launched: Launched, future: Future[StepResult]) -> None:
        """Wait for the tokens that the host samples, and give them to the device."""
        try:
            error = future.exception(self._limit_s)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the device has not computed a step within {self._limit_s:g} s"
            ) from None
        if error is None:
            tokens = future.result().tokens
            rows = (launched.sampled[row] for row in launched.on_host)
            sampled = [s for s in rows if s.seq_id in tokens]
            self._pass.take_tokens(sampled, [tokens[s.seq_id] for s in sampled])

    # In the reading thread, step after step

    def _read(self, plan: StepPlan, launched: Launched) -> StepResult:
        """Wait for a step, and return its tokens."""
        known = self._last.known(plan).sequences if launched.on_host else ()
        masks = None if self._grammars is None else self._grammars.begin(known)
        launched.done.wait()
        lost = self._lost()
        kept = [row for row, s in enumerate(launched.sampled) if s.seq_id not in lost]
        found = launched.found
        unsound = tuple(launched.sampled[row].seq_id for row in kept if not found[1, row])
        kept = [row for row in kept if found[1, row]]
        ids = [launched.sampled[row].seq_id for row in kept]
        tokens = dict(zip(ids, found[0, kept].tolist(), strict=True))
        logprobs = told_logprobs(found, [(row, launched.sampled[row]) for row in kept])
        allowed = StepMasks() if masks is None else masks.result()
        if launched.on_host:
            on_host = [row for row in launched.on_host if launched.sampled[row].seq_id in tokens]
            its, its_logprobs = self._sampled_here(known, launched, on_host, allowed)
            tokens |= its
            logprobs |= its_logprobs
        return self._told(plan, StepResult(plan.step, tokens, logprobs, unsound, allowed.failed))

    def _sampled_here(
        self,
        planned: Sequence[ScheduledSequence],
        launched: Launched,
        on_host: Sequence[int],
        allowed: StepMasks,
    ) -> tuple[dict[SeqId, int], dict[SeqId, TokenLogprobs]]:
        """Sample rows of a step on the host."""
        (logits,) = launched.logits
        known = {s.seq_id: s for s in planned}
        sequences = [known[launched.sampled[row].seq_id] for row in on_host]
        rows = [SampledRow(s.seq_id, s.end, s.sampling, s.tokens, s.context) for s in sequences]
        places = [launched.on_host.index(row) for row in on_host]
        tokens, logprobs = self._sampler.step(logits[places], rows, allowed.masks)
        return {s.seq_id: t for s, t in zip(sequences, tokens, strict=True)}, logprobs

    def _lost(self) -> frozenset[SeqId]:
        """Return who has ended by failing, and may be in steps that follow."""
        return frozenset[SeqId]().union(*self._failed)

    def _lose(self, plan: StepPlan) -> None:
        self._failed.append(frozenset(s.seq_id for s in plan.sequences))

    def _told(self, plan: StepPlan, result: StepResult) -> StepResult:
        self._failed.append(frozenset(result.unsound))
        self._last.take(plan, result)
        return result
