"""A step plan through the torch executor: it runs wherever torch does."""

import torch
from torch import Tensor

from baton.engine.step import LayerWatch, StepPlan
from baton.executor.batch import SampledRow
from baton.executor.context_batch import ContextPlace, make_context_batch
from baton.executor.kv_cache import KVCache
from baton.kernels.attention import Workspace
from baton.models.decoder import Decoder
from baton.models.weights import torch_dtype


class TorchPass:
    """One rank's share of a model on one pool."""

    def __init__(self, model: Decoder, kv: KVCache) -> None:
        self._model = model
        self._kv = kv
        self._workspace = Workspace()

    def __repr__(self) -> str:
        return f"<TorchPass {self._model}>"

    def compute(
        self, plan: StepPlan, watch: LayerWatch | None = None
    ) -> tuple[Tensor, tuple[SampledRow, ...]] | None:
        """Write the plan's KV; return float32 logits [rows, vocabulary] and whose they are.

        The logits are of the tokens of the vocabulary that this rank has. A rank that is not in the
        last stage hands its stream on to the next and returns None; so do all along cp but the
        first, which has the rows that are sampled.
        """
        model, kv = self._model, self._kv
        windows, dtype = model.spec.windows, torch_dtype(model.dtype)
        pp, cp = model.share.ranks.pp, model.share.ranks.cp
        if not plan.sequences:  # all are at other places
            model.join()
            return (torch.empty(0, 0), ()) if model.share.last and cp.rank == 0 else None
        place = ContextPlace(cp.rank, cp.size)
        batch = make_context_batch(
            plan, kv.layout, place, kv.tensor.device, windows=windows, dtype=dtype
        )
        # A block's slots past the sequence's end are masked, but NaN left there would come through.
        kv.tensor.index_fill_(0, batch.fresh_blocks, 0)
        stream = None if model.share.first else self._received(len(batch.model.tokens))
        out = model.forward(batch.model, kv.layers, self._workspace, watch, stream)
        if not model.share.last:
            pp.send(out.contiguous(), pp.rank + 1)
        elif cp.rank == 0:
            return out, batch.sampled
        return None

    def _received(self, tokens: int) -> Tensor:
        """Return the stream from the stage before."""
        model, pp = self._model, self._model.share.ranks.pp
        stream = torch.empty(
            model.stream_shape(tokens),
            dtype=torch_dtype(model.dtype),
            device=self._kv.tensor.device,
        )
        return pp.receive_(stream, pp.rank - 1)
