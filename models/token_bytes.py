"""The bytes that one token stands for, which a tokenizer's decoder only shows of whole texts."""

import re

import tokenizers
from tokenizers.decoders import ByteLevel

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"


def _byte_letters() -> dict[str, int]:
    """Return GPT-2's alphabet: which letter a byte-level tokenizer writes for which byte.

    Printable characters of Latin-1 stand for themselves, and what is left follows from U+0100.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = sorted(set(range(0x100)) - set(plain))
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


_BYTES = _byte_letters()


class TokenBytes:
    """Looks up tokens of one tokenizer, byte-level or of SentencePiece's kind."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._byte_level = isinstance(backend.decoder, ByteLevel)
        self._added = {
            token: added.content for token, added in backend.get_added_tokens_decoder().items()
        }

    def __call__(self, token: int) -> bytes:
        """Return the token's bytes, perhaps only a part of a character; none if it is unknown."""
        if token in self._added:
            return self._added[token].encode()
        written: str | None = self._backend.id_to_token(token)
        if written is None:
            return b""
        if self._byte_level:
            return bytes(_BYTES[letter] for letter in written)
        if byte := _BYTE_TOKEN.fullmatch(written):
            return bytes([int(byte[1], 16)])
        return written.replace(_WORD_START, " ").encode()
