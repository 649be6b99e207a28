"""One decoder layer, assembled from its spec."""

from torch import Tensor

from baton.kernels.kv_pool import KVLayer
from baton.models.blocks.attention import Attention
from baton.models.blocks.latent_attention import LatentAttention
from baton.models.blocks.mlp import Mlp, load_mlp
from baton.models.blocks.moe import Moe
from baton.models.blocks.norms import Norm, load_norm
from baton.models.blocks.step import Step
from baton.models.decoder_spec import AttentionSpec, DecoderSpec, MlpSpec
from baton.models.weights import Checkpoint


class DecoderLayer:
    """Norm, attention, norm, feed-forward, each half added to the stream.

    A sandwich layer norms what either half gives before it is added.
    """

    def __init__(
        self, decoder: DecoderSpec, index: int, checkpoint: Checkpoint, hidden: int
    ) -> None:
        spec, prefix = decoder.layers[index], f"model.layers.{index}."
        self._attention: Attention | LatentAttention
        at = f"{prefix}self_attn."
        if isinstance(spec.attention, AttentionSpec):
            self._attention = Attention(spec.attention, decoder, checkpoint, at, hidden)
        else:
            self._attention = LatentAttention(spec.attention, checkpoint, at, hidden)
        if isinstance(spec.mlp, MlpSpec):
            self._mlp: Mlp | Moe = load_mlp(spec.mlp, checkpoint, f"{prefix}mlp.", hidden)
        else:
            self._mlp = Moe(spec.mlp, checkpoint, prefix, hidden)
        names = ["input_layernorm", "post_attention_layernorm"]
        if spec.sandwich:
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        norms = [load_norm(checkpoint, prefix + name, hidden, decoder) for name in names]
        self._attention_norm, self._mlp_norm = norms[0], norms[-1]
        self._attention_out_norm: Norm | None = None
        self._mlp_out_norm: Norm | None = None
        if spec.sandwich:
            self._attention_out_norm, self._mlp_norm, self._mlp_out_norm = norms[1:]

    def heads_out(self, hidden: Tensor, kv: KVLayer, step: Step) -> Tensor:
        """Write the new KV to the pool; return what the heads saw [tokens, heads × dims]."""
        return self._attention.heads_out(self._attention_norm(hidden), kv, step)

    def finish(self, hidden: Tensor, heads_out: Tensor) -> Tensor:
        """Return the stream after the layer; both inputs are cut to the same rows."""
        mixed = self._attention.mix(heads_out)
        if self._attention_out_norm is not None:
            mixed = self._attention_out_norm(mixed)
        hidden = hidden + mixed
        fed = self._mlp(self._mlp_norm(hidden))
        if self._mlp_out_norm is not None:
            fed = self._mlp_out_norm(fed)
        return hidden.add_(fed)
