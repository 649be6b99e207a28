"""Runs this rank's share of step plans: copies between pools, the forward pass, sampling."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from baton.core.ids import SeqId
from baton.engine.step import LayerWatch, StepPlan, StepResult
from baton.executor.batch import SampledRow
from baton.executor.compute_device import current_device
from baton.executor.expert_balance import ExpertBalancer
from baton.executor.grammar_masks import GrammarMasks, StepMasks
from baton.executor.kv_cache import KVCache, copy_blocks
from baton.executor.last_tokens import LastTokens
from baton.executor.native_pass import NativePass
from baton.executor.own_part import own_part
from baton.executor.sampler import Sampler
from baton.executor.sharded_sampler import ShardedSampler
from baton.executor.torch_pass import TorchPass
from baton.models.loader import Model
from baton.models.native import NativeDecoder
from baton.models.share import Share

if TYPE_CHECKING:  # at run time only who has a grammar needs its library
    from baton.models.grammar import GrammarCompiler


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
    """One rank's share of a model, and its KV pool; one thread at a time calls it, and it blocks.

    All ranks of an instance compute the same plans in the same order.
    """

    def __init__(
        self,
        model: Model,
        kv: KVCache,
        host: KVCache | None = None,
        *,
        depth: int = 1,
        balancer: ExpertBalancer | None = None,
        compiler: "Callable[[], GrammarCompiler] | None" = None,
    ) -> None:
        """`host` has the KV of preempted sequences; without it no plan may copy.

        `depth` is how many steps may be under way at once, perhaps of the same sequences;
        `balancer` hears of every step; `compiler` is asked once there is a grammar.
        """
        native = isinstance(model, NativeDecoder)
        self._share = Share() if isinstance(model, NativeDecoder) else model.share
        kv_dtype = model.dtype if native else kv.layout.dtype
        expected = self._share.kv(model.spec, kv.layout.block_size, kv_dtype).layout
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
        tp, vocabulary = self._share.ranks.tp, model.spec.vocab_size
        self._balancer = balancer
        self._sampler: Sampler | ShardedSampler = Sampler(depth)
        if tp.size > 1:
            self._sampler = ShardedSampler(tp, vocabulary, depth)
        self._grammars: GrammarMasks | None = None
        if compiler is not None and self._share.last:
            self._grammars = GrammarMasks(compiler, depth)
        self._last = LastTokens(depth)
        self._thread: int | None = None
        self._stats = RunnerStats(0, 0, 0, 0.0)

    def __repr__(self) -> str:
        return f"<ModelRunner {self._model} {self._kv}, {self._stats.steps} steps>"

    def stats(self) -> RunnerStats:
        """Return what was done so far."""
        return self._stats

    def execute(self, plan: StepPlan, watch: LayerWatch | None = None) -> StepResult:
        """Compute a step on an instance of one rank; see `compute`."""
        result = self.compute(plan, watch)
        assert result is not None, "the last stage has the result, not this one"
        return result

    @torch.inference_mode()
    def compute(self, plan: StepPlan, watch: LayerWatch | None = None) -> StepResult | None:
        """Compute the plan's KV and sample the next token of each sequence that samples.

        Ranks of the last stage return the result, the same on each; others return None.

        `watch` is told of layers as their KV is written, from this thread.

        Sequences whose logits are not finite are `unsound` in it: no token would be right.
        """
        with current_device(self._kv.tensor.device):
            return self._computed(plan, watch)

    def _computed(self, plan: StepPlan, watch: LayerWatch | None) -> StepResult | None:
        began = time.perf_counter()
        self._use_threads()
        ranks = self._share.ranks
        if ranks.places > 1:
            host_blocks = 0 if self._host is None else self._host.num_blocks
            plan = own_part(plan, ranks.place, self._kv.num_blocks, host_blocks)
        plan = self._last.known(plan)
        masks = None if self._grammars is None else self._grammars.begin(plan.sequences)
        assert self._host is not None or not plan.swap_out, "no pool to copy blocks to"
        if self._host is not None:
            copy_blocks(self._kv, self._host, [(c.device, c.host) for c in plan.swap_out])
            copy_blocks(self._host, self._kv, [(c.host, c.device) for c in plan.swap_in])
        computed: tuple[Tensor, tuple[SampledRow, ...]] | None = torch.empty(0, 0), ()
        if plan.sequences or ranks.ep.size > 1:
            computed = self._pass.compute(plan, watch)
        result = None
        if computed is not None:
            allowed = StepMasks() if masks is None else masks.result()
            result = self._sampled(plan.step, *computed, allowed)
            self._last.take(plan, result)
        if self._balancer is not None:
            self._balancer.after(plan.step)
        done = self._stats
        self._stats = RunnerStats(
            steps=done.steps + 1,
            tokens=done.tokens + plan.num_tokens,
            sampled=done.sampled + (len(result.tokens) if result is not None else 0),
            busy_s=done.busy_s + time.perf_counter() - began,
        )
        return result

    def _sampled(
        self, step: int, logits: Tensor, rows: tuple[SampledRow, ...], allowed: StepMasks
    ) -> StepResult:
        unsound: tuple[SeqId, ...] = ()
        if rows and not all(sound := self._finite(logits)):
            unsound = tuple(r.seq_id for r, well in zip(rows, sound, strict=True) if not well)
            rows = tuple(r for r, well in zip(rows, sound, strict=True) if well)
            logits = logits[torch.tensor(sound)]
        tokens, logprobs = self._sampler.step(logits, rows, allowed.masks)
        sampled = {r.seq_id: t for r, t in zip(rows, tokens, strict=True)}
        return StepResult(step, sampled, logprobs, unsound, allowed.failed)

    def _finite(self, logits: Tensor) -> list[bool]:
        """Return whose logits are finite on all ranks of the stage; it is the same on each."""
        totals = logits.sum(-1)
        if self._share.ranks.tp.size > 1:
            self._share.ranks.tp.all_reduce_(totals)
        return torch.isfinite(totals).tolist()

    def _use_threads(self) -> None:
        """Set the thread count where it counts: OpenMP keeps one per calling thread."""
        if self._thread != threading.get_ident():
            torch.set_num_threads(self._model.threads)
            self._thread = threading.get_ident()
