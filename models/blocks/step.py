"""What layers ask of a step, and a step on the host: its batch, rotations and work space.

Decoder.forward         ModelInput  ──▶ Step        gathers KV (kernels/attention.py)
Decoder.forward_device  DeviceStep  ──▶ DeviceRun   paged kernels (device_step.py)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from baton.kernels.attention import AttentionBatch, Workspace, attend
from baton.kernels.attention_scores import Scoring
from baton.kernels.kv_pool import KVLayer, write_kv
from baton.kernels.rope import RopeAngles, rope_
from baton.models.blocks.norms import HeadNorm, Norm
from baton.models.blocks.ring import Ring, RingBatch
from baton.models.decoder_spec import AttentionSpec, LatentAttentionSpec
from baton.models.rope_spec import RopeSpec
from baton.parallel.token_rows import TokenRows


@dataclass(frozen=True, slots=True)
class GroupedHeads:
    """What a layer's attention does with q, k and v."""

    spec: AttentionSpec
    """Of this rank's heads."""
    scoring: Scoring
    norm: HeadNorm | None
    """Of the heads of q and k."""


@dataclass(frozen=True, slots=True)
class LatentHeads:
    """What a layer's latent attention does with queries and latents."""

    spec: LatentAttentionSpec
    """Of this rank's heads."""
    scoring: Scoring
    norm: Norm
    """Of latents."""
    key: Tensor
    """[heads, nope_dim, kv_rank]"""
    value: Tensor
    """[heads, kv_rank, value_dim]"""


KV = TypeVar("KV", contravariant=True)


class StepUnderWay(Protocol[KV]):
    """A step, as layers see it; KV is how it sees a layer of the pool."""

    @property
    def rows(self) -> TokenRows:
        """Which rows of the stream this rank has."""
        ...

    def attend(self, heads: Tensor, kv: KV, how: GroupedHeads) -> Tensor:
        """Norm and turn q and k, write K and V to the pool; return [tokens, heads × head_dim].

        `heads` [tokens, heads + 2 kv_heads, head_dim] are q, k and v, and may be changed.
        """
        ...

    def attend_latent(self, latent: Tensor, q: Tensor, kv: KV, how: LatentHeads) -> Tensor:
        """Norm and turn the latent, turn q, write to the pool; return [tokens, heads × value_dim].

        `latent` is [tokens, kv_rank + rope_dim], q [tokens, heads, nope_dim + rope_dim]; both may
        be changed.
        """
        ...


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One step's tokens, all sequences one after the other, without padding."""

    tokens: Tensor
    """[tokens] int64"""
    positions: Tensor
    """[tokens] int64: each token's place in its sequence."""
    sampled: Tensor
    """[rows] int64: which tokens' logits are wanted."""
    attention: Mapping[int | None, AttentionBatch]
    """By sliding window; None for layers without one."""
    ring: RingBatch | None = None
    """What the ranks along cp compute together; its rows are the last."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step under way on the host; see StepUnderWay."""

    batch: Mapping[int | None, AttentionBatch]
    angles: Mapping[RopeSpec, RopeAngles]
    workspace: Workspace
    rows: TokenRows
    ring: Ring | None

    def attend(self, heads: Tensor, kv: KVLayer, how: GroupedHeads) -> Tensor:
        """See StepUnderWay."""
        spec = how.spec
        q_and_k = heads[:, : spec.heads + spec.kv_heads]
        if how.norm is not None:
            how.norm.normalise_(q_and_k)
        rope_(q_and_k[..., : 2 * len(spec.rope.frequencies)], self.angles[spec.rope])
        q, new = heads[:, : spec.heads], heads[:, spec.heads :]
        return self._attend(q, new, kv, spec.window, how.scoring)

    def attend_latent(self, latent: Tensor, q: Tensor, kv: KVLayer, how: LatentHeads) -> Tensor:
        """See StepUnderWay."""
        spec, angles = how.spec, self.angles[how.spec.rope]
        tokens = latent.shape[0]
        latent[:, : spec.kv_rank] = how.norm(latent[:, : spec.kv_rank])
        rope_(latent[:, None, spec.kv_rank :], angles)
        rope_(q[..., spec.nope_dim :], angles)
        carried = q.new_empty(tokens, spec.heads, latent.shape[1])
        plain = torch.matmul(q[..., : spec.nope_dim].transpose(0, 1), how.key)
        carried[..., : spec.kv_rank] = plain.transpose(0, 1)
        carried[..., spec.kv_rank :] = q[..., spec.nope_dim :]
        seen = self._attend(carried, latent[:, None], kv, None, how.scoring).view(carried.shape)
        values = torch.matmul(seen[..., : spec.kv_rank].transpose(0, 1), how.value)
        return values.transpose(0, 1).reshape(tokens, -1)

    def _attend(
        self, q: Tensor, new: Tensor, layer: KVLayer, window: int | None, scoring: Scoring
    ) -> Tensor:
        """Write the new K and V to the pool; return the attention output [tokens, heads × dims].

        q is [tokens, heads, dims], `new` [tokens, parts × kv_heads, dims].
        """
        batch = self.batch[window]
        write_kv(layer, batch.slots, new)
        out = attend(q, layer, batch, scoring, self.workspace)
        if self.ring is not None:
            self.ring.attend_(out, q, new, layer, window, scoring)
        return out
