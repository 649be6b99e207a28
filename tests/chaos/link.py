"""A TCP proxy between decode and one prefill process: a link that can be cut, frozen or slow."""

import asyncio
import contextlib

_PIECE = 1 << 16


class Link:
    """Listens on a port of its own, which stays the same when the process behind it is replaced."""

    def __init__(self) -> None:
        self.address = ""
        """Where decode connects."""
        self.upstream = ""
        """host:port of the process that serves now."""
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._delay_s = 0.0

    async def start(self) -> None:
        """Begin to listen."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.address = f"{host}:{port}"

    async def close(self) -> None:
        """Stop listening and cut what is open."""
        assert self._server is not None, "not started"
        self._server.close()
        self.mend()
        self.cut()
        await self._server.wait_closed()

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._writers) // 2

    def cut(self) -> None:
        """Reset every connection; new ones are accepted."""
        for writer in list(self._writers):
            writer.transport.abort()

    def freeze(self) -> None:
        """Pass nothing on until `mend`, though all stays connected."""
        self._open.clear()

    def slow(self, delay_s: float) -> None:
        """Hold every piece back for `delay_s` until `mend`."""
        self._delay_s = delay_s

    def mend(self) -> None:
        """Be a good link again."""
        self._delay_s = 0.0
        self._open.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.upstream.rpartition(":")
        try:
            there = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, there[1]}
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._copy(reader, there[1]))
                tasks.create_task(self._copy(there[0], writer))
        finally:
            for end in (writer, there[1]):
                end.transport.abort()
                self._writers.discard(end)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Copy until either side ends; then both are closed, as a broken link would be."""
        with contextlib.suppress(OSError):
            while piece := await reader.read(_PIECE):
                await asyncio.sleep(self._delay_s)
                await self._open.wait()
                writer.write(piece)
                await writer.drain()
        writer.transport.abort()
