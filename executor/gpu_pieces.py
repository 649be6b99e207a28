"""Steps with chunks of prompts on a device, of which all but attention is captured.

    captured, by number of rows     launched, for the step's sequences
    embed, norm, q k v        ─┐
                               └──▶ write KV, attend            layer 0
    rest of layer 0, q k v    ◀┘─┐
                                 └▶ write KV, attend            layer 1
    …
                                    rest of the last layer and logits, of sampled rows alone

A captured piece depends on how many rows there are and on nothing else; whose they are, attention
alone has to know, and it is given that anew for each step. Rows are padded up to the next size that
was captured: padding has slot -1 and belongs to no sequence, so that its KV is written nowhere and
nobody attends to it or samples it. Between pieces, rows lie in buffers that all sizes share.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from baton.engine.step import LayerWatch
from baton.executor.gpu_queue import GpuQueue, Work
from baton.kernels.kv_pool import PagedLayer
from baton.models.blocks.device_step import DeviceRun, DeviceStep
from baton.models.blocks.layer import DecoderLayer
from baton.models.decoder import Decoder
from baton.models.weights import torch_dtype


@dataclass(slots=True)
class _UnderWay:
    """A step that is launched; what its first launch makes, the others find."""

    steps: list[DeviceStep] = field(default_factory=list)
    runs: list[DeviceRun] = field(default_factory=list)


class GpuPieces:
    """A model's layers on a pool, cut at their attentions. One thread calls it."""

    def __init__(
        self, model: Decoder, kv: Sequence[PagedLayer], queue: GpuQueue, most: int
    ) -> None:
        """Steps have up to `most` rows, padding included."""
        assert model.share.first, "a stage that takes what others have computed"
        assert model.share.last, "a stage that has no logits"
        self._model = model
        self._kv = kv
        self._queue = queue
        self._tokens = torch.zeros(most, dtype=torch.int64, device=queue.device)
        dtype, device = torch_dtype(model.dtype), queue.device
        self._kept = {
            key: torch.zeros(most, *key.shape, dtype=dtype, device=device) for key in _keys(model)
        }
        """What one layer leaves there, the next that has the same shapes writes over."""
        self._captured: dict[int, list[Work]] = {}

    def __repr__(self) -> str:
        return f"<GpuPieces {self._model}, for {sorted(self._captured)} rows>"

    def capture(self, rows: int) -> None:
        """Capture all pieces of steps of so many rows; the largest first, as GpuQueue says."""
        self._captured[rows] = [
            self._queue.capture(partial(self._piece, index, rows))
            for index in range(len(self._model.layers))
        ]

    def size_for(self, rows: int) -> int | None:
        """Return the fewest rows that were captured and are as many; None if there are none."""
        return min((size for size in self._captured if size >= rows), default=None)

    def launch(
        self, made: Callable[[], DeviceStep], size: int, watch: LayerWatch | None
    ) -> Callable[[], Tensor]:
        """Launch the step that `made` returns, of `size` rows; `watch` hears of layers.

        `made` is launched as well. Returns what is to be launched last: it returns the logits.
        """
        under_way = _UnderWay()
        self._queue.launch(partial(self._begin, made, size, under_way))
        for index, piece in enumerate(self._captured[size]):
            piece()
            self._queue.launch(partial(self._attend, index, size, under_way, watch))
        return partial(self._end, size, under_way)

    def close(self) -> None:
        """Let go of what was captured."""
        self._captured.clear()

    # What is captured

    def _piece(self, index: int, size: int) -> None:
        """Compute what lies between the attention of the layer before, if any, and this layer's."""
        model, layer = self._model, self._model.layers[index]
        rows = model.rows(size)
        stream = self._stream(size)
        if index == 0:
            stream.copy_(model.embed(self._tokens[:size], rows))
            normed = layer.norm(stream)
        else:
            before = model.layers[index - 1]
            normed = before.finish(stream, self._seen(before, size), rows, layer.norm)
        for kept, made in zip(
            self._projected(layer, size), layer.project(normed, rows), strict=True
        ):
            kept.copy_(made)

    # What is launched

    def _begin(self, made: Callable[[], DeviceStep], size: int, under_way: _UnderWay) -> None:
        step = made()
        assert step.tokens.shape[0] == size, f"{step.tokens.shape[0]} rows of {size}"
        self._tokens[:size].copy_(step.tokens)
        under_way.steps.append(step)
        under_way.runs.append(self._model.device_run(step))

    def _attend(
        self, index: int, size: int, under_way: _UnderWay, watch: LayerWatch | None
    ) -> None:
        layer, (run,) = self._model.layers[index], under_way.runs
        found = layer.attend(self._projected(layer, size), self._kv[index], run)
        self._seen(layer, size).copy_(found)
        if watch is not None and index + 1 in watch.ends:
            watch.reached(index + 1)

    def _end(self, size: int, under_way: _UnderWay) -> Tensor:
        model, (step,) = self._model, under_way.steps
        seen = self._seen(model.layers[-1], size)
        return model.end(self._stream(size), seen, model.rows(size), step.sampled)

    # Where rows lie between pieces

    def _stream(self, size: int) -> Tensor:
        return self._kept[_stream(self._model)][: self._model.rows(size).count]

    def _projected(self, layer: DecoderLayer, size: int) -> tuple[Tensor, ...]:
        return tuple(self._kept[key][:size] for key in _projected(layer))

    def _seen(self, layer: DecoderLayer, size: int) -> Tensor:
        return self._kept[_seen(layer)][:size]


def piece_bytes(model: Decoder, most: int) -> int:
    """Return what `GpuPieces` of up to `most` rows takes of a device's memory for good."""
    item = torch_dtype(model.dtype).itemsize
    return most * (8 + sum(item * prod(key.shape) for key in _keys(model)))


class _Key(NamedTuple):
    """A buffer between pieces."""

    what: str
    shape: tuple[int, ...]
    """Of a row."""


def _keys(model: Decoder) -> set[_Key]:
    layers = model.layers
    projected = (key for layer in layers for key in _projected(layer))
    return {_stream(model), *projected, *map(_seen, layers)}


def _stream(model: Decoder) -> _Key:
    return _Key("stream", (model.spec.hidden,))


def _projected(layer: DecoderLayer) -> tuple[_Key, ...]:
    return tuple(_Key(f"projected {n}", shape) for n, shape in enumerate(layer.projected))


def _seen(layer: DecoderLayer) -> _Key:
    return _Key("seen", (layer.seen,))
