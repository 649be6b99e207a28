"""A step plan through a model on a device: launched, and not waited for.

Steps of decodes are captured for some batch sizes, and a replay serves every batch up to that size:
rows that are missing sit on nobody's seat (gpu_seats.py). Of steps with chunks of prompts, all but
attention is captured for some numbers of tokens (gpu_pieces.py). What is beyond the largest sizes
is launched kernel by kernel. A `LayerWatch` hears of layers as they are launched: what the device
is given after that runs after these layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from baton.engine.step import LayerWatch, ScheduledSequence
from baton.executor.gpu_buffers import Ints, StepBuffers
from baton.executor.gpu_model import FOUND, GpuModel, LogitRows, RaggedStep
from baton.executor.gpu_option_tensors import OptionTensors
from baton.executor.gpu_options import CAPTURED, Extent, OptionSeats
from baton.executor.gpu_pieces import GpuPieces
from baton.executor.gpu_queue import GpuQueue, Mark, Work
from baton.executor.gpu_seats import Seats, SeatTensors, seats_needed
from baton.executor.kv_cache import KVCache
from baton.models.decoder import Decoder


@dataclass(frozen=True, slots=True)
class GpuLimits:
    """The largest steps; they size all buffers."""

    rows: int
    """Sequences in a step."""
    tokens: int
    """Tokens in a step."""
    blocks: int
    """Blocks of a sequence."""
    depth: int
    """Steps that may be under way at once."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that is on its way."""

    sampled: tuple[ScheduledSequence, ...]
    """Whose next tokens there will be; those that do not sample are decodes all the same."""
    found: Ints
    """[FOUND, rows], once `done`: see GpuModel.found. Valid until as many more steps are launched
    as may be under way."""
    on_host: tuple[int, ...]
    """Rows that the host has to sample: `take_tokens` follows, before the next step."""
    logits: list[Tensor]
    """Of these rows, once `done`: one float32 [rows, vocabulary] in host memory."""
    done: Mark


