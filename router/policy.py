"""Which pair serves a request: the one whose answer is predicted to be complete first.

    cost of a pair = TTFT(prefill, decode) + (expected output - 1) * TPOT(decode)

TTFT is a sum of what prefill and what decode take (see costs.py), so the best pair is the best of
each, and n + m candidates are weighed for n * m pairs. What is not in the cost:

- costs within two percent are equal; then the one that has more of the prompt is taken, then the
  less loaded one, and then each of several gateways has an order of its own, so that those which
  see the same do not all choose the same;
- a session's own instance (affinity.py) is taken while it costs little more than the best;
- of instances that report nothing, two are drawn and the rest come last: many gateways that go by
  their own counts alone would all take the same one (Mitzenmacher, "The power of two choices in
  randomized load balancing", 2001);
- where nothing is reported and nothing measured, the least loaded comes first.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from baton.core.topology import InstanceInfo
from baton.router import state as columns
from baton.router.affinity import scores
from baton.router.costs import Costs, DecodeFeatures, PrefillFeatures
from baton.router.fleet import Fleet, Pool
from baton.router.load import InstanceKey
from baton.router.regression import Vector
from baton.router.state import RouterState

MOST_FALLBACKS = 8
"""Prefill instances that a request may try, one after the other."""
_EQUAL = 0.02
_EQUAL_S = 0.0005
"""Costs that differ by less are equal."""
_STAY = 1.25
_STAY_S = 0.02
"""A session stays with its instance while that costs no more than so much times the best's, and
so much more."""
_STAY_REQUESTS = 2
"""Likewise in open requests, where costs are not known."""
_DISTURBANCE = 4.0
"""How much dearer a second is by which streams are held up; as HandoverConfig has it."""
_EXPLORE = 32
"""Of prompts that decode would compute itself, each so-manieth goes to prefill all the same: what
is known of handovers must not grow old."""
_FAR = np.float64(1e9)

Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Ask:
    """What a route is wanted for."""

    tokens: int
    """That have to be in the decode instance's pool before the next one comes."""
    most: int
    """That it may become."""
    max_tokens: int
    """To generate."""
    known: Vector
    """By row of the state, tokens of them that an instance has."""
    session: np.uint64 | None = None
    avoided: Collection[InstanceKey] = ()
    preferred: InstanceKey | None = None
    failing: Collection[InstanceKey] = ()


@dataclass(frozen=True, slots=True)
class DecodePrices:
    """Seconds per decode instance; arrays."""

    handover_s: Vector
    """What a handover adds to prefill's time."""
    local_s: Vector
    """To the first token, if it computes the prompt itself."""
    held_up_s: Vector
    """… with what that costs the sequences that decode there."""
    tpot_s: Vector

    def taken(self, places: Places) -> "DecodePrices":
        """Return those of some instances."""
        return DecodePrices(*(column[places] for column in self.columns()))

    def columns(self) -> tuple[Vector, ...]:
        """Return the four arrays, in order."""
        return self.handover_s, self.local_s, self.held_up_s, self.tpot_s


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a fleet when a request comes; arrays over its pools."""

    decode_load: Vector
    """Rows of the state."""
    prefill_load: Vector
    decode: DecodeFeatures
    prefill: PrefillFeatures
    prices: DecodePrices
    prefill_s: Vector
    blind: int
    """Instances that tell nothing."""
    predicted: bool
    """It is enough to go by costs; otherwise the least loaded comes first."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and of what."""

    fleet: Fleet
    decode_order: Places
    """The places of candidates, best first."""
    prefill_order: Places
    seen: Seen
    local: bool
    """The decode instance is to compute the prompt itself, although prefill could."""
    explored: bool
    """… and that was cheaper, but prefill was to be tried again."""
    affine: bool
    """The decode instance is the session's own."""

    def ranked_decode(self) -> Iterator[InstanceInfo]:
        """Yield the decode candidates, best first."""
        instances = self.fleet.decode.instances
        return (instances[place] for place in self.decode_order)

    def ranked_prefill(self) -> tuple[InstanceInfo, ...]:
        """Return the prefill instances to try, in order."""
        if self.local:
            return ()
        places = self.prefill_order[:MOST_FALLBACKS].tolist()
        return tuple(self.fleet.prefill.instances[place] for place in places)

    def missing(self) -> float:
        """Return the tokens that the first of these is thought to lack; 0 if there is none."""
        if self.local or not len(self.prefill_order):
            return 0.0
        return float(self.seen.prefill.missing[self.prefill_order[0]])


