"""Calls among the ranks of one host: slots of shared memory that take turns, and who has written.

For a call each rank writes into a slot of its own, tells every peer so by a message on a socket,
waits for theirs, and reads what slots it likes:

    turn 0   slot of rank 0 | slot of rank 1 | …
    turn 1   slot of rank 0 | slot of rank 1 | …

When a rank writes turn 0 again, all peers have spoken in the call between, hence have read what
was in turn 0 before. The messages go through the kernel, so that what was written before the one
is seen after the other on every processor, and a waiting rank sleeps and leaves its core to those
it waits for; a peer's death ends the wait at once.
"""

import socket
import struct
from collections.abc import Callable
from typing import NoReturn

from baton.core.errors import RankLost
from baton.parallel.group import Group
from baton.parallel.host_links import HostLinks

TURNS = 2
_MESSAGE = struct.Struct("<4Q")  # which call, and what the kind of call says

Said = tuple[int, int, int]


class HostTurns:
    """One rank's side; one call at a time."""

    def __init__(self, links: HostLinks, group: Group, on_lost: Callable[[], None]) -> None:
        """`group` has the same ranks, and names what was lost."""
        self.rank, self.size = group.rank, group.size
        self.slots = links.memory.view(TURNS, group.size, -1)
        """[turns, ranks, bytes] uint8"""
        self.limit = self.slots.shape[2]
        """Bytes of a slot."""
        self.peers = tuple(links.sockets)
        """The other ranks."""
        self.calls = 0
        """That were begun."""
        self._links = links
        self._name = str(group)
        self._on_lost = on_lost
        self._under_way = False
        self._lost = ""

    def __repr__(self) -> str:
        return f"<HostTurns of {self._name}, {self.calls} calls>"

    def begin(self) -> int:
        """Begin a call and return its turn, in which the own slot may be written now."""
        if self._lost:
            raise RankLost(self._lost)
        assert not self._under_way, "a call before the end of the last one"
        self._under_way = True
        self.calls += 1
        return self.calls % TURNS

    def tell(self, place: int, said: Said) -> None:
        """Tell a peer that the own slot is written."""
        try:
            self._links.sockets[place].send(_MESSAGE.pack(self.calls, *said))
        except OSError as error:
            self._lose(place, error)

    def hear(self, place: int) -> Said:
        """Wait until a peer has written its slot; return what it says."""
        try:
            message = self._links.sockets[place].recv(_MESSAGE.size)
        except OSError as error:
            self._lose(place, error)
        if not message:
            self._lose(place, ConnectionResetError("it is gone"))
        call, *said = _MESSAGE.unpack(message)
        assert call == self.calls, f"rank {place} is in call {call}, this one in {self.calls}"
        first, second, third = said
        return first, second, third

    def end(self) -> None:
        """End a call whose slots have been told and heard of; they may be read until the next."""
        self._under_way = False

    def meet(self, said: Said) -> None:
        """Tell all peers the same and wait for all; they say the same if all are in step."""
        for place in self.peers:
            self.tell(place, said)
        for place in self.peers:
            heard = self.hear(place)
            assert heard == said, f"rank {place} says {heard}, this one {said}"
        self.end()

    def leave(self) -> None:
        """Hang up on the peers: those that wait get RankLost."""
        self._lost = self._lost or f"{self._name} was left"
        self._links.close()

    def limit_waits(self, deadline_s: float) -> None:
        """Let every wait for a peer end after the deadline, with RankLost."""
        whole, part = divmod(deadline_s, 1)
        wait = struct.pack("@ll", int(whole), int(part * 1e6))
        for link in self._links.sockets.values():
            # One system call a wait, where Python's own time-outs poll first.
            link.settimeout(None)
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)

    def _lose(self, place: int, error: OSError) -> NoReturn:
        late = isinstance(error, BlockingIOError)
        reason = "it was silent beyond the deadline" if late else str(error)
        self._lost = f"rank {place} of {self._name}: {reason}"
        self._on_lost()
        raise RankLost(self._lost) from error
