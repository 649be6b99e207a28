"""A model's forward pass and the choice of next tokens on a device: what is launched or captured.

Nothing here reads the device, so that steps of decodes can be captured. What differs from step to
step is in the tensors: rows of decodes, seats (gpu_seats.py), and the numbers of chunks.

Ranks along tp gather the rows of logits whole, and each chooses all tokens by itself: from the same
bits with the same noise it is the same choice, so that none waits for another to tell it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from baton.engine.step import LayerWatch
from baton.executor.device_sampler import sample_rows
from baton.executor.gpu_option_tensors import TOP, OptionTensors
from baton.executor.gpu_options import Extent
from baton.executor.gpu_seats import SeatTensors
from baton.executor.kv_cache import KVCache
from baton.executor.sharded_sampler import whole_rows
from baton.kernels.kv_pool import paged_layers
from baton.kernels.paged_batch import PagedBatch
from baton.models.blocks.device_step import DeviceStep
from baton.models.decoder import Decoder


@dataclass(frozen=True, slots=True)
class RaggedStep:
    """A step of decodes and chunks of prompts; tensors are int64, on the device."""

    tokens: Tensor
    """[tokens], -1 for the token that its sequence sampled last"""
    positions: Tensor
    """[tokens]"""
    owners: Tensor
    """[tokens]: which sequence each is of."""
    seats: Tensor
    """[sequences], decodes first"""
    lengths: Tensor
    """[sequences]: tokens, the new ones included."""
    starts: Tensor
    """[chunks + 1]: where chunks begin, counted from the end of the decodes."""
    sampled: Tensor
    """[rows]: which tokens' logits are wanted."""
    decodes: int
    chunks: tuple[tuple[int, int], ...]
    """(rows, length) of each chunk."""


@dataclass(frozen=True, slots=True)
class LogitRows:
    """Logits, and whose they are."""

    logits: Tensor
    """[rows, vocabulary], the same on all ranks along tp"""
    seats: Tensor
    """[rows]"""
    positions: Tensor
    """[rows]: of the tokens that are to be chosen."""


FOUND = 3 + 2 * TOP
"""Numbers that a row's sampling finds; see GpuModel.found."""


