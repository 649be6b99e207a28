"""The faults that wait inside a process: each strikes at the n-th event of its kind."""

from collections import Counter
from collections.abc import Callable, Sequence

from .schedule import Fault


class Armed:
    """Counts events since `arm`, and says which fault strikes at each. Safe from any thread.

    Every event is told as {"event": name}, every strike as {"struck": kind, ...}.
    """

    def __init__(self, tell: Callable[[dict[str, object]], None]) -> None:
        self._tell = tell
        self._faults: list[Fault] = []
        self._counts: Counter[str] = Counter()

    def arm(self, faults: Sequence[Fault]) -> None:
        """Forget what is left of the last run, and begin to count."""
        self._faults = list(faults)
        self._counts.clear()

    def happened(self, event: str) -> list[Fault]:
        """Count an event; return the faults that are due."""
        self._counts[event] += 1
        due = [f for f in self._faults if (f.event, f.count) == (event, self._counts[event])]
        self._faults = [fault for fault in self._faults if fault not in due]
        self._tell({"event": event})
        return due

    def put_off(self, fault: Fault) -> None:
        """Let a fault that could not strike here strike at the next event of its kind."""
        again = {"event": fault.event, "count": self._counts[fault.event] + 1}
        self._faults.append(Fault(**(fault.__dict__ | again)))

    def struck(self, fault: Fault, what: str) -> None:
        """Say that a fault has really done something."""
        self._tell({"struck": fault.kind, "what": what})
