"""A device made of host memory, whose copies are late and out of order; for tests of handovers.

A copy moves its bytes only when somebody waits, and then others may come first, in an order drawn
from the seed. Who forgets to wait finds old bytes. If it is told to, it hides what the model has
computed as well, until its event is waited for.
"""

import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from baton.kv_transfer.cuda_ipc.late_driver import LateDriver


@dataclass(eq=False, slots=True)
class _Copy:
    device: "LateDevice"
    source: Tensor
    target: Tensor

    @property
    def done(self) -> bool:
        """See Event."""
        return self not in self.device._open

    def wait(self) -> None:
        """See Event."""
        self.device._complete(self)


@dataclass(eq=False, slots=True)
class _Recorded:
    """What the model has written, kept out of sight until somebody waits."""

    device: "LateDevice"
    hidden: list[tuple[Tensor, Tensor, Tensor]]
    """Memory, places in it, and the words that belong there."""
    done: bool = False

    def wait(self) -> None:
        """See Event."""
        self.device._show(self)


class LateDevice:
    """Implements `Device`."""

    def __init__(self, seed: int = 0, *, hides: bool = False, shared: bool = True) -> None:
        """`hides`: what changes in its memory shows only when the `record` after it is waited for;
        for memory that the model alone writes. `shared`: whether other processes can read it.
        """
        self.memory = LateDriver(seed)
        """What copies between its memory and that of others."""
        self.driver = self.memory if shared else None
        """See Device."""
        self.recorded = 0
        """Events so far."""
        self._hides = hides
        self._shown: list[tuple[Tensor, Tensor]] = []
        """Memory, and what was in it when it was last looked at."""
        self._events: list[_Recorded] = []
        self.copies_to_host = 0
        self.copies_from_host = 0
        self._random = random.Random(seed)
        self._lock = Lock()
        self._open: list[_Copy] = []
        self._own: list[tuple[int, int]] = []
        self._pinned: list[tuple[int, int]] = []

    def __repr__(self) -> str:
        return f"<LateDevice, {len(self._open)} copies open>"

    def allocate(self, size: int) -> Tensor:
        """See Device."""
        memory = torch.frombuffer(self.memory.allocate(size).buffer, dtype=torch.uint8)
        self._own.append(_range(memory))
        if self._hides:
            words = memory[: size // 8 * 8].view(torch.int64)
            self._shown.append((words, words.clone()))
        return memory

    def pin(self, memory: Tensor) -> None:
        """See Device."""
        self._pinned.append(_range(memory))

    def unpin(self, memory: Tensor) -> None:
        """See Device."""
        self._pinned.remove(_range(memory))

    def copy_to_host(self, source: Tensor, target: Tensor) -> _Copy:
        """See Device."""
        assert _within(target, self._pinned), "a copy to host memory that is not pinned"
        self.copies_to_host += 1
        return self._begin(source, target)

    def copy_from_host(self, source: Tensor, target: Tensor) -> _Copy:
        """See Device."""
        assert _within(source, self._pinned), "a copy from host memory that is not pinned"
        assert _within(target, self._own), "a copy to memory that is not the device's"
        self.copies_from_host += 1
        return self._begin(source, target)

    def record(self) -> _Recorded:
        """See Device."""
        with self._lock:
            self.recorded += 1
            hidden = []
            for memory, shown in self._shown:
                places = (memory != shown).nonzero().squeeze(1)
                hidden.append((memory, places, memory[places]))
                memory[places] = ~memory[places]
                shown[places] = memory[places]
            event = _Recorded(self, hidden)
            self._events.append(event)
            return event

    def stream(self, *, outward: bool) -> AbstractContextManager[object]:
        """See Device."""
        return nullcontext()

    def synchronize(self) -> None:
        """See Device."""
        with self._lock:
            self._run(len(self._open))

    def check(self) -> None:
        """Assert that every copy and event was waited for, and that no host memory is pinned."""
        assert not self._open, self
        assert not self._events, f"{len(self._events)} events that nobody waited for"
        self.memory.check()
        assert not self._pinned, "host memory is still pinned"

    def _show(self, event: _Recorded) -> None:
        """Let all that was recorded up to `event` come true, in order as on a stream."""
        with self._lock:
            while not event.done:
                first = self._events.pop(0)
                for (memory, places, true), (_, shown) in zip(
                    first.hidden, self._shown, strict=True
                ):
                    memory[places] = shown[places] = true
                first.done = True

    def _begin(self, source: Tensor, target: Tensor) -> _Copy:
        assert source.shape == target.shape, "a copy between unequal sizes"
        copy = _Copy(self, source, target)
        with self._lock:
            self._open.append(copy)
        return copy

    def _complete(self, copy: _Copy) -> None:
        """Let some of the open copies complete, `copy` among them."""
        with self._lock:
            if copy in self._open:
                self._open.remove(copy)
                self._run(self._random.randint(0, len(self._open)))
                copy.target.copy_(copy.source)

    def _run(self, count: int) -> None:
        for _ in range(count):
            copy = self._open.pop(self._random.randrange(len(self._open)))
            copy.target.copy_(copy.source)


def _range(memory: Tensor) -> tuple[int, int]:
    return memory.data_ptr(), memory.data_ptr() + memory.nbytes


def _within(memory: Tensor, ranges: list[tuple[int, int]]) -> bool:
    start, end = _range(memory)
    return any(low <= start and end <= high for low, high in ranges)
