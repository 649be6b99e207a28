"""Why a request went where it did: what was known of each candidate, and what came of it.

A decision keeps the best few candidates of each pool with what they had to do. So it can be priced
again by today's coefficients: *regret* is by how much, as far as is known now, the chosen pair was
worse than the best of them.
"""

from collections import OrderedDict
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from baton.core.trace import RequestTrace
from baton.router.costs import Costs, DecodeFeatures, PrefillFeatures
from baton.router.fleet import Pool
from baton.router.policy import Choice, DecodePrices, Places, decode_prices, prefill_prices
from baton.router.regression import Vector

_CANDIDATES = 4
"""Of each pool, that are kept."""
_MOVES = 4
"""Decisions kept of one request."""

F = TypeVar("F", PrefillFeatures, DecodeFeatures)
_ARRAYS = {
    kind: tuple(f.name for f in fields(kind) if f.name != "tokens")
    for kind in (PrefillFeatures, DecodeFeatures)
}
"""Names of the features that are one for each candidate."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The best few of a pool, best first."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    """Their compatibilities."""
    of: int
    """How many there were."""

    def members(self) -> dict[str, NDArray[np.bool_]]:
        """Return by kind who is of it."""
        return {kind: np.array([k == kind for k in self.kinds], bool) for kind in self.kinds}


@dataclass(frozen=True, slots=True)
class Decision:
    """One choice of a pair; the first candidates were chosen."""

    tenant: str
    tokens: int
    max_tokens: int
    expected_output: float
    membership: int
    """The version that it went by."""
    state: int
    """Events that had been heard."""
    predicted: bool
    blind: int
    local: bool
    explored: bool
    affine: bool
    decode: Candidates
    decode_features: DecodeFeatures
    decode_prices: DecodePrices
    prefill: Candidates
    prefill_features: PrefillFeatures
    prefill_s: Vector

    @classmethod
    def of(
        cls,
        choice: Choice,
        costs: Costs,
        *,
        tenant: str,
        max_tokens: int,
        membership: int,
        state: int,
    ) -> "Decision":
        """Return what is to be kept of a choice."""
        decode = choice.decode_order[:_CANDIDATES]
        prefill = choice.prefill_order[:_CANDIDATES]
        return cls(
            tenant=tenant,
            tokens=int(choice.seen.decode.tokens),
            max_tokens=max_tokens,
            expected_output=costs.expected_output(max_tokens),
            membership=membership,
            state=state,
            predicted=choice.seen.predicted,
            blind=choice.seen.blind,
            local=choice.local,
            explored=choice.explored,
            affine=choice.affine,
            decode=_candidates(choice.fleet.decode, choice.decode_order),
            decode_features=_taken(choice.seen.decode, decode),
            decode_prices=choice.seen.prices.taken(decode),
            prefill=_candidates(choice.fleet.prefill, choice.prefill_order),
            prefill_features=_taken(choice.seen.prefill, prefill),
            prefill_s=choice.seen.prefill_s[prefill],
        )

    @property
    def way(self) -> str:
        """Say in a few words how it was decided."""
        if not self.predicted:
            return "least loaded: nothing is reported, nothing was measured"
        if self.local:
            return "decode computes the prompt itself: cheaper than a handover"
        if self.explored:
            return "handed over, although decode was cheaper: to measure it again"
        return "the session's own instance" if self.affine else "the least predicted cost"

    def learn(self, costs: Costs, trace: RequestTrace) -> None:
        """Let the coefficients know what came of it; only of a request that never moved."""
        if trace.migrations or trace.output_tokens == 0:
            return
        kind = self.decode.kinds[0]
        pool, chosen = costs.decode(kind), _taken(self.decode_features, np.array(0))
        for handover in trace.handovers:
            if handover.outcome == "ok" and handover.prefill_instance in self.prefill.names:
                place = self.prefill.names.index(handover.prefill_instance)
                queue = float(self.prefill_features.queue[place])
                costs.prefill(self.prefill.kinds[place]).learn(queue, self.tokens, handover)
        if len(trace.handovers) == 1 and trace.handovers[0].outcome == "ok":
            pool.learn_handover(chosen, trace.handovers[0], trace.served_ttft_s)
        elif trace.local_prefill and not trace.handovers:
            pool.learn_local(chosen, trace.cached_tokens, trace.served_ttft_s)
        if trace.output_tokens > 1:
            pool.learn_step(chosen, trace)
        costs.answered(trace.output_tokens)

    # ---- what is shown ----------------------------------------------------------------------

    def explain(self, costs: Costs) -> dict[str, Any]:
        """Return plain values, ready for JSON; times in seconds."""
        now = self._costs_of(
            prefill_prices(self.prefill.members(), costs, self.prefill_features),
            decode_prices(self.decode.members(), costs, self.decode_features),
        )
        then = self._costs_of(self.prefill_s, self.decode_prices)
        return {
            "decided": self.way,
            "membership_version": self.membership,
            "state_version": self.state,
            "blind_candidates": self.blind,
            "prompt_tokens": self.tokens,
            "expected_output_tokens": self.expected_output,
            "decode": self._decode_rows(then),
            "decode_candidates": self.decode.of,
            "prefill": self._prefill_rows(),
            "prefill_candidates": self.prefill.of,
            "chosen": {
                "decode": self.decode.names[0],
                "prefill": None if self._alone else self.prefill.names[0],
                "ttft_s": self._ttft_s(self.prefill_s, self.decode_prices)[0],
                "tpot_s": float(self.decode_prices.tpot_s[0]),
                "cost_s": then[0],
            },
            "regret_s": max(0.0, now[0] - min(now)),
        }

    @property
    def _alone(self) -> bool:
        return self.local or not self.prefill.names

    def _ttft_s(self, prefill_s: Vector, prices: DecodePrices) -> list[float]:
        """Return the TTFT of each decode candidate: of the first one as it was chosen."""
        hands_over = len(prefill_s) > 0
        rows = []
        for place, kind in enumerate(self.decode.kinds):
            partners = [n for n, other in enumerate(self.prefill.kinds) if other == kind]
            local_s = float(prices.local_s[place])
            if not partners or not hands_over or (place == 0 and self.local):
                rows.append(local_s)
                continue
            best_s = min(float(prefill_s[n]) for n in partners)
            first_s = float(prefill_s[0]) if place == 0 else best_s
            over_s = first_s + float(prices.handover_s[place])
            rows.append(over_s)
        return rows

    def _costs_of(self, prefill_s: Vector, prices: DecodePrices) -> list[float]:
        """Return the cost of each decode candidate, the chosen pair's first.

        The chosen decode instance with another prefill, or with none, is a rival too.
        """
        later = self.expected_output - 1
        ttft_s = self._ttft_s(prefill_s, prices)
        costs = [t + later * float(p) for t, p in zip(ttft_s, prices.tpot_s, strict=True)]
        partners = [n for n, k in enumerate(self.prefill.kinds) if k == self.decode.kinds[0]]
        step_s = later * float(prices.tpot_s[0])
        rivals = [float(prefill_s[n]) + float(prices.handover_s[0]) + step_s for n in partners]
        return costs + rivals

    def _decode_rows(self, costs: list[float]) -> list[dict[str, Any]]:
        f, p = self.decode_features, self.decode_prices
        ttft_s = self._ttft_s(self.prefill_s, p)
        return [
            {
                "instance": name,
                "cached_tokens": self.tokens - int(f.missing[n]),
                "running": int(f.running[n]),
                "context_tokens": int(f.context[n]),
                "short_tokens": int(f.short[n]),
                "handover_s": float(p.handover_s[n]),
                "local_s": float(p.local_s[n]),
                "ttft_s": ttft_s[n],
                "tpot_s": float(p.tpot_s[n]),
                "cost_s": costs[n],
            }
            for n, name in enumerate(self.decode.names)
        ]

    def _prefill_rows(self) -> list[dict[str, Any]]:
        f = self.prefill_features
        return [
            {
                "instance": name,
                "cached_tokens": self.tokens - int(f.missing[n]),
                "queued_tokens": int(f.queue[n]),
                "prefill_s": float(self.prefill_s[n]),
            }
            for n, name in enumerate(self.prefill.names)
        ]


class DecisionLog:
    """The decisions of the requests that came last, and what came of them."""

    def __init__(self, kept: int) -> None:
        """Of at most `kept` requests."""
        self._kept = kept
        self._decisions: OrderedDict[str, list[Decision]] = OrderedDict()
        self._traces: dict[str, RequestTrace] = {}

    def __repr__(self) -> str:
        return f"<DecisionLog of {len(self)} requests>"

    def __len__(self) -> int:
        return len(self._decisions)

    def decided(self, request_id: str, decision: Decision) -> None:
        """Keep a decision; the oldest request's go if there are too many."""
        kept = self._decisions.get(request_id)
        if kept is None or kept[-1].tenant != decision.tenant:
            kept = self._decisions[request_id] = []
        kept.append(decision)
        del kept[:-_MOVES]
        if len(self._decisions) > self._kept:
            oldest, _ = self._decisions.popitem(last=False)
            self._traces.pop(oldest, None)

    def ended(self, trace: RequestTrace) -> Decision | None:
        """Keep what came of a request, and return its last decision if it is known."""
        kept = self._decisions.get(trace.request_id)
        if kept is None:
            return None
        self._traces[trace.request_id] = trace
        return kept[-1]

    def explain(self, request_id: str, costs: Costs) -> dict[str, Any] | None:
        """Return why a request went where it did; None if it is not known (any more)."""
        kept = self._decisions.get(request_id)
        if kept is None:
            return None
        trace = self._traces.get(request_id)
        return {
            "request_id": request_id,
            "tenant": kept[-1].tenant,
            "decisions": [decision.explain(costs) for decision in kept],
            "measured": None if trace is None else _measured(trace),
        }


def _measured(trace: RequestTrace) -> dict[str, Any]:
    done = [h.prefill_instance for h in trace.handovers if h.outcome == "ok"]
    return {
        "decode": trace.decode_instance,
        "prefill": done[-1] if done and not trace.local_prefill else None,
        "queue_s": trace.queue_s,
        "ttft_s": trace.ttft_s,
        "tpot_s": trace.tpot_s,
        "output_tokens": trace.output_tokens,
        "cached_tokens": trace.cached_tokens,
        "finish": str(trace.finish),
        "error": trace.error,
        "attempts": [f"{h.prefill_instance}: {h.outcome}" for h in trace.handovers],
        "migrations": len(trace.migrations),
    }


def _candidates(pool: Pool, order: Places) -> Candidates:
    best = [pool.instances[place] for place in order[:_CANDIDATES].tolist()]
    return Candidates(
        tuple(str(i.instance_id) for i in best),
        tuple(i.compatibility for i in best),
        len(order),
    )


def _taken(features: F, places: Places) -> F:
    """Return the features of some candidates."""
    taken = {name: getattr(features, name)[places] for name in _ARRAYS[type(features)]}
    return replace(features, **taken)
