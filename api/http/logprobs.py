"""Logprobs as OpenAI's two endpoints write them."""

import codecs
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from baton.api.text_stream import Piece

Json = dict[str, Any]
TokenBytes = Callable[[int], bytes]
"""The bytes of a token, perhaps a part of a character: Tokenizer.token_bytes."""


class LogprobsWriter(Protocol):
    """Writes the logprobs of one choice."""

    def of(self, piece: Piece) -> Json | None:
        """Return a piece's logprobs, or None if there are none; the pieces come in order."""
        ...

    @staticmethod
    def joined(parts: Sequence[Json]) -> Json | None:
        """Return what `of` returned for several pieces as one."""
        ...


class CompletionLogprobs:
    """Writes the logprobs of one choice of a completion, piece by piece."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def of(self, piece: Piece) -> Json | None:
        """See LogprobsWriter."""
        if not piece.logprobs:
            return None
        found: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, told in zip(piece.tokens, piece.logprobs, strict=True):
            data = self._token_bytes(token)
            text = completion_token(data)
            # As OpenAI has it, the sampled token is among the likeliest even where it is not.
            top = {completion_token(self._token_bytes(id_)): value for id_, value in told.top}
            found["tokens"].append(text)
            found["token_logprobs"].append(told.logprob)
            found["top_logprobs"].append({**top, text: told.logprob})
            found["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(data))
        return found

    @staticmethod
    def joined(parts: Sequence[Json]) -> Json | None:
        """See LogprobsWriter."""
        if not parts:
            return None
        return {name: [entry for part in parts for entry in part[name]] for name in parts[0]}


def completion_token(data: bytes) -> str:
    """Return a token's text; of a part of a character, OpenAI's way to write bytes."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class ChatLogprobs:
    """Writes the logprobs of one choice of a chat, piece by piece."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes

    def of(self, piece: Piece) -> Json | None:
        """See LogprobsWriter."""
        if not piece.logprobs:
            return None
        content = [
            {
                **self._entry(token, told.logprob),
                "top_logprobs": [self._entry(id_, value) for id_, value in told.top],
            }
            for token, told in zip(piece.tokens, piece.logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> Json:
        data = self._token_bytes(token)
        return {
            "token": data.decode(errors="replace"),
            "logprob": logprob,
            "bytes": list(data),
        }

    @staticmethod
    def joined(parts: Sequence[Json]) -> Json | None:
        """See LogprobsWriter."""
        if not parts:
            return None
        return {"content": [entry for part in parts for entry in part["content"]], "refusal": None}
