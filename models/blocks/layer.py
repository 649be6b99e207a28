"""One decoder layer, assembled from its spec."""

from torch import Tensor

from baton.models.blocks.attention import Attention
from baton.models.blocks.latent_attention import LatentAttention
from baton.models.blocks.mlp import Mlp, load_mlp
from baton.models.blocks.moe import Moe
from baton.models.blocks.norms import Norm, load_norm
from baton.models.blocks.step import KV, StepUnderWay
from baton.models.decoder_spec import AttentionSpec, DecoderSpec, MlpSpec
from baton.models.share import Share
from baton.models.weights import Checkpoint
from baton.parallel.expert_placement import Placement
from baton.parallel.token_rows import TokenRows


class DecoderLayer:
    """Norm, attention, norm, feed-forward, each half added to the stream.

    A sandwich layer norms what either half gives before it is added.
    """

    def __init__(
        self,
        decoder: DecoderSpec,
        index: int,
        checkpoint: Checkpoint,
        hidden: int,
        share: Share,
    ) -> None:
        spec, prefix, tp = decoder.layers[index], f"model.layers.{index}.", share.ranks.tp
        self._attention: Attention | LatentAttention
        at = f"{prefix}self_attn."
        if isinstance(spec.attention, AttentionSpec):
            self._attention = Attention(spec.attention, decoder, checkpoint, at, hidden, tp)
        else:
            self._attention = LatentAttention(spec.attention, checkpoint, at, hidden, tp)
        if isinstance(spec.mlp, MlpSpec):
            self._mlp: Mlp | Moe = load_mlp(spec.mlp, checkpoint, f"{prefix}mlp.", hidden, tp)
        else:
            placement = share.placement(index, spec.mlp.routing.experts)
            self._mlp = Moe(spec.mlp, checkpoint, prefix, hidden, share.ranks, placement)
        names = ["input_layernorm", "post_attention_layernorm"]
        if spec.sandwich:
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        norms = [load_norm(checkpoint, prefix + name, hidden, decoder) for name in names]
        self.norm = norms[0]
        """Of the stream, before the layer."""
        self._mlp_norm = norms[-1]
        self._attention_out_norm: Norm | None = None
        self._mlp_out_norm: Norm | None = None
        if spec.sandwich:
            self._attention_out_norm, self._mlp_norm, self._mlp_out_norm = norms[1:]

    @property
    def expert_loads(self) -> Tensor | None:
        """How often this place's tokens have chosen each expert [experts]; None without any."""
        return self._mlp.loads if isinstance(self._mlp, Moe) else None

    def place_experts(self, placement: Placement, checkpoint: Checkpoint) -> None:
        """See Moe.place; nothing to do without experts."""
        if isinstance(self._mlp, Moe):
            self._mlp.place(placement, checkpoint)

    def join(self, nothing: Tensor) -> None:
        """Compute what other places need of the experts here, with no tokens [0, hidden] to add."""
        if isinstance(self._mlp, Moe):
            self._mlp(nothing)

    @property
    def projected(self) -> tuple[tuple[int, ...], ...]:
        """The shape of a token's row of each tensor that `project` returns."""
        return self._attention.projected

    @property
    def seen(self) -> int:
        """The width of a token's row of what `attend` returns."""
        return self._attention.seen

    def project(self, normed: Tensor, rows: TokenRows) -> tuple[Tensor, ...]:
        """Return what `attend` takes of all tokens, each [tokens, …].

        `normed` are this rank's rows of the stream after `norm`, and `rows` says which.
        """
        return self._attention.project(rows.gather(normed))

    def attend(self, projected: tuple[Tensor, ...], kv: KV, step: StepUnderWay[KV]) -> Tensor:
        """Write the new KV to the pool; return what the heads saw [tokens, heads × dims].

        It depends on which sequences a step has; `project` and `finish` on how many tokens alone.
        """
        return self._attention.attend(projected, kv, step)

    def finish(
        self, stream: Tensor, heads_out: Tensor, rows: TokenRows, following: Norm | None
    ) -> Tensor:
        """Add both halves to the stream, in place; return it, normed by the norm that follows.

        That is the next layer's or the model's last one; with None the stream itself is returned.
        `rows` says which rows of the stream are here. What the heads saw is of all the tokens whose
        rows they are.
        """
        mixed = self._attention.mix(heads_out)
        normed = _add_norm(mixed, self._attention_out_norm, stream, self._mlp_norm, rows)
        fed = self._mlp(rows.gather(normed))
        return _add_norm(fed, self._mlp_out_norm, stream, following, rows)


def _add_norm(
    partial: Tensor, out_norm: Norm | None, stream: Tensor, norm: Norm | None, rows: TokenRows
) -> Tensor:
    """Add the sum of partials, perhaps normed first, to the stream; return the stream's norm."""
    if out_norm is None and norm is not None:
        return rows.add_norm_(partial, stream, norm)
    added = rows.reduce(partial)
    if out_norm is not None:
        added = out_norm(added)
    return stream.add_(added) if norm is None else norm.add_((added,), stream)
