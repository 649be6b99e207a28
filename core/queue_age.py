"""How long a queue makes wait, told by looking at it now and then. Pure: no clock."""

from collections import deque

_MOST_MARKS = 1024


class QueueAge:
    """Who looks costs the queue nothing: it only counts its entries.

    An entry is dated by the first look that counted it, so that it is older than what is told, by
    the time between two looks at most.
    """

    def __init__(self) -> None:
        self._marks: deque[tuple[int, float]] = deque(maxlen=_MOST_MARKS)
        """How many entries had been counted, and when; both rise."""

    def seen(self, entries: int, oldest: int | None, now: float) -> float:
        """Return for how many seconds the entry of number `oldest` has waited at least.

        `entries` have come so far, and are numbered from 0; `oldest` None: nobody waits.
        """
        if not self._marks or entries > self._marks[-1][0]:
            self._marks.append((entries, now))
        while self._marks and (oldest is None or self._marks[0][0] <= oldest):
            self._marks.popleft()
        return now - self._marks[0][1] if self._marks else 0.0
