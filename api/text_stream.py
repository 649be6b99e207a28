"""One request's tokens become the text that its user sees: decoded, and cut at a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass

from baton.api.detokenize import Detokenizer
from baton.api.stop_strings import StopStrings
from baton.core.request import FinishReason, TokenLogprobs
from baton.core.spans import TtftSpans


@dataclass(frozen=True, slots=True)
class Piece:
    """What became certain at once."""

    text: str
    """May be empty: a character, or what may be a stop string, is not complete yet."""
    tokens: tuple[int, ...]
    """The tokens generated since the last piece, stop token included."""
    finish: FinishReason | None = None
    """Set in the last piece only."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each of `tokens`, if they were asked for."""
    cached_tokens: int = 0
    """Prompt tokens that a prefix cache had; set in the last piece only."""
    ttft: TtftSpans | None = None
    """Where the time to first token went; set in the last piece only."""


class TextStream:
    """Pure: tokens in, pieces out."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stop: tuple[str, ...],
        stop_token_ids: tuple[int, ...],
        min_tokens: int = 0,
    ) -> None:
        """No stop string is looked for in the text of the first `min_tokens` tokens."""
        self._detokenizer = detokenizer
        self._stops = StopStrings(stop)
        self._has_stops = bool(stop)
        self._stop_token_ids = frozenset(stop_token_ids)
        self._unchecked = min_tokens

    def push(self, tokens: Sequence[int], finish: FinishReason | None = None) -> Piece:
        """Take the next tokens, and with `finish` the end; a stop string ends it earlier."""
        shown = tokens
        if tokens and tokens[-1] in self._stop_token_ids:
            shown = tokens[:-1]
        if self._has_stops:
            text, used = self._push_one_by_one(shown)
            if self._stops.stopped:
                return Piece(text, tuple(tokens[:used]), FinishReason.STOP)
        else:
            text = self._detokenizer.push(shown)
        if finish is not None:
            text += self._stops.push(self._detokenizer.flush())
            text += self._stops.flush()
            finish = FinishReason.STOP if self._stops.stopped else finish
        return Piece(text, tuple(tokens), finish)

    def _push_one_by_one(self, tokens: Sequence[int]) -> tuple[str, int]:
        """Return the text and how many tokens it took: those after a stop string do not count."""
        text = ""
        for used, token in enumerate(tokens, start=1):
            new = self._detokenizer.push([token])
            if self._unchecked:
                self._unchecked -= 1
                text += new
                continue
            text += self._stops.push(new)
            if self._stops.stopped:
                return text, used
        return text, len(tokens)
