"""Many requests by one call: what is sent waits until the server has room for it."""

import asyncio
import threading
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator

from baton.client.answer import Chunk, chunk_of
from baton.client.options import Options, Prompt, request_of
from baton.core.errors import BatonError
from baton.proto import inference_pb2 as pb
from baton.proto.errors import from_error_message

Item = tuple[str, Prompt, Options]
"""(id, prompt, options)."""


def event_of(told: pb.BatchResponse) -> Chunk | BatonError | None:
    """Return what a message says of its request; None: it says nothing of any."""
    match told.WhichOneof("event"):
        case "response":
            return chunk_of(told.response)
        case "error":
            return from_error_message(told.error)
        case _:
            return None


class _Choices:
    """Counts the choices of open requests."""

    def __init__(self) -> None:
        self._left: dict[str, int] = {}

    def begin(self, item: Item) -> pb.BatchRequest:
        """Return the message that begins a request."""
        name, prompt, options = item
        self._left[name] = options.n or 1
        return pb.BatchRequest(id=name, generate=request_of(prompt, options))

    def places_freed(self, told: pb.BatchResponse) -> int:
        """Return how many more requests there is room for since a message came."""
        match told.WhichOneof("event"):
            case "opened":
                return told.opened.max_open
            case "error":
                self._left.pop(told.id, None)
                return 1
            case "response" if told.response.finish_reason:
                self._left[told.id] -= 1
                if not self._left[told.id]:
                    del self._left[told.id]
                    return 1
        return 0


class Sending(Iterator[pb.BatchRequest]):
    """What gRPC takes from a thread of its own; `heard` and `stop` are called by the reader."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = iter(items)
        self._choices = _Choices()
        self._places = threading.Semaphore(0)
        self._stopped = False
        self.failed: Exception | None = None
        """What the iterable raised, or was wrong with what it gave: nothing is sent after that."""

    def __next__(self) -> pb.BatchRequest:
        self._places.acquire()
        if self._stopped:
            raise StopIteration
        try:
            return self._choices.begin(next(self._items))
        except StopIteration:
            raise
        except Exception as error:
            self.failed = error
            raise StopIteration from None

    def heard(self, told: pb.BatchResponse) -> None:
        """Let go on what waited for it."""
        if freed := self._choices.places_freed(told):
            self._places.release(freed)

    def stop(self) -> None:
        """Let the thread end."""
        self._stopped = True
        self._places.release()


class AsyncSending:
    """The same for asyncio."""

    def __init__(self, items: Iterable[Item] | AsyncIterable[Item]) -> None:
        self._items = items
        self._choices = _Choices()
        self._places = asyncio.Semaphore(0)
        self.failed: Exception | None = None
        """What the iterable raised, or was wrong with what it gave: nothing is sent after that."""

    async def messages(self) -> AsyncIterator[pb.BatchRequest]:
        """Yield what is to be sent, once there is room for it."""
        try:
            async for item in _each(self._items):
                await self._places.acquire()
                yield self._choices.begin(item)
        except Exception as error:
            self.failed = error

    def heard(self, told: pb.BatchResponse) -> None:
        """Let go on what waited for it."""
        for _ in range(self._choices.places_freed(told)):
            self._places.release()


async def _each(items: Iterable[Item] | AsyncIterable[Item]) -> AsyncIterator[Item]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