class Policy:
    """Weighs a fleet; it draws lots only where a random source is given."""

    def __init__(self, state: RouterState, costs: Costs, rng: Random | None) -> None:
        self._state = state
        self._costs = costs
        self._rng = rng
        self._alone = 0
        """Prompts that decode would compute itself."""

    def choose(self, fleet: Fleet, ask: Ask) -> Choice | None:
        """Return the choice; None if no decode instance can take the request."""
        fits = ask.most <= fleet.decode.max_model_len
        if not fits.any():
            return None
        able = ask.tokens <= fleet.prefill.max_model_len
        seen = self._look(fleet, ask)
        cost, alone = self._weigh(fleet, ask, able, seen)
        decode_order, affine = self._rank_decode(
            fleet.decode, seen.decode_load, fits, cost * seen.predicted, ask
        )
        best = int(decode_order[0])
        prefill_order = self._rank_prefill(
            fleet.prefill,
            seen.prefill_load,
            able & _partners(fleet, best),
            seen.prefill_s * seen.predicted,
            ask,
        )
        cheaper = seen.predicted and len(prefill_order) > 0 and bool(alone[best])
        self._alone += cheaper
        explored = cheaper and self._alone % _EXPLORE == 0
        return Choice(
            fleet=fleet,
            decode_order=decode_order,
            prefill_order=prefill_order,
            seen=seen,
            local=cheaper and not explored,
            explored=explored,
            affine=affine,
        )

    def _look(self, fleet: Fleet, ask: Ask) -> Seen:
        decode_load = self._state.loads(fleet.decode.rows)
        prefill_load = self._state.loads(fleet.prefill.rows)
        decode = decode_features(fleet.decode, decode_load, _known(fleet.decode, ask), ask.tokens)
        prefill = prefill_features(prefill_load, _known(fleet.prefill, ask), ask.tokens)
        silent = [int((load[:, columns.SEEN] == 0).sum()) for load in (decode_load, prefill_load)]
        told = sum(silent) < len(fleet.decode) + len(fleet.prefill)
        return Seen(
            decode_load=decode_load,
            prefill_load=prefill_load,
            decode=decode,
            prefill=prefill,
            prices=decode_prices(fleet.decode.kinds, self._costs, decode),
            prefill_s=prefill_prices(fleet.prefill.kinds, self._costs, prefill),
            blind=sum(silent),
            predicted=told or any(self._costs.decode(k).measured for k in fleet.decode.kinds),
        )

    def _weigh(
        self,
        fleet: Fleet,
        ask: Ask,
        able: NDArray[np.bool_],
        seen: Seen,
    ) -> tuple[Vector, NDArray[np.bool_]]:
        """Return what each decode instance costs with its best prefill; and which need none.

        These compute the prompt themselves, because that is cheaper or has to be.
        """
        best_s = np.full(len(fleet.decode), _FAR)
        measured = np.zeros(len(fleet.decode), bool)
        failing = [fleet.prefill.places[key] for key in ask.failing if key in fleet.prefill.places]
        working = able.copy()
        working[failing] = False
        for kind, members in fleet.decode.kinds.items():
            there = fleet.prefill.kinds.get(kind)
            if there is None:
                continue
            for candidates in (there & working, there & able):
                if candidates.any():
                    best_s[members] = seen.prefill_s[candidates].min()
                    break
            costs = self._costs.decode(kind)
            measured[members] = (
                costs.measured and costs.local_measured and self._costs.prefill(kind).measured
            )
        best_s[fleet.decode.mixed] = _FAR
        over_s = best_s + seen.prices.handover_s
        may = measured & (seen.decode_load[:, columns.LOCAL] > 0)
        alone = (best_s >= _FAR) | (may & (seen.prices.held_up_s < over_s))
        ttft_s = np.where(alone, seen.prices.local_s, over_s)
        later = self._costs.expected_output(ask.max_tokens) - 1
        return ttft_s + later * seen.prices.tpot_s, alone

    # ---- orders -----------------------------------------------------------------------------

    def _rank_decode(
        self, pool: Pool, load: Vector, able: NDArray[np.bool_], cost: Vector, ask: Ask
    ) -> tuple[Places, bool]:
        classes = self._classes(load, able, pool, last=ask.avoided)
        if ask.preferred in pool.places and ask.preferred not in ask.avoided:
            classes[pool.places[ask.preferred]] = -1
        fill = load[:, columns.OWN_CONTEXT] / pool.kv_tokens
        weighed = _Weighed(pool, able, classes, cost, _known(pool, ask), fill, load)
        order = weighed.order()
        own = weighed.own_place(order, ask.session)
        return _first(order, own), own is not None

    def _rank_prefill(
        self, pool: Pool, load: Vector, able: NDArray[np.bool_], cost: Vector, ask: Ask
    ) -> Places:
        if not able.any():
            return np.zeros(0, np.int64)
        classes = self._classes(load, able, pool, last=ask.failing)
        fill = load[:, columns.OWN_QUEUED]
        weighed = _Weighed(pool, able, classes, cost, _known(pool, ask), fill, load)
        order = weighed.order()
        return _first(order, weighed.own_place(order, ask.session))

    def _classes(
        self, load: Vector, able: NDArray[np.bool_], pool: Pool, last: Collection[InstanceKey]
    ) -> NDArray[np.int64]:
        """Return 0 for those in the contest, 1 for blind ones not drawn, 2 for those put last."""
        classes = np.zeros(len(pool), np.int64)
        blind = np.flatnonzero(able & (load[:, columns.SEEN] == 0))
        if self._rng is not None and len(blind) > 2:
            classes[blind] = 1
            classes[self._rng.sample(blind.tolist(), 2)] = 0
        for key in last:
            if key in pool.places:
                classes[pool.places[key]] = 2
        return classes


