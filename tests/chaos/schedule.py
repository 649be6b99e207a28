"""What one chaos run does, as a pure value drawn from a seed: the world, the requests, the faults.

A fault strikes when something has happened for the n-th time in this run (a read has begun, a
token has come, a request has ended), or after a delay. What a seed draws never depends on what
runs; how far the run has come when a fault strikes does, a little.
"""

import random
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

MODEL_DIR = Path(__file__).parents[2] / "demo_model" / "main"

SEEDS_PER_WORLD = 10
"""Neighbouring seeds share their processes, and whatever the last one left in their caches."""

IN_READS = ("flip", "truncate", "stale", "foreign", "fail", "hang", "late", "twice")
"""Strike a read of the decode instance; see faulty_transport.py."""
WRONG_BYTES = ("flip", "truncate", "stale", "foreign")
"""Those that leave other bytes than the peer's in decode's blocks, and say that all went well."""
IN_PULLS = ("pull_flip", "pull_stale", "pull_fail", "pull_hang", "pull_late")
"""The same for a read of a prefill instance: it pulls from decode's cache what it lacks itself."""
IN_PREFILL = ("overwrite", "refuse", "repeat_offer", "lose_offer")
"""Strike inside a prefill process; see faulty_prefill.py."""
LINK = ("cut", "freeze", "slow")
FROM_OUTSIDE = ("kill", "pause", "drain", *LINK)
"""Strike a prefill process, or the link to it, from outside."""
ON_DECODE = ("kill_decode", "pause_decode", "drain_decode", "cut_decode")
"""The last: the link between a decode process and the gateways."""
BY_CLIENT = ("cancel", "cancel", "hang_up")
"""Cancelling one request in the middle is what users do most."""
BEFOREHAND = ("nowhere", "crowd")
"""Part of the requests: a prefill instance that is not there; long answers that fill the pool."""
DRAWN = (*IN_READS, *IN_PULLS, *IN_PREFILL, *FROM_OUTSIDE, *ON_DECODE, *BY_CLIENT)
KINDS = tuple(dict.fromkeys((*DRAWN, *BEFOREHAND)))

PREFILLS = 2
DECODES = 2
"""Instances; each decode instance reads from both prefill instances."""


@dataclass(frozen=True)
class World:
    """The processes that a schedule runs in."""

    block_size: int
    chunk: int
    """Prompt tokens that prefill computes in one step."""
    prefill_mib: int
    decode_mib: int
    prefill_waiting: int
    """Prompts that may wait for prefill's engine; it refuses more."""
    min_read_kib: int
    prefill_cache: bool
    decode_cache: bool
    local_prefill: str
    swap_mib: int
    policy: str
    """Of decode's scheduler."""
    prefill_keeps_s: float
    """How long prefill keeps what it has offered; at times shorter than decode may take."""
    transport: str
    backup: str
    """Whether decode instances back up to each other."""


@dataclass(frozen=True)
class Ask:
    """A request: what it asks for is an entry of the catalogue."""

    entry: int
    prefill: tuple[int, ...]
    """Prefill instances in order of preference; -1 is one that does not exist."""
    after_s: float
    """When it arrives, from the start of the run."""
    guest: bool
    """Sent by the second gateway, the one that may hang up."""


@dataclass(frozen=True)
class Fault:
    kind: str
    event: str
    """read, token, done, offer or submit (the last two: of the prefill instance); or delay."""
    count: int
    """Strikes at the n-th event, from 1; milliseconds for a delay."""
    target: int
    """An instance of its role, or the request to cancel."""
    seconds: float
    """How long it lasts."""
    seed: int
    """For what the fault itself draws, such as the bit to flip."""


@dataclass(frozen=True)
class Schedule:
    seed: int
    world: World
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        lines = [f"seed {self.seed}", f"  world {asdict(self.world)}"]
        lines += [f"  ask {index}: {ask}" for index, ask in enumerate(self.asks)]
        return "\n".join(lines + [f"  {fault}" for fault in self.faults])

    @property
    def beforehand(self) -> tuple[str, ...]:
        """The kinds of fault that lie in the requests."""
        crowd = any(ask.entry >= CATALOGUE_LONG for ask in self.asks)
        nowhere = any(-1 in ask.prefill for ask in self.asks)
        return ("crowd",) * crowd + ("nowhere",) * nowhere


# --- requests --------------------------------------------------------------------------------

CATALOGUE_LONG = 40
"""Entries from here on have long answers."""
_LONG_ENTRIES = 6


