"""Turn tokens into text while they come: a character is never split, each token costs O(1)."""

from collections.abc import Sequence
from typing import Protocol

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_PROMPT_CONTEXT = 8
"""Tokens of the prompt to start from; no decoder looks further back."""
_HELD = 8
"""Tokens held back at most. A character is at most four bytes, so at most four tokens with text:
what is longer is not the start of a character but bytes that will never be one."""
_WINDOW = 64
"""Tokens that show nothing are not kept as context beyond this."""


class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, ids: Sequence[int], /) -> str:
        """Return the text of `ids`; bytes that are no character become U+FFFD."""
        ...


class Tokens(Protocol):
    """The part of a tokenizer that WithSpecialTokens needs."""

    def decode(self, ids: Sequence[int], /, *, skip_special_tokens: bool) -> str:
        """See Decoder; special tokens such as <|endoftext|> may be shown."""
        ...


class WithSpecialTokens:
    """A decoder that shows special tokens too."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def decode(self, ids: Sequence[int], /) -> str:
        """See Decoder."""
        return self._tokens.decode(ids, skip_special_tokens=False)


class Detokenizer:
    """Decodes one sequence's output as it grows.

        _ids:  [ shown last | held ]      new text = decode(_ids)[_shown:]
                              ^ decodes to …U+FFFD: perhaps half a character

    Decoding starts at the tokens that were shown last, because some decoders treat a sequence's
    first token otherwise (they strip its leading space); their text is cut off again.
    """

    def __init__(self, decoder: Decoder, prompt: Sequence[int] = ()) -> None:
        """`prompt` is what the output follows; only its last tokens are looked at."""
        self._decoder = decoder
        self._ids = list(prompt[-_PROMPT_CONTEXT:])
        text = decoder.decode(self._ids) if self._ids else ""
        if text.endswith(_INCOMPLETE):
            self._ids, text = [], ""
        self._shown = len(text)
        self._held = 0

    def push(self, tokens: Sequence[int]) -> str:
        """Return the text that became certain with `tokens`, which may be empty."""
        if not tokens:
            return ""
        self._ids += tokens
        self._held += len(tokens)
        text = self._decoder.decode(self._ids)
        if text.endswith(_INCOMPLETE):
            return self._push_incomplete(text)
        return self._show(text)

    def flush(self) -> str:
        """Return what was held back, at the end of the sequence."""
        if not self._held:
            return ""
        return self._show(self._decoder.decode(self._ids))

    def _show(self, text: str) -> str:
        """Show all of `text`, which is the whole window's, and move the window on."""
        new = text[self._shown :]
        if new or len(self._ids) > _WINDOW:
            self._ids = self._ids[-self._held :]
            self._shown = len(self._decoder.decode(self._ids))
        self._held = 0
        return new

    def _push_incomplete(self, text: str) -> str:
        """Hold back what may be the start of a character, and no more than that."""
        if self._held <= _HELD:
            return ""
        for held in range(1, _HELD):
            left = self._decoder.decode(self._ids[:-held])
            right = self._decoder.decode(self._ids[-held:])
            # Equal only if no character spans the cut: half characters on both sides of it would
            # decode to more U+FFFD than the one character, or half character, that they make.
            if right and left + right == text:
                new = left[self._shown :]
                self._ids, self._shown, self._held = self._ids[-held:], 0, held
                return new
        return self._show(text)
