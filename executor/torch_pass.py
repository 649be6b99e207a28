"""A step plan through the torch executor: it runs wherever torch does."""

from torch import Tensor

from baton.engine.step import LayerWatch, StepPlan
from baton.executor.batch import SampledRow, make_batch
from baton.executor.kv_cache import KVCache
from baton.kernels.attention import Workspace
from baton.models.decoder import Decoder
from baton.models.weights import torch_dtype


class TorchPass:
    """One model on one pool."""

    def __init__(self, model: Decoder, kv: KVCache) -> None:
        self._model = model
        self._kv = kv
        self._workspace = Workspace()

    def __repr__(self) -> str:
        return f"<TorchPass {self._model}>"

    def compute(
        self, plan: StepPlan, watch: LayerWatch | None = None
    ) -> tuple[Tensor, tuple[SampledRow, ...]]:
        """Write the plan's KV; return float32 logits [rows, vocabulary] and whose they are."""
        windows, kv = self._model.spec.windows, self._kv
        batch = make_batch(
            plan, kv.layout, kv.tensor.device, windows=windows, dtype=torch_dtype(self._model.dtype)
        )
        # A block's slots past the sequence's end are masked, but NaN left there would come through.
        kv.tensor.index_fill_(0, batch.fresh_blocks, 0)
        logits = self._model.forward(batch.model, kv.layers, self._workspace, watch)
        return logits, batch.sampled