@dataclass(frozen=True)
class Entry:
    """A prompt and how to go on from it."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int


@cache
def catalogue() -> tuple[Entry, ...]:
    """Return all requests there are: few enough to know the right answer to each."""
    draw = random.Random(2024)
    stems = [tuple(draw.randrange(1, 4000) for _ in range(n)) for n in (48, 70, 128, 128)]
    entries = []
    for index in range(CATALOGUE_LONG + _LONG_ENTRIES):
        stem = draw.choice(stems) if draw.random() < 0.8 else ()
        tail = tuple(draw.randrange(1, 4000) for _ in range(draw.choice((1, 7, 16, 33, 64))))
        sampled = draw.random() < 0.5
        length = draw.randint(1, 20) if index < CATALOGUE_LONG else 50
        entries.append(Entry(stem + tail, length, 0.8 if sampled else 0.0, index))
    return tuple(entries)


# --- draws -----------------------------------------------------------------------------------


def draw_schedule(seed: int) -> Schedule:
    """Return the schedule of a seed: always the same."""
    world = draw_world(random.Random(f"world {seed // SEEDS_PER_WORLD}"))
    draw = random.Random(f"schedule {seed}")
    asks = _draw_asks(draw)
    # One kind comes by turns, so that each has its share; others join it.
    first = DRAWN[seed % len(DRAWN)]
    more = draw.choices(DRAWN, k=draw.choice((0, 0, 1, 2, 4)))
    faults = tuple(_draw_fault(draw, kind, len(asks)) for kind in (first, *more))
    return Schedule(seed, world, asks, faults)


def draw_world(draw: random.Random) -> World:
    block_size = draw.choice((8, 16, 16, 32))
    # UCX reads through the kernel here (CMA): over TCP it could not keep the promise.
    transport = draw.choice(("auto", "auto", "ucx", "ucx", "shm", "tcp"))
    world = World(
        block_size=block_size,
        chunk=max(block_size, draw.choice((16, 32, 64, 256))),
        prefill_mib=draw.choice((2, 3, 16)),
        decode_mib=draw.choice((2, 3, 16)),
        prefill_waiting=draw.choice((1, 64, 64, 64)),
        min_read_kib=draw.choice((0, 64, 4096)),
        prefill_cache=draw.random() < 0.7,
        decode_cache=draw.random() < 0.7,
        local_prefill=draw.choice(("fallback", "fallback", "auto")),
        swap_mib=draw.choice((0, 4)),
        policy=draw.choice(("fcfs", "fcfs", "priority", "sjf")),
        prefill_keeps_s=draw.choice((5.0, 5.0, 5.0, 0.1)),
        transport=transport,
        backup="off",
    )
    wanted = draw.random() < 0.5  # drawn last: the rest of a seed's world stays what it was
    return replace(world, backup="peer") if wanted and world.decode_cache else world


def _draw_asks(draw: random.Random) -> tuple[Ask, ...]:
    asks = []
    crowd = draw.random() < 0.25
    for index in range(draw.choice((3, 5, 8, 12))):
        long = crowd and index < 3
        entry = CATALOGUE_LONG + draw.randrange(_LONG_ENTRIES) if long else draw.randrange(40)
        order = draw.choice(((0,), (0, 1), (0, 1), (1, 0), (1,), (1, 0), ()))
        if draw.random() < 0.05:
            order = (-1, *order)
        after_s = 0.0 if long else draw.choice((0.0, draw.random() * 0.15))
        asks.append(Ask(entry, order, after_s, guest=draw.random() < 0.3))
    return tuple(asks)


def _draw_fault(draw: random.Random, kind: str, asks: int) -> Fault:
    target = draw.randrange(PREFILLS)
    seconds = draw.choice((0.05, 0.2))
    if kind in (*IN_READS, *IN_PULLS):
        event, count = "read", draw.randint(1, 8) if kind in IN_READS else 1
        seconds = draw.choice((0.05, 0.2, 0.8))
    elif kind in IN_PREFILL:
        event, count = ("submit" if kind == "refuse" else "offer"), draw.randint(1, 3)
    else:
        event = draw.choice(("read", "read", "token", "done", "delay"))
        count = draw.randint(0, 150) if event == "delay" else draw.randint(1, 6)
        if kind in ("pause", "freeze"):  # now and then, longer than every deadline
            seconds = draw.choice((0.05, 0.2, 0.2, 1.2, 2.5))
        elif kind == "pause_decode":  # from two seconds on, gateways rightly take it for dead
            seconds = draw.choice((0.05, 0.2, 0.7))
    if kind == "cancel":
        target = draw.randrange(asks)
    return Fault(kind, event, count, target, seconds, draw.randrange(1 << 30))