class GpuModel:
    """A model on a pool, whose sequences have seats."""

    def __init__(
        self,
        model: Decoder,
        kv: KVCache,
        state: SeatTensors,
        rows: Tensor,
        options: OptionTensors | None = None,
        *,
        skip_below: float = 0.0,
    ) -> None:
        """`rows` [3, n] are those of steps of decodes: token, or -1 as above; position; seat.

        Without `options` all sampling is PLAIN. `skip_below`: see PagedBatch.
        """
        self._model = model
        self.layers = paged_layers(kv.tensor)
        """The pool, as the model sees it."""
        self._block_size = kv.layout.block_size
        self._state = state
        self._rows = rows
        self._options = options
        self._skip_below = skip_below
        self.found = torch.zeros(FOUND, rows.shape[1], dtype=torch.int64, device=rows.device)
        """[FOUND, n]: the tokens that were chosen, and whether their logits were finite; then, of
        steps that are TOLD, the bits of the tokens' logprobs as float64, the likeliest tokens in
        falling order, and their logprobs' bits."""

    def __repr__(self) -> str:
        return f"<GpuModel {self._model}>"

    def decode(self, count: int, extent: Extent = Extent.PLAIN) -> None:
        """Compute the first `count` rows of decodes, and choose their next tokens."""
        self.choose(self.decode_logits(count), extent)

    def decode_logits(self, count: int) -> LogitRows:
        """Compute the first `count` rows of decodes."""
        state = self._state
        tokens, positions, seats = self._rows[:, :count].unbind(0)
        real = seats != state.nobody
        tables = state.tables[seats]
        slots = self._slots(
            tables.gather(1, (positions // self._block_size)[:, None])[:, 0], positions
        )
        step = DeviceStep(
            tokens=state.known(tokens, seats),
            positions=positions,
            slots=slots.masked_fill(~real, -1),
            batch=PagedBatch(tables, ((positions + 1) * real).to(torch.int32), count),
        )
        logits = self._whole(self._model.forward_device(step, self.layers))
        return LogitRows(logits, seats, positions + 1)

    def ragged_logits(self, ragged: RaggedStep, watch: LayerWatch | None) -> LogitRows:
        """Compute a step of decodes and chunks; `watch` is told of layers as they are launched."""
        step = self.ragged_step(ragged, ragged.tokens.shape[0])
        return self.ragged_rows(ragged, self._model.forward_device(step, self.layers, watch))

    def ragged_rows(self, ragged: RaggedStep, logits: Tensor) -> LogitRows:
        """Return whose the logits of a step of decodes and chunks are; the rank may have a part."""
        seats = ragged.seats[ragged.owners[ragged.sampled]]
        return LogitRows(self._whole(logits), seats, ragged.positions[ragged.sampled] + 1)

    def ragged_step(self, ragged: RaggedStep, rows: int) -> DeviceStep:
        """Return a step of decodes and chunks as the model takes it, padded to so many rows."""
        state, positions, owners = self._state, ragged.positions, ragged.owners
        tables = state.tables[ragged.seats]
        starts = ragged.starts.to(torch.int32) if ragged.chunks else None
        slots = self._slots(tables[owners, positions // self._block_size], positions)
        more = 0, rows - positions.shape[0]
        return DeviceStep(
            tokens=pad(state.known(ragged.tokens, ragged.seats[owners]), more),
            positions=pad(positions, more),
            slots=pad(slots, more, value=-1),
            batch=PagedBatch(
                tables,
                ragged.lengths.to(torch.int32),
                ragged.decodes,
                starts,
                ragged.chunks,
                self._skip_below,
            ),
            sampled=ragged.sampled,
        )

    def choose(self, rows: LogitRows, extent: Extent = Extent.PLAIN) -> None:
        """Choose the rows' next tokens: they are in `found`, and the seats' last ones.

        Logits in float32 may be changed.
        """
        logits, count = rows.logits, rows.seats.shape[0]
        if not count:
            return
        # Before anything is forbidden: that is not finite either.
        self.found[1, :count] = logits.sum(-1).isfinite()
        told = torch.log_softmax(logits.float(), dim=-1) if extent >= Extent.TOLD else None
        sampling = self._state.sampling(rows.seats, rows.positions)
        if extent < Extent.TYPICAL:
            sampling = replace(sampling, typical_p=None)
        if extent is Extent.PLAIN:
            tokens = sample_rows(logits, sampling)
        else:
            assert self._options is not None, f"{extent!r} without options"
            logits = logits.float()
            self._options.change_(logits, rows.seats, rows.positions)
            tokens = sample_rows(logits, sampling, self._options.penalties(rows.seats))
        # Of logits that are not finite any number may come, and the next step looks it up.
        tokens.clamp_(0, logits.shape[1] - 1)
        self.found[0, :count] = tokens
        self._state.take_tokens(rows.seats, tokens)
        if self._options is not None and extent is not Extent.PLAIN:
            self._options.take_tokens(rows.seats, tokens)
        if told is not None:
            self._tell(told, tokens)

    def _tell(self, logprobs: Tensor, tokens: Tensor) -> None:
        """Write the logprobs of tokens [rows] and of the likeliest to `found`."""
        count, most = tokens.shape[0], min(TOP, logprobs.shape[1])
        own = logprobs.gather(1, tokens[:, None])[:, 0]
        top = logprobs.topk(most, dim=-1)
        self.found[2, :count] = own.double().view(torch.int64)
        self.found[3 : 3 + most, :count] = top.indices.T
        values = top.values.double().view(torch.int64)
        self.found[3 + TOP : 3 + TOP + most, :count] = values.T

    def _whole(self, logits: Tensor) -> Tensor:
        """Return logits of the whole vocabulary, given the rank's part of it."""
        tp, vocabulary = self._model.share.ranks.tp, self._model.spec.vocab_size
        if tp.size == 1:
            return logits
        if not logits.shape[0]:  # nobody samples: all ranks know, and meet not
            return logits.new_empty(0, vocabulary)
        return whole_rows(logits, tp, vocabulary)

    def _slots(self, blocks: Tensor, positions: Tensor) -> Tensor:
        return blocks.long() * self._block_size + positions % self._block_size
