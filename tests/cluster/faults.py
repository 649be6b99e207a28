"""What may befall a cluster of three nodes, and how it is drawn from a seed. Pure."""

import random
from dataclasses import dataclass

NODES = ("blip", "cut", "power_cut")
"""Befall node 2 or 3: unplugged for less than a lease; until Ray's head has given it up; off."""
PROCESSES = (
    "kill_decode",
    "kill_prefill",
    "stop_decode",
    "stop_prefill",
    "kill_controller",
    "kill_gateway",
    "stop_controller",
)
ORDERS = ("drain", "flip", "scale_up", "scale_down")
KINDS = (*PROCESSES, *NODES, *ORDERS)
_REQUESTS = (4, 6, 8)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that befalls it."""

    kind: str
    tokens: int
    """It strikes when the client has so many of all requests together."""
    target: int
    """Draws the instance or node from those that are there."""
    seconds: float
    """How long what ends by itself takes."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A load, and what befalls the cluster meanwhile."""

    seed: int
    entries: tuple[int, ...]
    """Of the catalogue; sent at once."""
    faults: tuple[Fault, ...]

    @property
    def guests(self) -> frozenset[int]:
        """Which of the requests another gateway takes, the one that is killed."""
        if all(fault.kind != "kill_gateway" for fault in self.faults):
            return frozenset()
        return frozenset(range(0, len(self.entries), 2))


def draw_schedule(seed: int, catalogue_size: int) -> Schedule:
    """Return the schedule of a seed: always the same."""
    draw = random.Random(f"three nodes {seed}")
    # One kind comes by turns, so that each has its share; another joins it at times.
    first = KINDS[seed % len(KINDS)]
    others = [kind for kind in KINDS if kind not in NODES]
    more = draw.choices(others, k=draw.choice((0, 0, 0, 1)))
    entries = tuple(draw.randrange(catalogue_size) for _ in range(draw.choice(_REQUESTS)))
    return Schedule(seed, entries, tuple(_draw_fault(draw, kind) for kind in (first, *more)))


def _draw_fault(draw: random.Random, kind: str) -> Fault:
    seconds = draw.choice((0.5, 1.5, 8.0))
    if kind == "blip":
        seconds = draw.choice((0.2, 0.7, 1.5))
    return Fault(kind, draw.randint(1, 1500), draw.randrange(1 << 16), seconds)
