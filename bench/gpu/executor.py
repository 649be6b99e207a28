"""The executor for GPUs as the stages drive it: drawn weights, a pool, and plans for its runner."""

import itertools
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.core.ids import BlockId, SeqId
from baton.core.request import SamplingParams
from baton.engine.step import PENDING, ScheduledSequence, StepPlan, StepResult
from baton.executor.cuda_queue import CudaQueue
from baton.executor.gpu_pass import GpuLimits, GpuPass
from baton.executor.gpu_queue import EagerQueue, GpuQueue
from baton.executor.gpu_runner import GpuRunner
from baton.executor.kv_cache import KVCache
from baton.models.decoder import Decoder
from bench.gpu.baton_model import BLOCK_SIZE

DEPTH = 2
"""Steps under way at once: one runs while the next is planned."""
_GREEDY = SamplingParams(temperature=0.0)
_SPARE_BYTES = 6 << 30
"""Left free of KV for activations, logits and what graphs keep."""


@dataclass(frozen=True, slots=True)
class Running:
    """One sequence, as a plan has it."""

    seq_id: SeqId
    blocks: tuple[BlockId, ...]


def queue_of(device: torch.device) -> GpuQueue:
    """Return the device's queue, or the CPU's, on which everything runs at once."""
    return CudaQueue() if device.type == "cuda" else EagerQueue()


def pool_of(
    model: Decoder, blocks: int, device: torch.device, memory: Tensor | None = None
) -> KVCache:
    """Return a pool of at most so many blocks, as far as memory goes, filled with random KV."""
    layout = model.spec.kv_layout(BLOCK_SIZE, model.dtype)
    if device.type == "cuda" and memory is None:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        blocks = min(blocks, (free - _SPARE_BYTES) // layout.block_bytes)
    pool = KVCache(layout, blocks, str(device), memory=memory)
    for part in torch.split(pool.tensor, 1024):
        part.normal_()
    return pool


class Steps:
    """A runner on a model and a pool, for sequences of at most `tokens` tokens."""

    def __init__(
        self,
        model: Decoder,
        pool: KVCache,
        queue: GpuQueue,
        *,
        rows: int,
        tokens: int,
        step_tokens: int,
    ) -> None:
        """Steps have up to `rows` sequences and `step_tokens` tokens."""
        self._numbers = itertools.count()
        self._ids = itertools.count()
        limits = GpuLimits(
            rows=rows, tokens=step_tokens, blocks=-(-tokens // BLOCK_SIZE), depth=DEPTH
        )
        self.passes = GpuPass(model, pool, queue, limits)
        self.runner = GpuRunner(self.passes, queue, pool, None, depth=DEPTH)

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.close()

    def capture(self, rows: int) -> None:
        """Capture decodes of so many rows."""
        self.passes.capture([rows], lambda _: None)

    def sequence(self, blocks: Sequence[int]) -> Running:
        """Return a new sequence with these blocks."""
        return Running(SeqId(next(self._ids)), tuple(map(BlockId, blocks)))

    def prefill(self, prompts: Sequence[tuple[Running, Sequence[int]]], most: int) -> list[int]:
        """Compute prompts, one after the other, in chunks of at most `most` tokens.

        Returns their first tokens. Chunks are launched one ahead.
        """
        results = []
        for sequence, prompt in prompts:
            for start in range(0, len(prompt), most):
                chunk = tuple(prompt[start : start + most])
                last = start + len(chunk) == len(prompt)
                part = scheduled(sequence, chunk, start, samples=last)
                future = self.runner.execute(StepPlan(next(self._numbers), (part,)))
                if last:
                    results.append((sequence, future))
        return [future.result().tokens[sequence.seq_id] for sequence, future in results]

    def decode(
        self,
        sequences: Sequence[Running],
        firsts: Sequence[int],
        starts: Sequence[int],
        steps: int,
    ) -> list[list[int]]:
        """Decode `steps` tokens of each sequence, of which `starts` tokens are in the pool.

        A step is launched when the one before the last is known, as the engine loop does.
        """
        found: list[list[int]] = [[] for _ in sequences]
        waiting: list[Future[StepResult]] = []
        for step in range(steps):
            tokens = firsts if step == 0 else [PENDING] * len(sequences)
            parts = tuple(
                scheduled(sequence, (token,), start + step, samples=True)
                for sequence, token, start in zip(sequences, tokens, starts, strict=True)
            )
            waiting.append(self.runner.execute(StepPlan(next(self._numbers), parts)))
            if len(waiting) == DEPTH:
                _take(waiting.pop(0).result().tokens, sequences, found)
        for future in waiting:
            _take(future.result().tokens, sequences, found)
        return found


def _take(tokens: dict[SeqId, int], sequences: Sequence[Running], found: list[list[int]]) -> None:
    for sequence, own in zip(sequences, found, strict=True):
        own.append(tokens[sequence.seq_id])


def scheduled(
    sequence: Running, tokens: tuple[int, ...], start: int, *, samples: bool
) -> ScheduledSequence:
    return ScheduledSequence(
        sequence.seq_id, tokens, start, sequence.blocks, samples=samples, sampling=_GREEDY
    )


def tables_of(sequences: int, tokens: int, blocks: int) -> tuple[list[list[int]], bool]:
    """Return block tables of sequences in shuffled blocks, and whether each has blocks of its own.

    Where the pool has too few, sequences share all blocks but their last: what is in them is then
    nobody's, which only timings may disregard.
    """
    each = -(-tokens // BLOCK_SIZE)
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).tolist()
    if sequences * each <= blocks:
        return [order[i * each : (i + 1) * each] for i in range(sequences)], True
    lasts, shared = order[:sequences], order[sequences:]
    assert len(shared) >= each, f"{blocks} blocks are too few for one sequence of {tokens} tokens"
    tables = []
    for i in range(sequences):
        begin = i * (each - 1) % (len(shared) - each + 1)
        tables.append([*shared[begin : begin + each - 1], lasts[i]])
    return tables, False
