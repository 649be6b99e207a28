"""A device's queue of work, as the executor sees it: the host launches, and goes on.

What is launched runs in the order of the launches, some time later. The host may touch what it has
given to the device, and read what the device writes, only after a mark that was recorded behind
it. `EagerQueue` here and `LateQueue` (late_queue.py) run on the CPU, `CudaQueue` (cuda_queue.py) on
a GPU; all else is the same code on each.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], None]
"""Launches kernels and copies on the device's tensors; a GPU runs them after it has returned."""


class Mark(Protocol):
    """A place in the queue."""

    def wait(self) -> None:
        """Block, asleep, until all that was launched before it has run; in any thread."""
        ...


class GpuQueue(Protocol):
    """One queue of one device; one thread launches."""

    @property
    def device(self) -> torch.device:
        """Where tensors have to be that work is done on."""
        ...

    def host_buffer(self, size: int) -> Tensor:
        """Return `size` int64 in host memory that the device copies from and to by itself."""
        ...

    def launch(self, work: Work) -> None:
        """Do `work` after all that was launched before."""
        ...

    def capture(self, work: Work) -> Work:
        """Return what launches all of `work` at once, to be called as often as one likes.

        `work` runs once or more before this returns, and what was launched before it has then
        ended. It reads and writes the same tensors in each replay, so these must stay where they
        are, and it must not depend on what they hold. Tensors that it makes have memory that is
        shared with other captures: what of them is to outlive the next launch must be copied.
        """
        ...

    def record(self) -> Mark:
        """Return the end of all that was launched so far."""
        ...


class EagerQueue:
    """Implements `GpuQueue` on the CPU: whatever is launched has run before `launch` returns."""

    def __repr__(self) -> str:
        return "<EagerQueue>"

    @property
    def device(self) -> torch.device:
        """See GpuQueue."""
        return torch.device("cpu")

    def host_buffer(self, size: int) -> Tensor:
        """See GpuQueue."""
        return torch.zeros(size, dtype=torch.int64)

    def launch(self, work: Work) -> None:
        """See GpuQueue."""
        with torch.inference_mode():
            work()

    def capture(self, work: Work) -> Work:
        """See GpuQueue: a replay is `work` once more, on the same tensors."""
        self.launch(work)
        return lambda: self.launch(work)

    def record(self) -> Mark:
        """See GpuQueue."""
        return _Past()


class _Past:
    """The end of what has ended already."""

    def wait(self) -> None:
        """See Mark."""
