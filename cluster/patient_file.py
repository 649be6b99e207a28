"""Output that keeps nobody waiting for a disk.

An event loop that waits for its log's disk renews no lease and answers nobody. So a thread writes,
and whoever writes a line waits for it only while the disk is quick: what a process says last before
it ends is then in its log, as it always was. A disk that is slow, but never stuck, takes a tenth
of that loop's time at most.
"""

import io
import os
import threading
from collections import deque

from baton.core.clock import monotonic

_KEPT_CHARACTERS = 1 << 20
"""That wait for the disk; what comes beyond is dropped, and counted."""
_PATIENCE_S = 1.0
"""For a line to be written; after that, nobody waits until the disk has caught up."""
_QUICK_S = 0.01
_REST = 9.0
"""Who has waited for longer than `_QUICK_S` waits for no line for so many times as long."""


class PatientFile(io.TextIOBase):
    """A text file over a descriptor, which stays the caller's; from any thread."""

    encoding = "utf-8"

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._news = threading.Condition()
        self._lines: deque[str] = deque()
        self._kept = 0
        self._dropped = 0
        self._late = False
        self._rests_until = 0.0
        threading.Thread(target=self._write_all, name="log-writer", daemon=True).start()

    def __repr__(self) -> str:
        return f"PatientFile({self._descriptor}, kept={self._kept}, late={self._late})"

    def fileno(self) -> int:
        """Return the descriptor; what is written to it directly waits for the disk."""
        return self._descriptor

    def writable(self) -> bool:
        """Return that it can be written to."""
        return True

    def write(self, text: str) -> int:
        """Take some text; at the end of a line, wait a little for it to be written."""
        with self._news:
            if self._kept + len(text) > _KEPT_CHARACTERS:
                self._dropped += 1
                return len(text)
            self._keep(self._gap() + text)
        if text.endswith("\n"):
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Wait until everything is written, unless the disk is late, or was just now."""
        with self._news:
            began = monotonic()
            if self._late or began < self._rests_until:
                return
            self._late = not self._news.wait_for(lambda: not self._kept, _PATIENCE_S)
            waited = monotonic() - began
            if waited > _QUICK_S:
                self._rests_until = began + waited * (1 + _REST)

    def _gap(self) -> str:
        """Return a line in the place of those that were dropped, if any were."""
        dropped, self._dropped = self._dropped, 0
        return f"[{dropped} lines were dropped: the disk was too slow]\n" if dropped else ""

    def _keep(self, text: str) -> None:
        self._lines.append(text)
        self._kept += len(text)
        self._news.notify_all()

    def _write_all(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._lines)
                text = "".join(self._lines)
                self._lines.clear()
            _write(self._descriptor, text.encode(errors="replace"))
            with self._news:
                self._kept -= len(text)
                if not self._kept:
                    self._late = False
                    if gap := self._gap():
                        self._keep(gap)
                self._news.notify_all()


def _write(descriptor: int, data: bytes) -> None:
    """Write all of it; what a full disk refuses is lost."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except OSError:
            return
