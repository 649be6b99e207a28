"""Which sequence is backed up next, and when: pure, no clock but the times passed in.

    follow ──▶ growing ──every_blocks more are full──▶ due ──take──▶ under way
                  ▲                                                     │
                  └────────────────────── ended ────────────────────────┘
    forget, in any state: it has ended

Sequences that are due take turns, one portion each. What is copied is spread over time, so that it
never takes more than its share of the link; a peer that is gone or has no room is left alone for a
while, twice as long each time.
"""

from dataclasses import dataclass

from baton.core.ids import SeqId
from baton.decode_worker.peer_channels import PeerRef

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 16.0
"""For a peer that took nothing; it doubles from the first to the longest."""


@dataclass(slots=True)
class _Followed:
    peer: PeerRef
    tokens: int
    """Whose KV is computed."""
    there: int = 0
    """Blocks, from the first, that the peer has, as far as is known."""


@dataclass(frozen=True, slots=True)
class Portion:
    """What to offer next."""

    seq_id: SeqId
    peer: PeerRef
    first_block: int
    """The first that the peer lacks."""


class BackupQueue:
    """Knows the sequences that are backed up; holds none but those that `follow` was told of."""

    def __init__(self, *, block_size: int, every_blocks: int, bytes_per_s: float) -> None:
        self._block_size = block_size
        self._every = every_blocks
        self._bytes_per_s = bytes_per_s
        self._followed: dict[SeqId, _Followed] = {}
        self._due: dict[SeqId, None] = {}
        """In order of turns."""
        self._pauses: dict[PeerRef, tuple[float, float]] = {}
        """Peers that took nothing lately: (until when they are left alone, for how long)."""
        self._free_at = 0.0
        """When the last portion has had its share of the time."""

    def __len__(self) -> int:
        return len(self._followed)

    def __repr__(self) -> str:
        return f"BackupQueue({len(self._followed)} followed, {len(self._due)} due)"

    def follow(self, seq_id: SeqId, peer: PeerRef, tokens: int) -> None:
        """Back a sequence up to `peer` when it next grows, by a token after its first `tokens`."""
        self._followed[seq_id] = _Followed(peer, tokens)

    def grew(self, seq_id: SeqId) -> None:
        """The KV of one more token is computed; nothing if it is not followed."""
        followed = self._followed.get(seq_id)
        if followed is not None:
            followed.tokens += 1
            self._look(seq_id)

    def forget(self, seq_id: SeqId) -> None:
        """A sequence has ended."""
        self._followed.pop(seq_id, None)
        self._due.pop(seq_id, None)
        peers = {followed.peer for followed in self._followed.values()}
        self._pauses = {peer: pause for peer, pause in self._pauses.items() if peer in peers}

    def next_at(self) -> float | None:
        """Return when there will be something to take, as things are; None: not at all."""
        if not self._due:
            return None
        return max(self._free_at, min(self._ready_at(seq_id) for seq_id in self._due))

    def take(self, now: float) -> Portion | None:
        """Return what is to be copied now, if anything; it is due again once it grew or `ended`."""
        if now < self._free_at:
            return None
        for seq_id in self._due:
            if self._ready_at(seq_id) <= now:
                del self._due[seq_id]
                followed = self._followed[seq_id]
                return Portion(seq_id, followed.peer, followed.there)
        return None

    def ended(self, portion: Portion, there: int | None, copied: int, now: float) -> None:
        """A portion that began at `now` has ended: of `copied` bytes, if it has worked.

        `there` is how many blocks the peer has by its own word; None: it could not be asked.
        """
        self._free_at = now + copied / self._bytes_per_s
        if there is not None and there > portion.first_block:
            self._pauses.pop(portion.peer, None)
        else:
            _, last = self._pauses.get(portion.peer, (0.0, FIRST_PAUSE_S / 2))
            pause = min(2 * last, LONGEST_PAUSE_S)
            self._pauses[portion.peer] = now + pause, pause
        followed = self._followed.get(portion.seq_id)
        if followed is not None:
            followed.there = followed.there if there is None else there
            self._look(portion.seq_id)

    def _look(self, seq_id: SeqId) -> None:
        followed = self._followed[seq_id]
        if followed.tokens // self._block_size - followed.there >= self._every:
            self._due[seq_id] = None

    def _ready_at(self, seq_id: SeqId) -> float:
        return self._pauses.get(self._followed[seq_id].peer, (0.0, 0.0))[0]
