"""Whether the instances can take one more request now, and how it would fare there.

Jointly: a request that decode has a place and memory for still waits while prefill has as much to
do as it needs to stay busy, and the other way round. What waits in front of an instance is served
in that instance's order; what waits at the gateway is served fairly, can be refused before anything
was spent on it, and may still go to whichever instance is free first. So instances are sent what
keeps them busy, and no more. The link has no room of its own: what is queued for it shows in the
predicted handover, and so in the predicted TTFT.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from baton.core.topology import InstanceInfo, Role
from baton.router import state as columns
from baton.router.costs import Costs
from baton.router.fleet import Fleet, Pool
from baton.router.load import InstanceKey
from baton.router.policy import Choice, decode_features
from baton.router.regression import Vector
from baton.router.state import RouterState

Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class RoomLimits:
    """How much is sent ahead to instances."""

    decode_fill: float = 1.25
    """Requests per decode instance, as a multiple of the sequences that it runs at once: those
    beyond one are in prefill meanwhile, and fill its batch as others end."""
    prefill_ahead_s: float = 1.0
    """Seconds of work that may wait at a prefill instance, as measured."""


@dataclass(frozen=True, slots=True)
class Room:
    """Who can take a request; arrays over the fleet's pools."""

    fleet: Fleet
    decode: Flags
    prefill: Flags
    idle: Flags
    """Decode instances that do nothing."""

    @property
    def full_decode(self) -> Collection[InstanceKey]:
        """Return the keys of decode instances that cannot take it."""
        return _keys(self.fleet.decode, ~self.decode)

    @property
    def full_prefill(self) -> Collection[InstanceKey]:
        """Return the keys of prefill instances that cannot take it."""
        return _keys(self.fleet.prefill, ~self.prefill)

    def lacking(self, choice: Choice) -> Role | None:
        """Return the role of who has no room, of the first pair of a choice; None: both have."""
        if not self.decode[choice.decode_order[0]]:
            return Role.DECODE
        alone = choice.local or not len(choice.prefill_order)
        return None if alone or self.prefill[choice.prefill_order[0]] else Role.PREFILL


def look_for_room(
    fleet: Fleet, state: RouterState, costs: Costs, tokens: float, limits: RoomLimits
) -> Room:
    """Return who has room for a request that will hold `tokens` tokens of KV.

    An instance that does nothing always has: nothing would ever make more of it.
    """
    decode, prefill = state.loads(fleet.decode.rows), state.loads(fleet.prefill.rows)
    told = decode[:, columns.RUNNING] + decode[:, columns.SENT_REQUESTS]
    open_requests = np.maximum(told, decode[:, columns.OWN_REQUESTS])
    # What an instance tells knows of prompts that share blocks; what is still in prefill it does
    # not hold yet, and reads when it has room.
    free = np.where(
        decode[:, columns.SEEN] > 0,
        decode[:, columns.FREE] - decode[:, columns.SENT_CONTEXT],
        fleet.decode.kv_tokens - decode[:, columns.OWN_CONTEXT],
    )
    places = np.maximum(1.0, fleet.decode.max_sequences * limits.decode_fill)
    has_place = (open_requests < places) & (tokens <= free)

    queue = np.maximum(
        prefill[:, columns.QUEUED] + prefill[:, columns.SENT_TOKENS],
        np.where(prefill[:, columns.SEEN] > 0, 0.0, prefill[:, columns.OWN_QUEUED]),
    )
    wait_s: Vector = np.zeros(len(queue))
    for kind, members in fleet.prefill.kinds.items():
        wait_s[members] = costs.prefill(kind).wait_s(queue)[members]
    return Room(
        fleet,
        has_place | (open_requests <= 0),
        (wait_s <= limits.prefill_ahead_s) | (queue <= 0),
        open_requests <= 0,
    )


def keeps_promises(
    fleet: Fleet, state: RouterState, costs: Costs, tokens: int, promised_s: Vector
) -> Flags:
    """Return where a request could join without making tokens slower than is promised there.

    `promised_s` is the tightest promise of each decode instance, with that of the request itself;
    `tokens` are those of its prompt. What was not measured is trusted.
    """
    keeps = np.ones(len(fleet.decode), bool)
    loads, known = state.loads(fleet.decode.rows), np.zeros(len(fleet.decode))
    features = decode_features(fleet.decode, loads, known, tokens)
    for kind, members in fleet.decode.kinds.items():
        pool = costs.decode(kind)
        if pool.step_measured:
            keeps[members] = (pool.tpot_s(features) <= promised_s)[members]
    return keeps


@dataclass(frozen=True, slots=True)
class Outlook:
    """How a request would fare if it started now; in seconds."""

    ttft_s: float
    e2e_s: float
    """For as long an answer as is usual."""
    tpot_s: float | None
    """With nobody else in the batch; None while it is only a guess."""


def outlook_of(choice: Choice, costs: Costs, max_tokens: int) -> Outlook | None:
    """Return how the chosen pair would serve it; None while that is only a guess."""
    place = int(choice.decode_order[0])
    prices, decode = choice.seen.prices, _kind(choice.fleet.decode, place)
    measured = costs.decode(decode)
    if choice.local or not len(choice.prefill_order):
        if not measured.local_measured:
            return None
        ttft_s = float(prices.local_s[place])
    else:
        first = int(choice.prefill_order[0])
        if not (measured.measured and costs.prefill(_kind(choice.fleet.prefill, first)).measured):
            return None
        ttft_s = float(choice.seen.prefill_s[first] + prices.handover_s[place])
    tpot_s = float(prices.tpot_s[place])
    e2e_s = ttft_s + (costs.expected_output(max_tokens) - 1) * tpot_s
    return Outlook(ttft_s, e2e_s, measured.least_tpot_s(choice.seen.decode.tokens))


def _kind(pool: Pool, place: int) -> str:
    instance: InstanceInfo = pool.instances[place]
    return instance.compatibility


def _keys(pool: Pool, flags: Flags) -> tuple[InstanceKey, ...]:
    return tuple(pool.keys[place] for place in np.flatnonzero(flags).tolist())
