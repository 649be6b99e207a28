"""Find stop strings in text that comes in pieces, and never show a part of one."""


class StopStrings:
    """Scans one request's text.

    The text ends before the stop string that is complete first; of several that are complete at
    the same character, before the longest. So the result does not depend on how the text is cut.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        """`stop` are non-empty strings; none at all is allowed and holds nothing back."""
        self._stop = stop
        self._held = ""
        self.stopped = False
        """A stop string has been found; nothing more may be pushed."""

    def push(self, text: str) -> str:
        """Return the text that is certainly before any stop string; may set `stopped`."""
        assert not self.stopped
        if not self._stop:
            return text
        text = self._held + text
        start = self._find(text)
        if start is not None:
            self.stopped = True
            self._held = ""
            return text[:start]
        held = max(overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> int | None:
        """Return where the stop string that is complete first begins."""
        found = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stop if stop in text]
        if not found:
            return None
        end, negative_length = min(found)
        return end + negative_length


def overlap(text: str, tag: str) -> int:
    """Return the length of the longest end of `text` that is a beginning, not all, of `tag`."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
