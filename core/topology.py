"""Who is there: instances, and the versioned membership that gateways watch."""

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from weakref import WeakKeyDictionary

from baton.core.ids import Incarnation, InstanceId


class Role(StrEnum):
    """What an instance does."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"
    """Both; on the wire it is a decode instance that is never given a prefill instance."""


@dataclass(frozen=True, slots=True)
class InstanceInfo:
    """What an instance's leader says of itself once it is ready."""

    instance_id: InstanceId
    role: Role
    address: str
    """host:port of the leader's gRPC service."""
    incarnation: Incarnation
    pid: int
    model: str
    compatibility: str
    max_model_len: int
    """Tokens that a sequence may have here, prompt and output together: model and pool allow it."""
    kv_tokens: int
    """Tokens that the whole KV pool holds."""
    max_sequences: int
    """Sequences in one step at most."""
    load_s: float
    """Seconds that loading took."""
    ranks: int = 1
    """Processes over which it is sharded."""


@dataclass(frozen=True, slots=True)
class RankInfo:
    """What any other rank of an instance says of itself once it is ready."""

    instance_id: InstanceId
    rank: int
    pid: int


@dataclass(frozen=True, slots=True)
class Membership:
    """The instances that may be used; a higher version replaces a lower one."""

    version: int = 0
    instances: tuple[InstanceInfo, ...] = ()

    def of(self, *roles: Role) -> tuple[InstanceInfo, ...]:
        """Return the instances of these roles."""
        return tuple(i for i in self.instances if i.role in roles)

    def without(self, instance_id: InstanceId) -> "Membership":
        """Return the next version, in which `instance_id` is gone."""
        rest = tuple(i for i in self.instances if i.instance_id != instance_id)
        return Membership(self.version + 1, rest)

    def serving(self, model: str) -> "Membership":
        """Return this version with the instances of one model alone."""
        return Membership(self.version, tuple(i for i in self.instances if i.model == model))


class MembershipBoard:
    """Holds the latest membership; readers wait for a newer one. One event loop only."""

    def __init__(self, membership: Membership | None = None) -> None:
        self._current = membership or Membership()
        self._changed = asyncio.Event()
        self._parts: WeakKeyDictionary[MembershipBoard, str] = WeakKeyDictionary()

    @property
    def current(self) -> Membership:
        """The latest membership."""
        return self._current

    def publish(self, membership: Membership) -> None:
        """Replace the membership; an old version is ignored."""
        if membership.version > self._current.version:
            self._current = membership
            self._changed.set()
            self._changed = asyncio.Event()
            for board, model in self._parts.items():
                board.publish(membership.serving(model))

    def serving(self, model: str) -> "MembershipBoard":
        """Return a board that follows this one, with the instances of one model alone."""
        board = MembershipBoard(self._current.serving(model))
        self._parts[board] = model
        return board

    async def newer_than(self, version: int) -> Membership:
        """Wait until there is a membership of a higher version, and return it."""
        while self._current.version <= version:
            await self._changed.wait()
        return self._current
