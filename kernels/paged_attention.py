"""Attention of a step over a paged pool, by block tables that lie on the device.

Unlike kernels/attention.py, which gathers KV by indices that the host has made, nothing here is
made by the host but shapes: see paged_batch.py. The reference for Triton's kernels is torch's
implementation (paged_reference.py), which reads the device: no CUDA graph can capture it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from baton.kernels import paged_reference
from baton.kernels.attention_scores import Scoring
from baton.kernels.backend import triton_serves
from baton.kernels.kv_pool import PagedLayer
from baton.kernels.paged_batch import PagedBatch

if TYPE_CHECKING:
    from baton.kernels.triton.decode_plan import DecodePlan


class PagedAttention:
    """One step's attention; what is planned for a window serves all its layers."""

    def __init__(self, batch: PagedBatch) -> None:
        self.batch = batch
        self._plans: dict[tuple[int | None, int], DecodePlan] = {}

    def __repr__(self) -> str:
        return f"<PagedAttention {self.batch.decodes} of {len(self.batch.lengths)} decode>"

    def attend(self, q: Tensor, layer: PagedLayer, scoring: Scoring, window: int | None) -> Tensor:
        """Return the attention output [tokens, heads, head_dim] of q of that shape.

        The new tokens' KV must be in the pool. A row sees `window` tokens at most, its own
        included. Rows that are padding give 0.
        """
        if not triton_serves(q):
            return paged_reference.attend(q, layer, self.batch, scoring, window)
        return self._launch(q, layer, scoring, window)

    def attend_latent(self, q: Tensor, layer: PagedLayer, scoring: Scoring, rank: int) -> Tensor:
        """Return what heads see of the latents, [decodes, heads, rank].

        q is [decodes, heads, rank + turned]; the pool has one part and one KV head, whose vectors
        are keys, and in their first `rank` dimensions values.
        """
        if not triton_serves(q):
            decodes = self.batch.only_decodes()
            return paged_reference.attend(q, layer, decodes, scoring, None)[..., :rank]
        return self._launch_latent(q, layer, scoring, rank)

    def _launch(self, q: Tensor, layer: PagedLayer, scoring: Scoring, window: int | None) -> Tensor:
        from baton.kernels.triton.decode_attention import decode_attention, decode_programs
        from baton.kernels.triton.prefill_attention import prefill_attention

        batch, decodes = self.batch, self.batch.decodes
        heads, kv_heads = q.shape[1], layer.values.shape[2]
        # Rows after the last chunk are not written: they may not be NaN, nor look like results.
        new = torch.empty if batch.starts is None else torch.zeros
        out = new(q.shape, dtype=q.dtype, device=q.device)
        if decodes:
            decode_attention(
                q[:decodes],
                layer.values,
                batch.tables[:decodes],
                self._plan(window, decode_programs(heads, kv_heads)),
                scoring,
                layer.scales,
                out=out[:decodes],
            )
        if batch.starts is not None:
            prefill_attention(
                q[decodes:],
                layer.values,
                batch.tables[decodes:],
                batch.starts,
                batch.lengths[decodes:],
                scoring,
                window=window,
                kv_scales=layer.scales,
                skip_below=batch.skip_below,
                out=out[decodes:],
            )
        return out

    def _launch_latent(self, q: Tensor, layer: PagedLayer, scoring: Scoring, rank: int) -> Tensor:
        from baton.kernels.triton.mla_decode import mla_decode, mla_programs

        decodes = self.batch.decodes
        plan = self._plan(None, mla_programs(q.shape[1], layer.values.dtype))
        tables = self.batch.tables[:decodes]
        return mla_decode(q, layer.values, tables, plan, scoring, rank=rank, kv_scales=layer.scales)

    def _plan(self, window: int | None, programs: int) -> "DecodePlan":
        """Return the plan of the decodes for a window and a kernel of `programs` an item."""
        from baton.kernels.triton.decode_plan import plan_decode

        key = window, programs
        if key not in self._plans:
            lengths = self.batch.lengths[: self.batch.decodes]
            self._plans[key] = plan_decode(lengths, programs, window)
        return self._plans[key]
