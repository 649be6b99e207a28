"""Run a function on every rank of a mesh, one process per rank, on 127.0.0.1.

    def all_sum(ranks: Ranks, place: Place, start: int) -> float:
        return float(ranks.tp.all_reduce_(torch.tensor([start + place.tp])))

    assert run_ranks(Mesh(tp=2), all_sum, 1) == [3, 3]

The function and its arguments are pickled: it is a function of a module, and what it returns is
no tensor that shares memory, but numbers, bytes or numpy arrays.
"""

import contextlib
import multiprocessing
import socket
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from time import monotonic
from types import TracebackType
from typing import Any

from baton.parallel.join import Library, Meeting, join_mesh, listen
from baton.parallel.mesh import Mesh

PATIENCE_S = 60.0
"""For one call of a function on all ranks."""

_FORKS = multiprocessing.get_context("forkserver")
# A fork of a process that has torch in memory, and what test modules import, is ready at once.
_FORKS.set_forkserver_preload(["baton.parallel.join", "hypothesis", "pytest"])


class RankFailed(AssertionError):
    """A function raised on a rank, or its process ended or did not answer."""


def run_ranks(
    mesh: Mesh, function: Callable[..., Any], *args: Any, deadline_s: float = PATIENCE_S
) -> list[Any]:
    """Return what `function(ranks, place, *args)` returns on each rank, by rank."""
    with RankProcesses() as processes:
        return processes.run(mesh, function, *args, deadline_s=deadline_s)


class RankProcesses:
    """Processes that serve as ranks of one mesh after the other; started as they are needed."""

    def __init__(self, library: Library = "gloo") -> None:
        self._library = library
        self._workers: list[_Worker] = []

    def __enter__(self) -> "RankProcesses":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def run(
        self,
        mesh: Mesh,
        function: Callable[..., Any],
        *args: Any,
        deadline_s: float = PATIENCE_S,
    ) -> list[Any]:
        """See run_ranks; the groups' deadline is `deadline_s`. Kills all if one fails."""
        outcomes = self.outcomes(mesh, function, *args, deadline_s=deadline_s)
        failed = [f"rank {i}: {o}" for i, o in enumerate(outcomes) if isinstance(o, RankFailed)]
        if failed:
            self.kill()
            raise RankFailed("\n".join(failed))
        return outcomes

    def outcomes(
        self,
        mesh: Mesh,
        function: Callable[..., Any],
        *args: Any,
        deadline_s: float = PATIENCE_S,
        lost: int | None = None,
    ) -> list[Any]:
        """Return what each rank returned, or a RankFailed that says why it returned nothing.

        Rank `lost` is not waited for and killed after the others have answered.
        """
        until = monotonic() + PATIENCE_S
        while len(self._workers) < mesh.size:
            self._workers.append(_Worker())
        workers = self._workers[: mesh.size]
        workers[0].pipe.send("listen")
        port = workers[0].answer(until)
        if isinstance(port, RankFailed):
            self.kill()
            raise port
        for rank, worker in enumerate(workers):
            meeting = Meeting(mesh, "127.0.0.1", port, self._library, deadline_s)
            worker.pipe.send((meeting, rank, function, args))
        outcomes = [w.answer(until) for rank, w in enumerate(workers) if rank != lost]
        if lost is not None:
            workers[lost].kill()
            outcomes.insert(lost, RankFailed("lost"))
        if any(not worker.alive for worker in workers):
            self.kill()
        return outcomes

    def kill(self) -> None:
        """End all processes; the next run starts new ones."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()


class _Worker:
    """One process, and the pipe to it."""

    def __init__(self) -> None:
        self.pipe, theirs = _FORKS.Pipe()
        self._process = _FORKS.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self.alive = True

    def answer(self, until: float) -> Any:
        """Return its next message, or a RankFailed."""
        if not wait([self.pipe], max(0.0, until - monotonic())):
            self.alive = False
            return RankFailed("did not answer in time")
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.alive = False
            self._process.join(PATIENCE_S)
            return RankFailed(f"its process ended: {self._process.exitcode}")

    def kill(self) -> None:
        self.alive = False
        self._process.kill()
        self._process.join(PATIENCE_S)
        self.pipe.close()


def _serve(pipe: Connection) -> None:
    """Be a rank for one call after the other, until the pipe is closed."""
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while True:
            listener = None
            message = pipe.recv()
            if message == "listen":
                listener = listen("127.0.0.1")
                pipe.send(listener.getsockname()[1])
                message = pipe.recv()
            pipe.send(_outcome(*message, listener))


def _outcome(
    meeting: Meeting,
    rank: int,
    function: Callable[..., Any],
    args: Sequence[Any],
    listener: socket.socket | None,
) -> Any:
    import torch

    device = torch.device("cuda", rank) if meeting.library == "nccl" else None
    try:
        with join_mesh(meeting, rank, listener, device) as own:
            return function(own.ranks, meeting.mesh.place(rank), *args)
    except Exception:
        return RankFailed(traceback.format_exc())
