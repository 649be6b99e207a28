"""The same steps through `forward` and `forward_device`, on pools of their own.

Three sequences in blocks of 8: two prompts are computed whole and one in chunks, beside decodes
and beside padding; then all decode.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from baton.core.ids import BlockId, SeqId
from baton.core.request import SamplingParams
from baton.engine.step import ScheduledSequence, StepPlan
from baton.executor.batch import make_batch
from baton.executor.kv_cache import KVCache
from baton.kernels.attention import Workspace
from baton.kernels.backend import Backend, using_backend
from baton.kernels.kv_pool import paged_layers
from baton.kernels.paged_batch import PagedBatch
from baton.models.blocks.device_step import DeviceStep
from baton.models.decoder import Decoder
from baton.models.spec import read_spec
from baton.models.weights import Checkpoint

BLOCK = 8
WIDTH = 3
"""Blocks of a table."""
SEQUENCES = 3

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
FAMILIES = {
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma 2": (
        "gemma2",
        {
            "head_dim": 40,
            "sliding_window": 7,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 0.5,
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 32,
            "sliding_window": 6,
            "swiglu_limit": 1.1,
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "deepseek-v2": (
        "deepseek_v2",
        LATENT
        | {
            "q_lora_rank": None,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
        },
    ),
    "deepseek-v3": ("deepseek_v3", LATENT | {"q_lora_rank": 32, "n_group": 4, "topk_group": 2}),
}


class Twice:
    """A model, and what it has computed of the sequences either way."""

    def __init__(self, model: Decoder, reference: Decoder) -> None:
        self._model, self._reference = model, reference
        layout = model.share.kv(model.spec, BLOCK, model.dtype).layout
        count = WIDTH * SEQUENCES + 1
        self._host = KVCache(layout, count)
        self._device = KVCache(layout, count, model.device)
        # What no token fills may be anything to the paged kernels.
        self._device.tensor.fill_(float("nan"))
        random = torch.Generator().manual_seed(3)
        order = torch.randperm(count, generator=random).tolist()
        self._blocks = [order[i * WIDTH : (i + 1) * WIDTH] for i in range(SEQUENCES)]
        vocabulary = model.spec.vocab_size
        self._tokens = torch.randint(vocabulary, (SEQUENCES, 64), generator=random).tolist()

    def step(self, parts: Sequence[tuple[int, int, int]], padding: int) -> tuple[Tensor, Tensor]:
        """Compute (sequence, start, end) of each part, decodes first; return logits both ways.

        So many rows of padding stand among decodes and after chunks. The logits are of each part's
        last token, those of `forward` first.
        """
        plan = StepPlan(0, tuple(self._scheduled(*part) for part in parts))
        batch = make_batch(plan, self._host.layout, windows=self._model.spec.windows)
        with using_backend(Backend.TORCH):
            expected = self._reference.forward(batch.model, self._host.layers, Workspace())
        of = {row.seq_id: logits for row, logits in zip(batch.sampled, expected, strict=True)}
        step = on_device(self.device_step(parts, padding), self._model.device)
        found = self.run(step)
        if step.sampled is None:
            found = found[: len(parts)]
        return torch.stack([of[SeqId(part[0])] for part in parts]), found.cpu()

    def run(self, step: DeviceStep) -> Tensor:
        """Return the logits of a step on the model's device."""
        return self._model.forward_device(step, paged_layers(self._device.tensor))

    def _scheduled(self, sequence: int, start: int, end: int) -> ScheduledSequence:
        blocks = tuple(BlockId(b) for b in self._blocks[sequence][: -(-end // BLOCK)])
        tokens = tuple(self._tokens[sequence][start:end])
        sampling = SamplingParams(temperature=0.0)
        return ScheduledSequence(SeqId(sequence), tokens, start, blocks, True, sampling)

    def device_step(self, parts: Sequence[tuple[int, int, int]], padding: int) -> DeviceStep:
        """Return the step as `step` gives it to the device, still on the host."""
        decodes = [part for part in parts if part[2] - part[1] == 1]
        chunks = [part for part in parts if part[2] - part[1] > 1]
        assert [*decodes, *chunks] == list(parts)
        sizes = [end - start for _, start, end in chunks]
        width = len(decodes) + padding
        after = padding if chunks else 0
        rows = width + sum(sizes) + after
        tokens, positions, slots = torch.zeros(3, rows, dtype=torch.int64)
        slots.fill_(-1)
        places = [*range(len(decodes)), *range(width, width + sum(sizes))]
        flat = [(seq, at) for seq, start, end in parts for at in range(start, end)]
        for row, (sequence, at) in zip(places, flat, strict=True):
            tokens[row], positions[row] = self._tokens[sequence][at], at
            slots[row] = self._blocks[sequence][at // BLOCK] * BLOCK + at % BLOCK
        none = [(0, 0, 0)] * padding
        listed = [*decodes, *none, *chunks, *(none if chunks else [])]
        ends = torch.tensor(sizes + [0] * after).cumsum(0)
        batch = PagedBatch(
            torch.tensor([self._blocks[seq] for seq, _, _ in listed], dtype=torch.int32),
            torch.tensor([end for _, _, end in listed], dtype=torch.int32),
            width,
            torch.tensor([0, *ends.tolist()], dtype=torch.int32) if chunks else None,
            tuple((end - start, end) for _, start, end in chunks) + ((0, 0),) * after,
        )
        sampled = None
        if chunks:
            last = [*range(len(decodes)), *(width + ends[: len(chunks)] - 1).tolist()]
            sampled = torch.tensor(last)
        return DeviceStep(tokens, positions, slots, batch, sampled)


def on_device(step: DeviceStep, device: torch.device) -> DeviceStep:
    """Return the step with its tensors on a device."""
    batch = step.batch
    return DeviceStep(
        step.tokens.to(device),
        step.positions.to(device),
        step.slots.to(device),
        replace(
            batch,
            tables=batch.tables.to(device),
            lengths=batch.lengths.to(device),
            starts=None if batch.starts is None else batch.starts.to(device),
        ),
        None if step.sampled is None else step.sampled.to(device),
    )


STEPS = (
    ([(0, 0, 8), (1, 0, 3), (2, 0, 9)], 0),
    ([(0, 8, 9), (1, 3, 4), (2, 9, 20)], 2),
    ([(2, 20, 21), (0, 9, 10), (1, 4, 5)], 1),
)
"""Parts and padding of each."""


def loaded_twice(folder: Path, backend: Backend, device: str = "cpu") -> Twice:
    """Return a model on `device`, computed by a backend, and the same on the host."""
    models = []
    for computes, where in ((backend, device), (Backend.TORCH, "cpu")):
        with using_backend(computes):
            checkpoint, spec = Checkpoint(folder, torch.float32, where), read_spec(folder)
            models.append(Decoder(spec, checkpoint, dtype="float32", threads=1))
    return Twice(*models)


def worst_gap(folder: Path, backend: Backend, device: str = "cpu") -> float:
    """Return the largest |found - expected| / |expected| of the logits of all steps.

    They are those of `forward_device` by a backend and of `forward` by torch on the host.
    """
    twice = loaded_twice(folder, backend, device)
    gaps = []
    for parts, padding in STEPS:
        with using_backend(backend):
            expected, found = twice.step(parts, padding)
        gaps.append(float((found - expected).norm() / expected.norm()))
    assert all(gap == gap for gap in gaps), gaps
    return max(gaps)
