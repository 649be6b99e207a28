"""The Python client of Baton's gRPC API: Client blocks, AsyncClient does not.

    from baton.client import Client, Options

    with Client("127.0.0.1:8001") as client:
        for text in client.generate("def add(a, b):", Options(max_tokens=64)):
            print(text, end="", flush=True)

It needs grpcio and protobuf, and nothing of the server. Errors are those of baton.core.errors.
"""

from baton.client.answer import Choice, Chunk, Completion, ServerTiming, Timing
from baton.client.async_client import AsyncClient
from baton.client.channel import ClientTls
from baton.client.options import Message, Options, Prompt
from baton.client.retries import Retry
from baton.client.sync_client import Client
from baton.core.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    Overloaded,
    Unauthenticated,
    Unavailable,
    UnknownModel,
)

__all__ = [
    "AsyncClient",
    "BatonError",
    "Cancelled",
    "Choice",
    "Chunk",
    "Client",
    "ClientTls",
    "Completion",
    "DeadlineExceeded",
    "Forbidden",
    "InvalidRequest",
    "Message",
    "Options",
    "Overloaded",
    "Prompt",
    "Retry",
    "ServerTiming",
    "Timing",
    "Unauthenticated",
    "Unavailable",
    "UnknownModel",
]
