"""Which instance a session would rather go to: the same at every gateway, with nothing said.

Rendezvous hashing (Thaler and Ravishankar, 1998): each instance draws a number from its name and
the session's, and the highest wins. One that comes or goes moves only the sessions that it wins.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from baton.core.hashing import hash_bytes

Marks = NDArray[np.uint64]

_ODD = np.uint64(0x9E37_79B9_7F4A_7C15)
_MIX = np.uint64(0xBF58_476D_1CE4_E5B9)


def mark_of(name: str) -> np.uint64:
    """Return the 64 bits by which an instance or a session takes part."""
    return np.uint64(int.from_bytes(hash_bytes(name.encode(errors="surrogatepass"))[:8], "little"))


def marks_of(names: Sequence[str]) -> Marks:
    """Return those of many."""
    return np.array([mark_of(name) for name in names], np.uint64)


def scores(instances: Marks, session: np.uint64) -> Marks:
    """Return how much a session would like each instance; the highest is its own."""
    with np.errstate(over="ignore"):
        mixed = (instances ^ session) * _ODD
        mixed ^= mixed >> np.uint64(29)
        result: Marks = mixed * _MIX
    return result ^ (result >> np.uint64(32))
