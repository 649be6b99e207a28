"""Steps with chunks, cut at their attentions: of all families, and by Triton's backend without."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from baton.engine.step import LayerWatch
from baton.executor.gpu_pieces import GpuPieces, piece_bytes
from baton.executor.gpu_queue import GpuQueue
from baton.kernels.backend import Backend
from baton.kernels.kv_pool import paged_layers
from baton.models.blocks.device_step import DeviceStep
from tests.models.device_cases import FAMILIES, SIZES, STEPS, Twice, loaded_twice


class Pieced:
    """Runs steps of a model on a pool piece by piece, if they have chunks."""

    def __init__(self, twice: Twice, queue: GpuQueue) -> None:
        self.model, self.queue = twice._model, queue
        self.whole = twice.run
        self.pieces = GpuPieces(self.model, paged_layers(twice._device.tensor), queue, 64)
        self.captured: set[int] = set()

    def run(self, step: DeviceStep, watch: LayerWatch | None = None) -> Tensor:
        if step.batch.starts is None:
            return self.whole(step)
        rows = step.tokens.shape[0]
        if rows not in self.captured:
            self.pieces.capture(rows)
            self.captured.add(rows)
        found: list[Tensor] = []
        end = self.pieces.launch(lambda: step, rows, watch)
        self.queue.launch(partial(_append, found, end))
        self.queue.record().wait()
        return found[0]


def _append(found: list[Tensor], end: Callable[[], Tensor]) -> None:
    found.append(end())


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_give_the_logits_of_the_whole(
    family: str, tmp_path: Path, write_model: Callable[..., Path], queue: GpuQueue
) -> None:
    model_type, config = FAMILIES[family]
    twice = loaded_twice(write_model(tmp_path, model_type, **(SIZES | config)), Backend.TORCH)
    pieced = Pieced(twice, queue)
    twice.run = pieced.run  # type: ignore[method-assign]
    for parts, padding in STEPS:
        expected, found = twice.step(parts, padding)
        assert float((found - expected).norm() / expected.norm()) < 2e-6
    assert len(pieced.captured) == 2, "steps with chunks were launched whole"
    held = [pieced.pieces._tokens, *pieced.pieces._kept.values()]
    assert piece_bytes(pieced.model, 64) == sum(t.nbytes for t in held)


def test_the_smallest_size_that_is_large_enough_is_taken(
    tmp_path: Path, write_llama: Callable[..., Path], queue: GpuQueue
) -> None:
    twice = loaded_twice(write_llama(tmp_path / "llama"), Backend.TORCH)
    pieces = GpuPieces(twice._model, paged_layers(twice._device.tensor), queue, 64)
    for rows in (64, 32, 8):
        pieces.capture(rows)
    assert [pieces.size_for(rows) for rows in (1, 8, 9, 64, 65)] == [8, 8, 32, 64, None]
    pieces.close()
    assert pieces.size_for(1) is None


def test_a_step_leaves_nothing_to_the_next(
    tmp_path: Path, write_llama: Callable[..., Path], queue: GpuQueue
) -> None:
    """What is not a number in one step's rows is not in those of the next, nor in padding."""
    twice = loaded_twice(write_llama(tmp_path / "llama"), Backend.TORCH)
    pieced = Pieced(twice, queue)
    twice.run = pieced.run  # type: ignore[method-assign]
    (first, padding), *_ = STEPS
    for kept in pieced.pieces._kept.values():
        kept.fill_(float("nan"))
    with torch.inference_mode():
        expected, found = twice.step(first, padding)
    assert found.isfinite().all()
    assert float((found - expected).norm() / expected.norm()) < 2e-6