def prefill_prices(
    kinds: Mapping[str, NDArray[np.bool_]], costs: Costs, features: PrefillFeatures
) -> Vector:
    """Return the seconds of each prefill instance; `kinds` says who is of which pool."""
    seconds = np.zeros(len(features.queue))
    for kind, members in kinds.items():
        seconds[members] = costs.prefill(kind).seconds(features)[members]
    return seconds


def decode_prices(
    kinds: Mapping[str, NDArray[np.bool_]], costs: Costs, features: DecodeFeatures
) -> DecodePrices:
    """Likewise of each decode instance."""
    prices = DecodePrices(*(np.zeros(len(features.queue)) for _ in range(4)))
    for kind, members in kinds.items():
        pool = costs.decode(kind)
        local_s = pool.local_s(features)
        held_up_s = local_s + _DISTURBANCE * pool.disturbance_s(features)
        found = pool.handover_s(features), local_s, held_up_s, pool.tpot_s(features)
        for column, values in zip(prices.columns(), found, strict=True):
            column[members] = values[members]
    return prices


def decode_features(pool: Pool, load: Vector, known: Vector, tokens: int) -> DecodeFeatures:
    """Return what each decode instance has to do; own counts where it reports nothing."""
    seen = load[:, columns.SEEN] > 0
    own = load[:, columns.OWN_REQUESTS], load[:, columns.OWN_CONTEXT]
    # What ended may have been taken off by the instance before: then by both.
    running = np.maximum(0.0, load[:, columns.RUNNING] + load[:, columns.SENT_REQUESTS])
    context = np.maximum(0.0, load[:, columns.CONTEXT] + load[:, columns.SENT_CONTEXT])
    free = load[:, columns.FREE] - load[:, columns.SENT_CONTEXT]
    free = np.where(seen, free, pool.kv_tokens - own[1])
    return DecodeFeatures(
        queue=np.where(seen, load[:, columns.QUEUED], 0.0),
        missing=tokens - known,
        running=np.where(seen, running, own[0]),
        context=np.where(seen, context, own[1]),
        short=np.maximum(0.0, tokens - known - free),
        tokens=float(tokens),
    )


def prefill_features(load: Vector, known: Vector, tokens: int) -> PrefillFeatures:
    """Return what each prefill instance has to do, likewise."""
    queue = np.maximum(0.0, load[:, columns.QUEUED] + load[:, columns.SENT_TOKENS])
    blind = load[:, columns.SEEN] == 0
    return PrefillFeatures(
        queue=np.where(blind, load[:, columns.OWN_QUEUED], queue),
        missing=tokens - known,
        tokens=float(tokens),
    )


def _known(pool: Pool, ask: Ask) -> Vector:
    """Return the tokens that each instance has; the last one is always computed."""
    return np.minimum(ask.known[pool.rows], ask.tokens - 1)


def _partners(fleet: Fleet, decode: int) -> NDArray[np.bool_]:
    """Return which prefill instances can hand over to a decode instance."""
    chosen = fleet.decode.instances[decode]
    members = fleet.prefill.kinds.get(chosen.compatibility)
    if members is None or fleet.decode.mixed[decode]:
        return np.zeros(len(fleet.prefill), bool)
    return members


@dataclass(frozen=True, slots=True)
class _Weighed:
    """One pool's candidates with all that orders them; arrays over the pool."""

    pool: Pool
    able: NDArray[np.bool_]
    classes: NDArray[np.int64]
    cost: Vector
    known: Vector
    fill: Vector
    load: Vector

    def order(self) -> Places:
        """Return those that are able: by class, by cost as far as it differs, by what they have of
        the prompt (what is shared takes no room twice), by load, and by their turn.
        """
        places = np.flatnonzero(self.able)
        cost = self.cost[places]
        least = float(cost.min())
        steps = np.floor((cost - least) / max(_EQUAL_S, _EQUAL * least))
        requests = self.load[places, columns.OWN_REQUESTS]
        by = (places, requests, self.fill[places], -self.known[places], steps, self.classes[places])
        order: Places = np.lexsort(by)
        return places[order]

    def own_place(self, order: Places, session: np.uint64 | None) -> int | None:
        """Return the place of the session's own instance, unless it is much worse than the best."""
        if session is None:
            return None
        best = int(order[0])
        equals = order[self.classes[order] == self.classes[best]]
        own = int(equals[scores(self.pool.marks[equals], session).argmax()])
        requests = self.load[:, columns.OWN_REQUESTS]
        crowded = not self.cost.any() and requests[own] - requests[best] > _STAY_REQUESTS
        dear = self.cost[own] > self.cost[best] * _STAY + _STAY_S
        return None if dear or crowded else own


def _first(order: Places, place: int | None) -> Places:
    if place is None:
        return order
    rest = order[order != place]
    return np.concatenate([np.array([place], np.int64), rest])
