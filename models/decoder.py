"""A decoder's forward pass over one ragged batch, whatever its family."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from baton.engine.step import LayerWatch
from baton.kernels.attention import Workspace
from baton.kernels.kv_pool import KVLayer
from baton.kernels.linear import Linear
from baton.kernels.rope import RopeAngles, rope_angles
from baton.models.blocks.layer import DecoderLayer
from baton.models.blocks.norms import load_norm
from baton.models.blocks.step import ModelInput, Step
from baton.models.rope_spec import RopeSpec
from baton.models.spec import ModelSpec
from baton.models.weights import Checkpoint


class Decoder:
    """A model with frozen weights."""

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        *,
        dtype: str,
        threads: int,
        why: str = "as asked for",
    ) -> None:
        """Take all tensors of the checkpoint; raises InvalidConfig that names what is not right.

        `why` tells the user why torch computes this model.
        """
        decoder = spec.decoder
        self.spec = spec
        self.dtype = dtype
        self.threads = threads
        """CPU threads of a forward pass; torch counts them per calling thread."""
        self.executor = f"torch ({why})"
        """Which executor this is, in words."""
        shape = (spec.vocab_size, spec.hidden)
        self._embedding = checkpoint.take("model.embed_tokens.weight", *shape)
        self._layers = [
            DecoderLayer(decoder, index, checkpoint, spec.hidden) for index in range(spec.layers)
        ]
        self._norm = load_norm(checkpoint, "model.norm", spec.hidden, decoder)
        tie = decoder.tie
        self._head = Linear(self._embedding if tie else checkpoint.take("lm_head.weight", *shape))
        checkpoint.finish(tie=tie, layers=spec.layers, spare_layers=decoder.spare_layers)
        self._ropes = {
            rope: torch.tensor(rope.frequencies, device=self._embedding.device)
            for rope in dict.fromkeys(layer.attention.rope for layer in decoder.layers)
        }

    def __repr__(self) -> str:
        spec = self.spec
        return f"<Decoder {spec.family}: {spec.layers} layers, hidden {spec.hidden}, {self.dtype}>"

    @torch.inference_mode()
    def forward(
        self,
        batch: ModelInput,
        kv: Sequence[KVLayer],
        workspace: Workspace,
        watch: LayerWatch | None = None,
    ) -> Tensor:
        """Write the tokens' KV to the pool and return float32 logits [rows, vocabulary].

        kv holds one entry per layer. Rows are the batch's `sampled` tokens, perhaps none.
        """
        hidden = functional.embedding(batch.tokens, self._embedding)
        if self.spec.decoder.embedding_scale != 1.0:
            hidden.mul_(self.spec.decoder.embedding_scale)
        step = Step(batch.attention, self._angles(batch.positions, hidden.dtype), workspace)
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            heads_out = layer.heads_out(hidden, kv[index], step)
            if watch is not None and index + 1 in watch.ends:
                watch.reached(index + 1)
            if index == last:  # from here on only the sampled rows matter
                hidden, heads_out = hidden[batch.sampled], heads_out[batch.sampled]
            if hidden.shape[0]:
                hidden = layer.finish(hidden, heads_out)
        if not hidden.shape[0]:
            return hidden.new_empty(0, self.spec.vocab_size, dtype=torch.float32)
        return self._logits(hidden)

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> dict[RopeSpec, RopeAngles]:
        return {
            rope: rope_angles(positions, frequencies, dtype, rope.magnitude)
            for rope, frequencies in self._ropes.items()
        }

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self._head(self._norm(hidden)).float()
        cap = self.spec.decoder.logit_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
