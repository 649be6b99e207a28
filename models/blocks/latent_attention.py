"""Multi-head latent attention (DeepSeek-V2, 2024) with absorbed projections.

A token's KV is one vector, its normed latent and a turned part that all heads share:

    pool[token] = [ latent (kv_rank) | turned (rope_dim) ]

A head's key is (K_h · latent | turned) and its value V_h · latent. Neither is ever computed:
since q · (K_h · latent) = (K_hᵀ · q) · latent, each head's query is carried into the latent space
instead, all heads attend to the pool's vectors as they are, as to one KV head, and what they
bring back goes through V_h once.
"""

from dataclasses import replace

from torch import Tensor

from baton.kernels.attention_scores import Scoring
from baton.kernels.linear import Linear
from baton.models.blocks.linears import row_parallel
from baton.models.blocks.norms import Norm
from baton.models.blocks.step import KV, LatentHeads, StepUnderWay
from baton.models.decoder_spec import LatentAttentionSpec
from baton.models.weights import Checkpoint, Rows
from baton.parallel.group import Group
from baton.parallel.split import even

# The norms within have an epsilon of their own, whatever the config says of the others.
NORM_EPS = 1e-6


class LatentAttention:
    """Queries (perhaps squeezed), the latent, and the two absorbed matrices of each head.

    A rank computes some of the heads; the latent, which serves all, every rank computes and holds.
    """

    def __init__(
        self,
        spec: LatentAttentionSpec,
        checkpoint: Checkpoint,
        prefix: str,
        hidden: int,
        tp: Group,
    ) -> None:
        heads = even(spec.heads, tp.rank, tp.size)
        self._squeeze: tuple[Linear, Norm] | None = None
        name, width = f"{prefix}q_proj", hidden
        if spec.query_rank is not None:
            down = _matrix(checkpoint, f"{prefix}q_a_proj", (spec.query_rank, hidden), spec.bias)
            norm = checkpoint.take(f"{prefix}q_a_layernorm.weight", spec.query_rank)
            self._squeeze = Linear(*down), Norm(norm, NORM_EPS)
            name, width = f"{prefix}q_b_proj", spec.query_rank
        q = _by_head(checkpoint, name, (spec.heads, spec.nope_dim + spec.rope_dim, width), heads)
        self._q = Linear(_halves(q, spec.rope_dim, spec.interleaved).flatten(0, 1))
        latent = spec.kv_rank + spec.rope_dim
        kv, bias = _matrix(checkpoint, f"{prefix}kv_a_proj_with_mqa", (latent, hidden), spec.bias)
        if bias is not None:
            bias = _halves(bias[:, None], spec.rope_dim, spec.interleaved)[:, 0]
        self._kv = Linear(_halves(kv, spec.rope_dim, spec.interleaved), bias)
        norm = checkpoint.take(f"{prefix}kv_a_layernorm.weight", spec.kv_rank)
        kv_norm = Norm(norm, NORM_EPS)
        shape = (spec.heads, spec.nope_dim + spec.value_dim, spec.kv_rank)
        both = _by_head(checkpoint, f"{prefix}kv_b_proj", shape, heads)
        key, value = both[:, : spec.nope_dim], both[:, spec.nope_dim :].transpose(1, 2)
        out = (hidden, spec.heads * spec.value_dim)
        self._out = row_parallel(checkpoint, f"{prefix}o_proj", out, tp, bias=spec.bias)
        own = replace(spec, heads=spec.heads // tp.size)
        self._how = LatentHeads(own, Scoring(spec.scale), kv_norm, key, value)

    @property
    def projected(self) -> tuple[tuple[int, ...], ...]:
        """The shape of a token's row of each tensor that `project` returns."""
        spec = self._how.spec
        return (spec.kv_rank + spec.rope_dim,), (spec.heads, spec.nope_dim + spec.rope_dim)

    @property
    def seen(self) -> int:
        """The width of a token's row of what `attend` returns."""
        return self._how.spec.heads * self._how.spec.value_dim

    def project(self, normed: Tensor) -> tuple[Tensor, ...]:
        """Return the latents and the queries of what is normed, in the shapes of `projected`."""
        q = self._queries(normed).view(normed.shape[0], *self.projected[1])
        return self._kv(normed), q

    def attend(self, projected: tuple[Tensor, ...], kv: KV, step: StepUnderWay[KV]) -> Tensor:
        """Write the new KV to the pool; return the heads' outputs [tokens, heads × value_dim]."""
        latent, q = projected
        return step.attend_latent(latent, q, kv, self._how)

    def _queries(self, normed: Tensor) -> Tensor:
        if self._squeeze is not None:
            down, norm = self._squeeze
            normed = norm(down(normed))
        return self._q(normed)

    def mix(self, heads_out: Tensor) -> Tensor:
        """Return this rank's part of the sum [tokens, hidden] of all heads' outputs."""
        return self._out(heads_out)


def _matrix(
    checkpoint: Checkpoint, name: str, shape: tuple[int, int], bias: bool
) -> tuple[Tensor, Tensor | None]:
    rows, width = shape
    return checkpoint.take_fused("", [Rows(name, rows)], width=width, bias=bias)


def _by_head(
    checkpoint: Checkpoint, name: str, shape: tuple[int, int, int], heads: slice
) -> Tensor:
    """Return the rows [heads, rows, width] of some of a matrix's heads."""
    count, rows, width = shape
    cut = (slice(heads.start * rows, heads.stop * rows),)
    return checkpoint.take(f"{name}.weight", count * rows, width, cut=cut).view(-1, rows, width)


def _halves(matrix: Tensor, turned: int, interleaved: bool) -> Tensor:
    """Reorder the last `turned` of the rows [.., rows, width] from pair by pair to half by half."""
    if not interleaved:
        return matrix
    first = matrix.shape[-2] - turned
    order = [*range(first), *range(first, first + turned, 2), *range(first + 1, first + turned, 2)]
    return matrix[..., order, :]
