"""Runs step plans: copies between pools, the forward pass, sampling."""

import threading
import time
from dataclasses import dataclass

import torch

from baton.core.errors import InternalError
from baton.engine.step import LayerWatch, StepPlan, StepResult
from baton.executor.kv_cache import KVCache, copy_blocks, make_layout
from baton.executor.native_pass import NativePass
from baton.executor.sampler import Sampler
from baton.executor.torch_pass import TorchPass
from baton.models.loader import Model
from baton.models.native import NativeDecoder


@dataclass(frozen=True, slots=True)
class RunnerStats:
    """What a runner has done since it was made."""

    steps: int
    tokens: int
    """Whose KV was computed."""
    sampled: int
    busy_s: float
    """Seconds inside `execute`."""


class ModelRunner:
    """One model and one KV pool; `execute` blocks and is called by one thread at a time."""

    def __init__(self, model: Model, kv: KVCache, host: KVCache | None = None) -> None:
        """`host` has the KV of preempted sequences; without it no plan may copy."""
        native = isinstance(model, NativeDecoder)
        kv_dtype = model.dtype if native else kv.layout.dtype
        expected = make_layout(model.spec, kv.layout.block_size, kv_dtype)
        assert kv.layout == expected, f"{kv.layout} is not {expected}"
        assert host is None or host.layout == expected, f"{host} is not of {expected}"
        self._model = model
        self._kv = kv
        self._host = host
        self._pass: NativePass | TorchPass
        if isinstance(model, NativeDecoder):
            self._pass = NativePass(model, kv)
        else:
            self._pass = TorchPass(model, kv)
        self._sampler = Sampler()
        self._thread: int | None = None
        self._stats = RunnerStats(0, 0, 0, 0.0)

    def __repr__(self) -> str:
        return f"<ModelRunner {self._model} {self._kv}, {self._stats.steps} steps>"

    def stats(self) -> RunnerStats:
        """Return what was done so far."""
        return self._stats

    @torch.inference_mode()
    def execute(self, plan: StepPlan, watch: LayerWatch | None = None) -> StepResult:
        """Compute the plan's KV and sample the next token of each sequence that samples.

        `watch` is told of layers as their KV is written, from this thread.

        Raises InternalError if the logits are not finite: no token would be right.
        """
        began = time.perf_counter()
        self._use_threads()
        assert self._host is not None or not plan.swap_out, "no pool to copy blocks to"
        if self._host is not None:
            copy_blocks(self._kv, self._host, [(c.device, c.host) for c in plan.swap_out])
            copy_blocks(self._host, self._kv, [(c.host, c.device) for c in plan.swap_in])
        logits, rows = self._pass.compute(plan, watch)
        if rows and not torch.isfinite(logits.sum()):
            raise InternalError(f"step {plan.step}: the model's logits are not finite")
        tokens, logprobs = self._sampler.step(logits, rows)
        done = self._stats
        self._stats = RunnerStats(
            steps=done.steps + 1,
            tokens=done.tokens + plan.num_tokens,
            sampled=done.sampled + len(tokens),
            busy_s=done.busy_s + time.perf_counter() - began,
        )
        sampled = {r.seq_id: t for r, t in zip(rows, tokens, strict=True)}
        return StepResult(plan.step, sampled, logprobs)

    def _use_threads(self) -> None:
        """Set the thread count where it counts: OpenMP keeps one per calling thread."""
        if self._thread != threading.get_ident():
            torch.set_num_threads(self._model.threads)
            self._thread = threading.get_ident()
