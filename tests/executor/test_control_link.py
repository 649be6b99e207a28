"""The connection between the leader and another rank, over a real socket."""

import queue
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from baton.core.errors import TransportError
from baton.executor import control_link
from baton.executor.control_link import ControlLink, accept, connect
from baton.kv_transfer.link.auth import Parties

PATIENCE_S = 60.0
SECRET = b"a secret of the cluster"
PARTIES = Parties("decode-0/1", 7, "decode-0", 7)


class End:
    """One side: what it heard, and why it ended."""

    def __init__(self, connection: socket.socket, silence_s: float = 1000.0) -> None:
        self.heard: queue.Queue[Any] = queue.Queue()
        self.ended: queue.Queue[str] = queue.Queue()
        self.link = ControlLink(
            connection,
            silence_s=silence_s,
            on_message=self.heard.put,
            on_end=self.ended.put,
        )
        self.thread = threading.Thread(target=self.link.run, daemon=True)
        self.thread.start()

    def next(self) -> Any:
        return self.heard.get(timeout=PATIENCE_S)

    def why(self) -> str:
        return self.ended.get(timeout=PATIENCE_S)


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    with theirs, ours:
        yield ours, theirs


def test_messages_come_in_order_and_as_they_were(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = map(End, sockets)
    messages = [["step", [1, [[3, 9]], [], []]], ["call", 2, "read", [b"\0" * 100_000]], 1.5]
    for message in messages:
        ours.link.send(message)
        ours.link.beat()
    assert [theirs.next() for _ in messages] == messages
    theirs.link.send("back")
    assert ours.next() == "back"


def test_the_end_of_the_other_process_is_noticed(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = sockets
    end = End(ours)
    theirs.close()
    assert end.why() == "its connection ended"
    end.thread.join(PATIENCE_S)
    assert not end.thread.is_alive()


def test_silence_is_an_end_and_a_heartbeat_is_none(
    sockets: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_link, "TICK_S", 0.01)
    ours, _ = sockets
    assert End(ours, silence_s=0.05).why() == "it has been silent for 0.05 s"


def test_what_is_no_message_ends_the_connection(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = sockets
    end = End(ours)
    theirs.sendall(b"\xff\xff\xff\xff")
    assert "a message of 4294967295 bytes" in end.why()


def test_an_end_that_was_asked_for_is_no_news(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    end = End(sockets[0])
    end.link.close()
    end.thread.join(PATIENCE_S)
    assert not end.thread.is_alive()
    end.link.send("too late")
    assert end.ended.empty()


@pytest.mark.parametrize(
    ("secret", "parties", "why"),
    [
        (SECRET, PARTIES, None),
        (b"another secret, of others", PARTIES, "does not have this cluster's secret"),
        (SECRET, Parties("decode-0/1", 8, "decode-0", 8), "another incarnation"),
    ],
)
def test_only_ranks_of_this_incarnation_are_let_in(
    secret: bytes, parties: Parties, why: str | None
) -> None:
    let_in: queue.Queue[str | TransportError] = queue.Queue()

    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            try:
                let_in.put(accept(connection, SECRET, ("decode-0", 7)))
            except TransportError as error:
                let_in.put(error)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=[server], daemon=True)
        thread.start()
        if why is None:
            connect(server.getsockname(), secret, parties).close()
            assert let_in.get(timeout=PATIENCE_S) == "decode-0/1"
        else:
            with pytest.raises(TransportError, match=why):
                connect(server.getsockname(), secret, parties)
            assert isinstance(let_in.get(timeout=PATIENCE_S), TransportError)
        thread.join(PATIENCE_S)


def test_a_leader_that_is_not_there_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    with pytest.raises(TransportError, match=f"the leader at 127.0.0.1:{address[1]}"):
        connect(address, SECRET, PARTIES)
