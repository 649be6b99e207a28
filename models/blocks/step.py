"""What a step's layers share: the batch as attention sees it, the rotations, the work space."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from baton.kernels.attention import AttentionBatch, Workspace, attend
from baton.kernels.attention_scores import Scoring
from baton.kernels.kv_pool import KVLayer, write_kv
from baton.kernels.rope import RopeAngles
from baton.models.blocks.ring import Ring, RingBatch
from baton.models.rope_spec import RopeSpec
from baton.parallel.token_rows import TokenRows


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
    """A step under way."""

    batch: Mapping[int | None, AttentionBatch]
    angles: Mapping[RopeSpec, RopeAngles]
    workspace: Workspace
    rows: TokenRows
    """Which rows of the stream this rank has."""
    ring: Ring | None

    def attend(
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
