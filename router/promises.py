"""How quick the tokens of open requests have to be: whoever joins a batch slows down all in it."""

from collections import Counter

import numpy as np

from baton.router.fleet import Pool
from baton.router.load import InstanceKey
from baton.router.regression import Vector


class Promises:
    """The promised times per token of one gateway's requests, by decode instance."""

    def __init__(self) -> None:
        self._promised: dict[InstanceKey, Counter[float]] = {}

    def __repr__(self) -> str:
        return f"Promises({self._promised})"

    def __len__(self) -> int:
        """Return at how many instances something is promised."""
        return len(self._promised)

    def came(self, key: InstanceKey, tpot_s: float | None) -> None:
        """Note a request at an instance, and what it was promised; None: nothing."""
        if tpot_s is not None:
            self._promised.setdefault(key, Counter())[tpot_s] += 1

    def left(self, key: InstanceKey, tpot_s: float | None) -> None:
        """It is there no more."""
        if tpot_s is None:
            return
        there = self._promised[key]
        there[tpot_s] -= 1
        if not there[tpot_s]:
            del there[tpot_s]
        if not there:
            del self._promised[key]

    def tightest(self, pool: Pool) -> Vector:
        """Return the shortest that was promised at each instance, in seconds; infinity: none."""
        found: Vector = np.full(len(pool), np.inf)
        for key, there in self._promised.items():
            if key in pool.places:
                found[pool.places[key]] = min(there)
        return found
