"""What may go wrong on a wire, as a value: which read suffers what follows from a seed."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Fault(StrEnum):
    """What happens to one read."""

    FAIL = "fail"
    """It fails, nothing copied."""
    LATE = "late"
    """It is carried out some turns of the event loop later, on what then lies in the source."""
    TWICE = "twice"
    """It is carried out at once, and again later, before it is reported."""
    OUT_OF_ORDER = "out of order"
    """It waits until a read that was posted after it has completed, or some turns."""
    TRUNCATED = "truncated"
    """The second half of each run is not copied; the report looks well."""
    FLIPPED = "flipped"
    """One bit is wrong; the report looks well."""
    HANG = "hang"
    """It stays open until the peer is removed."""
    DIE = "die"
    """The peer dies when half of the runs are copied."""


SILENT = frozenset({Fault.LATE, Fault.TWICE, Fault.TRUNCATED, Fault.FLIPPED})
"""The report says that all is well, but the bytes may be wrong: only a digest tells."""


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """The faults of a transport's reads, counted from 0."""

    script: tuple[Fault | None, ...] = ()
    """For the first reads."""
    rates: Mapping[Fault, float] = field(default_factory=dict)
    """For the reads after these: how likely each fault is, in all at most 1."""
    seed: int = 0

    def __post_init__(self) -> None:
        total = sum(self.rates.values())
        if min(self.rates.values(), default=0.0) < 0 or total > 1:
            raise ValueError(f"rates: {dict(self.rates)} are not allowed; allowed: 0 to 1 in all")

    def fault(self, read: int) -> Fault | None:
        """Return what happens to read number `read`: the same for the same plan, on any machine."""
        if read < len(self.script):
            return self.script[read]
        draw = random.Random(f"{self.seed} {read}").random()
        for fault in sorted(self.rates):
            draw -= self.rates[fault]
            if draw < 0:
                return fault
        return None

    def draw(self, read: int, below: int) -> int:
        """Return a number from 0 up to `below` for a detail of read number `read`."""
        return random.Random(f"{self.seed} {read} detail").randrange(below)
