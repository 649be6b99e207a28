"""A group over one of torch's process groups: Gloo between CPUs, NCCL between GPUs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, cast

import torch
from torch import Tensor, distributed

from baton.core.errors import RankLost
from baton.parallel.group import Exchange, even_rows


class Work(Protocol):
    """A collective that is under way."""

    def wait(self) -> bool:
        """Wait for it: the caller on CPUs, the current stream on GPUs."""
        ...


class Backend(Protocol):
    """What is called of torch's ProcessGroupGloo and ProcessGroupNCCL.

    They are called directly: torch.distributed's functions add a dispatch and the state of the
    whole process, so that one process could not hold two ranks, nor leave a mesh and join another.
    """

    def allreduce(self, tensors: list[Tensor]) -> Work: ...
    def broadcast(self, tensors: list[Tensor], opts: Any) -> Work: ...
    def send(self, tensors: list[Tensor], to: int, tag: int) -> Work: ...
    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Work: ...
    def abort(self) -> None: ...
    def _allgather_base(self, output: Tensor, x: Tensor) -> Work: ...
    def alltoall_base(
        self, output: Tensor, x: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> Work: ...


class TorchGroup:
    """See Group; made by join_mesh.

    After the first loss every call raises RankLost at once: the others' places in the order of
    calls are unknown.
    """

    def __init__(
        self, backend: object, rank: int, size: int, name: str, on_lost: Callable[[], None]
    ) -> None:
        self._backend: Backend | None = cast(Backend, backend)
        self._rank = rank
        self._size = size
        self._name = name
        self._on_lost = on_lost
        self._lost = ""

    def __repr__(self) -> str:
        return (
            f"<TorchGroup {self._name}, {self._rank} of {self._size}{', lost' * bool(self._lost)}>"
        )

    @property
    def rank(self) -> int:
        """See Group."""
        return self._rank

    @property
    def size(self) -> int:
        """See Group."""
        return self._size

    def all_reduce_(self, x: Tensor) -> Tensor:
        """See Group; both libraries reduce each part at one place, hence the same bits on all."""
        self._do("all_reduce", lambda b: b.allreduce([x]))
        return x

    def addends(self, x: Tensor) -> Sequence[Tensor]:
        """See Group."""
        return (self.all_reduce_(x),)

    def all_gather(self, x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """See Group; uneven parts travel as long as the longest, since no library has them."""
        if rows is None or len(set(rows)) == 1:
            return self._gather_even(x)
        assert len(rows) == self._size, f"{len(rows)} parts of {self._size} ranks"
        assert rows[self._rank] == x.shape[0], f"{x.shape[0]} rows at {self._rank} in {rows}"
        longest = max(rows)
        padded = x.new_empty(longest, *x.shape[1:])
        padded[: x.shape[0]] = x
        parts = self._gather_even(padded).view(self._size, *padded.shape)
        return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)])

    def reduce_scatter(self, x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """See Group; sums in the order of the ranks, in float32 where x is shorter.

        Every rank sends the others their rows and adds up its own: the bytes of a ring with one
        wait in place of size - 1, for any rows, on both libraries.
        """
        rows = even_rows(x, self._size) if rows is None else rows
        own = rows[self._rank]
        parts = self.all_to_all(x, rows, [own] * self._size)
        return parts.view(self._size, own, *x.shape[1:]).sum(0, dtype=x.dtype)

    def all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """See Group."""
        return self.start_all_to_all(x, sent, received).wait()

    def start_all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Exchange:
        """See Group; NCCL goes by a stream of its own, Gloo by a thread."""
        assert sum(sent) == x.shape[0], f"{sent} of {x.shape[0]} rows"
        output = x.new_empty(sum(received), *x.shape[1:])
        into, out_of = _bytes_by_row(output), _bytes_by_row(x)
        work = self._start(
            "all_to_all",
            lambda b: b.alltoall_base(into, out_of, list(received), list(sent)),
        )
        return _TorchExchange(self, work, (into, out_of), output)

    def broadcast_(self, x: Tensor, source: int) -> Tensor:
        """See Group."""
        options = distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        self._do("broadcast", lambda b: b.broadcast([_bytes_by_row(x)], options))
        return x

    def send(self, x: Tensor, to: int) -> None:
        """See Group."""
        self._do("send", lambda b: b.send([_bytes_by_row(x)], to, 0))

    def receive_(self, x: Tensor, source: int) -> Tensor:
        """See Group."""
        self._do("receive", lambda b: b.recv([_bytes_by_row(x)], source, 0))
        return x

    def _gather_even(self, x: Tensor) -> Tensor:
        output = x.new_empty(self._size * x.shape[0], *x.shape[1:])
        into, out_of = _bytes_by_row(output), _bytes_by_row(x)
        self._do("all_gather", lambda b: b._allgather_base(into, out_of))
        return output

    def _do(self, kind: str, start: Callable[[Backend], Work]) -> None:
        self._wait(kind, self._start(kind, start))

    def _start(self, kind: str, start: Callable[[Backend], Work]) -> Work:
        if self._backend is None:
            raise RankLost(self._lost)
        try:
            return start(self._backend)
        except RuntimeError as error:
            self._lose(kind, error)

    def _wait(self, kind: str, work: Work) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            self._lose(kind, error)

    def _lose(self, kind: str, error: RuntimeError) -> NoReturn:
        """Take a RuntimeError of torch for what it is, a lost rank."""
        reason = str(error).splitlines()[0]
        self._lost = f"{kind} of {self._name}, rank {self._rank} of {self._size}: {reason}"
        self._on_lost()
        raise RankLost(self._lost) from error

    def leave(self) -> None:
        """Cut the connections: a peer that waits for this rank gets RankLost at once."""
        self._lost = self._lost or f"{self._name} was left"
        self._backend = None  # the last reference: the sockets close with it


class NcclGroup(TorchGroup):
    """See Group, between GPUs; made by join_mesh.

    Calls return when the work is queued, and the current stream waits for it. So a loss is found by
    NCCL's watchdog, within the group's deadline: it ends the process, and its instance with it.
    """

    def leave(self) -> None:
        """Cut the connections; letting go of the last reference would wait for lost peers."""
        backend = self._backend
        super().leave()
        if backend is not None:
            backend.abort()


@dataclass(frozen=True, slots=True)
class _TorchExchange:
    """Keeps the memory that the library reads and writes."""

    group: TorchGroup
    work: Work
    memory: tuple[Tensor, Tensor]
    output: Tensor

    def wait(self) -> Tensor:
        """See Exchange."""
        self.group._wait("all_to_all", self.work)
        return self.output


def _bytes_by_row(x: Tensor) -> Tensor:
    """View x as bytes, row by row: what is only moved may be of any type, float8 too."""
    if x.ndim == 0:
        x = x[None]
    return x.view(x.shape[0], math.prod(x.shape[1:])).view(torch.uint8)