class GpuPass:
    """One model on one pool. One thread calls it."""

    def __init__(
        self,
        model: Decoder,
        kv: KVCache,
        queue: GpuQueue,
        limits: GpuLimits,
        *,
        skip_below: float = 0.0,
    ) -> None:
        """`skip_below`: see PagedBatch."""
        seats = seats_needed(limits.rows, limits.depth)
        self._queue = queue
        self._limits = limits
        self._seats = Seats(seats, limits.blocks, depth=limits.depth)
        self._state = SeatTensors(seats, limits.blocks, queue.device)
        self._options = OptionSeats(seats, model.spec.vocab_size)
        self._options_there = OptionTensors(seats, model.spec.vocab_size, queue.device)
        room = 5 * limits.tokens + 8 * limits.rows + self._seats.params.size + 2 * limits.blocks
        # Of one sequence whose past the device is told, there is room for all tokens.
        room += self._options.table.size + limits.blocks * kv.layout.block_size
        turns = limits.depth + 1
        self._buffers = StepBuffers(queue, 3 * limits.rows, room, turns=turns)
        rows = self._buffers.device[: 3 * limits.rows].view(3, limits.rows)
        self._model = GpuModel(
            model, kv, self._state, rows, self._options_there, skip_below=skip_below
        )
        self._results = [queue.host_buffer(FOUND * limits.rows) for _ in range(turns)]
        self._turn = 0
        self._graphs: dict[tuple[int, Extent], Work] = {}
        self._decoder = model
        self._pieces: GpuPieces | None = None

    def __repr__(self) -> str:
        return f"<GpuPass {self._model} on {self._queue}, {len(self._graphs)} captured>"

    @property
    def option_bytes(self) -> int:
        """What pasts, penalties and changes of logits take of the device's memory."""
        return self._options_there.num_bytes

    def capture_pieces(self, sizes: Sequence[int], on_captured: Callable[[int], None]) -> None:
        """Capture what lies between attentions, for steps of `sizes` tokens that have chunks.

        The largest first, and before `capture`: what they need for a time, decodes then share.
        """
        if not sizes:
            return
        layers = self._model.layers
        self._pieces = GpuPieces(self._decoder, layers, self._queue, max(sizes))
        for size in sorted(sizes, reverse=True):
            assert size <= self._limits.tokens, f"a step of {size} tokens"
            self._pieces.capture(size)
            on_captured(size)

    def capture(self, sizes: Sequence[int], on_captured: Callable[[int], None]) -> None:
        """Capture steps of decodes for batches of `sizes`, the largest first, in each extent.

        The others then find room in the memory that it took. What is captured has run, on nobody.
        """
        for size in sorted(sizes, reverse=True):
            assert size <= self._limits.rows, f"a batch of {size}"
            for extent in reversed(CAPTURED):
                self._write_rows(self._buffers.begin(), (), [])
                self._buffers.send()
                work = partial(self._model.decode, size, extent)
                self._graphs[size, extent] = self._queue.capture(work)
            on_captured(size)

    def close(self) -> None:
        """Let go of what was captured; NCCL waits for that before its groups can be left."""
        self._graphs.clear()
        if self._pieces is not None:
            self._pieces.close()

    def launch(
        self, sequences: Sequence[ScheduledSequence], watch: LayerWatch | None = None
    ) -> Launched:
        """Launch a step, and the choice of the tokens that the device samples."""
        decodes = [s for s in sequences if len(s.tokens) == 1]
        ordered = (*decodes, *(s for s in sequences if len(s.tokens) > 1))
        rows = self._buffers.begin()
        seats, told = self._seat(ordered)
        sampled = tuple(s for s in ordered if s.samples)
        extent, on_host = self._sampling(sampled, told)
        graph: Work | None = None
        ragged: RaggedStep | None = None
        compute: Callable[[], LogitRows]
        if len(decodes) == len(sampled) == len(ordered) and watch is None:
            self._write_rows(rows, ordered, seats)
            graph = None if on_host else self._graph_for(len(ordered), extent)
            compute = partial(self._model.decode_logits, len(ordered))
        else:
            ragged = self._ragged(ordered, len(decodes), seats)
            compute = partial(self._model.ragged_logits, ragged, watch)
        self._buffers.send()
        for tell in told:
            self._queue.launch(tell)
        if ragged is not None and (size := self._size_for(ragged)) is not None:
            compute = self._launch_pieces(ragged, size, watch)
        logits: list[Tensor] = []
        if graph is not None:
            graph()
        else:
            self._queue.launch(partial(self._compute, compute, extent, on_host, logits))
        return self._launched(sampled, extent, on_host, logits)

    def take_tokens(self, sequences: Sequence[ScheduledSequence], tokens: Sequence[int]) -> None:
        """Let these be the tokens that sequences of the last step have sampled."""
        self._buffers.begin()
        seats = self._buffers.put(self._seats.of(sequences))
        values = self._buffers.put(tokens)
        self._buffers.send()
        self._queue.launch(partial(self._state.take_tokens, seats, values))

    def _seat(self, sequences: Sequence[ScheduledSequence]) -> tuple[list[int], list[Work]]:
        """Seat a plan's sequences; return the seats, and what tells the device of the changes."""
        changes, told = self._seats.take_plan(sequences), list[Work]()
        self._options.leave(changes.vacated)
        if changes.params:
            params = self._buffers.put(self._seats.params.ravel())
            told.append(partial(self._state.take_params, params))
        if changes.cells:
            cells = self._buffers.put(changes.cells), self._buffers.put(changes.blocks)
            told.append(partial(self._state.take_cells, *cells))
        return changes.seats, told

    def _sampling(
        self, sampled: Sequence[ScheduledSequence], told: list[Work]
    ) -> tuple[Extent, tuple[int, ...]]:
        """Return what sampling these takes, and which rows the host samples.

        What tells the device of their pasts and options is added to `told`.
        """
        extent, on_host = Extent.PLAIN, list[int]()
        for row, (seat, s) in enumerate(zip(self._seats.of(sampled), sampled, strict=True)):
            its = self._options.extent(seat, s)
            if its is None:
                on_host.append(row)
            elif its is not Extent.PLAIN:
                extent = max(extent, its)
                if (begun := self._options.beginning(seat, s)) is not None:
                    tokens = self._buffers.put(begun.tokens)
                    begin = self._options_there.begin
                    told.append(partial(begin, seat, begun.history, tokens, begun.prompt_len))
        if self._options.stale and extent is not Extent.PLAIN:
            table = self._buffers.put(self._options.table)
            told.append(partial(self._options_there.take_table, table))
            self._options.stale = False
        return extent, tuple(on_host)

    def _size_for(self, ragged: RaggedStep) -> int | None:
        """Return how many rows a step is padded to, if its pieces were captured."""
        if self._pieces is None or not ragged.chunks:
            return None
        return self._pieces.size_for(ragged.tokens.shape[0])

    def _launch_pieces(
        self, ragged: RaggedStep, size: int, watch: LayerWatch | None
    ) -> Callable[[], LogitRows]:
        """Launch a step with chunks piece by piece; return what computes the logits in the end."""
        assert self._pieces is not None
        made = partial(self._model.ragged_step, ragged, size)
        end = self._pieces.launch(made, size, watch)
        return lambda: self._model.ragged_rows(ragged, end())

    def _compute(
        self,
        compute: Callable[[], LogitRows],
        extent: Extent,
        on_host: tuple[int, ...],
        logits: list[Tensor],
    ) -> None:
        """Compute a step and choose its tokens; copy rows for the host, which stops it."""
        rows = compute()
        if on_host:
            logits.append(rows.logits[list(on_host)].float().cpu())
        self._model.choose(rows, extent)

    def _write_rows(
        self, rows: Ints, decodes: Sequence[ScheduledSequence], seats: Sequence[int]
    ) -> None:
        """Write the rows of decodes, and nobody's behind them."""
        table, count = rows.reshape(3, -1), len(decodes)
        table[0, :count] = [s.tokens[0] for s in decodes]
        table[1, :count] = [s.start for s in decodes]
        table[2, :count] = seats
        table[:2, count:] = 0
        table[2, count:] = self._state.nobody

    def _ragged(
        self, sequences: Sequence[ScheduledSequence], decodes: int, seats: Sequence[int]
    ) -> RaggedStep:
        """Put the numbers of a step with chunks; decodes are the first sequences."""
        counts = np.array([len(s.tokens) for s in sequences])
        ends = np.cumsum(counts)
        put = self._buffers.put
        return RaggedStep(
            tokens=put([token for s in sequences for token in s.tokens]),
            positions=put(np.concatenate([np.arange(s.start, s.end) for s in sequences])),
            owners=put(np.repeat(np.arange(len(sequences)), counts)),
            seats=put(seats),
            lengths=put([s.end for s in sequences]),
            starts=put(np.concatenate([[0], ends[decodes:] - decodes])),
            sampled=put(
                [int(end) - 1 for s, end in zip(sequences, ends, strict=True) if s.samples]
            ),
            decodes=decodes,
            chunks=tuple((len(s.tokens), s.end) for s in sequences[decodes:]),
        )

    def _graph_for(self, rows: int, extent: Extent) -> Work | None:
        """Return the smallest captured step that has so many rows."""
        sizes = (size for size, its in self._graphs if its is extent and size >= rows)
        size = min(sizes, default=None)
        return None if size is None else self._graphs[size, extent]

    def _launched(
        self,
        sampled: tuple[ScheduledSequence, ...],
        extent: Extent,
        on_host: tuple[int, ...],
        logits: list[Tensor],
    ) -> Launched:
        """Launch the copy of what was found to the host."""
        self._turn = (self._turn + 1) % len(self._results)
        result, found = self._results[self._turn], self._model.found
        written = (found.shape[0] if extent >= Extent.TOLD else 2) * found.shape[1]

        def copy() -> None:
            result[:written].copy_(found.view(-1)[:written], non_blocking=True)

        self._queue.launch(copy)
        table = result.numpy().reshape(found.shape)[:, : len(sampled)]
        return Launched(sampled, table, on_host, logits, self._queue.record())
