"""The numbers of a step on their way: host memory that is pinned once, and one copy to the device.

    host    │ rows of decodes │ chunks, seats … │ not used │      one of several, in turn
    device  │ rows of decodes │ chunks, seats … │                the same memory for every step

The device's side never moves, so that captured work finds it. The host's sides take turns: one is
written again only when the copy out of it is known to have ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baton.executor.gpu_queue import GpuQueue, Mark

Ints = NDArray[np.int64]


@dataclass(slots=True)
class _Side:
    memory: Tensor
    numbers: Ints
    """The same memory."""
    copied: Mark | None = None


class StepBuffers:
    """Packs int64 numbers, a step after the other, and sends them."""

    def __init__(self, queue: GpuQueue, fixed: int, room: int, *, turns: int) -> None:
        """The first `fixed` numbers of a step have their place; `room` more come as they come.

        `turns` steps may be on their way at once, without waiting.
        """
        self._queue = queue
        self._fixed = fixed
        self.device = torch.zeros(fixed + room, dtype=torch.int64, device=queue.device)
        """[fixed + room] int64; only launched work reads it."""
        self._sides = []
        for _ in range(turns):
            memory = queue.host_buffer(fixed + room)
            self._sides.append(_Side(memory, memory.numpy()))
        self._turn = 0
        self._used = 0

    def __repr__(self) -> str:
        return f"<StepBuffers: {len(self._sides)} of {self.device.shape[0]} numbers>"

    def begin(self) -> Ints:
        """Begin a step; return where its `fixed` numbers go, which hold what they held before."""
        self._turn = (self._turn + 1) % len(self._sides)
        side = self._sides[self._turn]
        if side.copied is not None:
            side.copied.wait()
            side.copied = None
        self._used = self._fixed
        return side.numbers[: self._fixed]

    def put(self, values: "Sequence[int] | Ints") -> Tensor:
        """Add numbers; return where on the device they will be, once sent.

        More than there is room for are given to torch to copy, for which it stops the host.
        """
        count = len(values)
        if self._used + count > self.device.shape[0]:
            return torch.tensor(values, dtype=torch.int64).to(self.device.device)
        place = slice(self._used, self._used + count)
        self._sides[self._turn].numbers[place] = values
        self._used = place.stop
        return self.device[place]

    def send(self) -> None:
        """Launch the copy of all that was put since `begin`."""
        side, used = self._sides[self._turn], self._used

        def copy() -> None:
            self.device[:used].copy_(side.memory[:used], non_blocking=True)

        self._queue.launch(copy)
        side.copied = self._queue.record()
