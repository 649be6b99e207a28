"""A step plan through the native executor: a few arrays, one call, logits."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baton.core.ids import BlockId, SeqId
from baton.engine.step import LayerWatch, ScheduledSequence, StepPlan
from baton.executor.batch import SampledRow
from baton.executor.kv_cache import KVCache
from baton.kernels.native.library import StepInput
from baton.kernels.native.program import Program
from baton.models.native import NativeDecoder

# As kernels/native/batch.h has it.
_SEQUENCE = np.dtype(
    [("row", "i4"), ("rows", "i4"), ("length", "i4"), ("blocks", "u8")], align=True
)
_Table = tuple[tuple[BlockId, ...], NDArray[np.int32], int]


class NativePass:
    """One model on one pool."""

    def __init__(self, model: NativeDecoder, kv: KVCache) -> None:
        self._kv = kv
        self._tables = _BlockTables()
        self._logits = torch.empty(0, model.spec.vocab_size)
        self._program = Program(
            model.library,
            model.ops,
            widths=model.widths,
            spreads=model.spreads,
            rotations=model.rotations,
            vocabulary=model.spec.vocab_size,
            pool=(kv.layout, kv.num_blocks),
            threads=model.threads,
        )
        self._model = model

    def __repr__(self) -> str:
        return f"<NativePass {self._program}>"

    def compute(
        self, plan: StepPlan, watch: LayerWatch | None = None
    ) -> tuple[Tensor, tuple[SampledRow, ...]]:
        """Write the plan's KV; return float32 logits [rows, vocabulary] and whose they are.

        The logits are valid until the next call.
        """
        sequences = plan.sequences
        ends = np.cumsum([len(s.tokens) for s in sequences])
        sampling = [i for i, s in enumerate(sequences) if s.samples]
        logits = self._forward(sequences, ends, ends[sampling] - 1, watch)
        rows = tuple(
            SampledRow(s.seq_id, s.end, s.sampling, s.tokens, s.context)
            for s in (sequences[i] for i in sampling)
        )
        return logits, rows

    def logits_of_all(self, plan: StepPlan) -> Tensor:
        """Write the plan's KV; return logits [tokens, vocabulary], sequence after sequence."""
        ends = np.cumsum([len(s.tokens) for s in plan.sequences])
        return self._forward(plan.sequences, ends, np.arange(ends[-1])).clone()

    def _forward(
        self,
        sequences: Sequence[ScheduledSequence],
        ends: NDArray[np.int64],
        sampled: NDArray[np.int64],
        watch: LayerWatch | None = None,
    ) -> Tensor:
        tokens = np.array([token for s in sequences for token in s.tokens], dtype=np.int32)
        table = np.empty(len(sequences), dtype=_SEQUENCE)
        table["rows"] = [len(s.tokens) for s in sequences]
        table["row"] = ends - table["rows"]
        table["length"] = [s.end for s in sequences]
        table["blocks"] = self._tables.addresses(sequences)
        picked = sampled.astype(np.int32)
        if len(picked) > len(self._logits):
            self._logits = torch.empty(len(picked), self._logits.shape[1])
        step = StepInput(
            tokens=tokens.ctypes.data,
            sequences=table.ctypes.data,
            sampled=picked.ctypes.data,
            pool=self._kv.address,
            logits=self._logits.data_ptr(),
            token_count=len(tokens),
            sequence_count=len(table),
            sampled_count=len(picked),
        )
        self._run(step, watch)
        return self._logits[: len(picked)]

    def _run(self, step: StepInput, watch: LayerWatch | None) -> None:
        """Run the program, with a stop wherever somebody waits for the layers so far."""
        first = 0
        if watch is not None:
            for layers in watch.ends:
                end = self._model.layer_ends[layers - 1]
                self._program.run(step, first, end)
                watch.reached(layers)
                first = end
        self._program.run(step, first)


class _BlockTables:
    """The last step's block tables as arrays: most of them are the next step's too."""

    def __init__(self) -> None:
        self._kept: dict[SeqId, _Table] = {}

    def addresses(self, sequences: Sequence[ScheduledSequence]) -> list[int]:
        """Return where each sequence's table of int32 is; valid until the next call."""
        tables: dict[SeqId, _Table] = {}
        for s in sequences:
            found = self._kept.get(s.seq_id)
            if found is None or found[0] != s.blocks:
                array = np.array(s.blocks, dtype=np.int32)
                found = (s.blocks, array, array.ctypes.data)
            tables[s.seq_id] = found
        self._kept = tables
        return [table[2] for table in tables.values()]
