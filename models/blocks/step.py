"""What a step's layers share: the batch as attention sees it, the rotations, the work space."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from baton.kernels.attention import AttentionBatch, Workspace
from baton.kernels.rope import RopeAngles
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


@dataclass(frozen=True, slots=True)
class Step:
    """A step under way."""

    batch: Mapping[int | None, AttentionBatch]
    angles: Mapping[RopeSpec, RopeAngles]
    workspace: Workspace
    rows: TokenRows
    """Which rows of the stream this rank has."""
