"""Which ranks along the expert axis hold which experts of a layer.

Every expert is somewhere; experts that many tokens choose may be at several places, which then
share their tokens. Where they are changes nothing but who computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from baton.core.errors import InvalidConfig

_WORTH_MOVING = Fraction(1, 10)


@dataclass(frozen=True, slots=True)
class Placement:
    """The experts at each place along the axis; raises InvalidConfig if one is nowhere or twice."""

    held: tuple[tuple[int, ...], ...]
    """By place, its experts in the order in which it holds them."""

    def __post_init__(self) -> None:
        everywhere = sorted({expert for held in self.held for expert in held})
        if not everywhere or everywhere != list(range(everywhere[-1] + 1)):
            raise InvalidConfig("placement", everywhere, "every expert, from 0 on, at some place")
        for held in self.held:
            if len(set(held)) != len(held):
                raise InvalidConfig("placement", held, "each expert at a place once")

    @property
    def experts(self) -> int:
        """How many different experts there are."""
        return 1 + max(max(held) for held in self.held if held)

    def places(self, expert: int) -> tuple[int, ...]:
        """Return where an expert is."""
        return tuple(place for place, held in enumerate(self.held) if expert in held)

    def work(self, loads: Sequence[int]) -> tuple[Fraction, ...]:
        """Return the tokens of each place, where the copies of an expert share its tokens."""
        shares = [Fraction(load, len(self.places(expert))) for expert, load in enumerate(loads)]
        return tuple(sum((shares[e] for e in held), Fraction(0)) for held in self.held)


def even_placement(experts: int, places: int) -> Placement:
    """Return neighbouring experts at each place, as many at each; `places` divides `experts`."""
    assert experts % places == 0, f"{experts} experts at {places} places"
    each = experts // places
    return Placement(
        tuple(tuple(range(place * each, (place + 1) * each)) for place in range(places))
    )


def better_placement(current: Placement, loads: Sequence[int], each: int) -> Placement | None:
    """Return `balanced_placement` if that is worth moving experts for, else None.

    It is if the busiest place would have a tenth less to do: every step waits for that one.
    """
    found = balanced_placement(loads, len(current.held), each)
    gain = max(current.work(loads)) - max(found.work(loads))
    return found if gain > _WORTH_MOVING * max(current.work(loads)) else None


def balanced_placement(loads: Sequence[int], places: int, each: int) -> Placement:
    """Return a placement of `each` experts at every place that evens out the measured loads.

    `loads` are the tokens that chose each expert. What room there is beyond one copy of every
    expert goes, copy by copy, to the expert with the most tokens per copy; then copies go, the
    busiest first, to the place with the least to do that has room and not yet that expert (the
    longest processing time first, Graham, 1969; as DeepSeek's EPLB does). A copy that finds no such
    place is left out. Raises InvalidConfig if there is not room for all experts, or more room than
    each place could fill with different ones.
    """
    if not len(loads) <= places * each or each > len(loads):
        allowed = f"{-(-len(loads) // places)} to {len(loads)} for {len(loads)} experts"
        raise InvalidConfig("experts at a place", each, allowed)
    copies = _copies(loads, places, places * each)
    held: list[list[int]] = [[] for _ in range(places)]
    work = [Fraction(0)] * places
    for expert in sorted(range(len(loads)), key=lambda e: (-Fraction(loads[e], copies[e]), e)):
        # There is one at least: so far there are no more copies than were counted.
        free = [place for place in range(places) if len(held[place]) < each]
        chosen = sorted(free, key=lambda place: (work[place], place))[: copies[expert]]
        for place in chosen:
            held[place].append(expert)
            work[place] += Fraction(loads[expert], len(chosen))
    return Placement(tuple(tuple(sorted(experts)) for experts in held))


def _copies(loads: Sequence[int], places: int, room: int) -> list[int]:
    """Return how many copies each expert has: at least one, at most one at each place."""
    copies = [1] * len(loads)
    for _ in range(room - len(loads)):
        open_ones = [e for e in range(len(loads)) if copies[e] < places]
        if not open_ones:
            break
        copies[max(open_ones, key=lambda e: (Fraction(loads[e], copies[e]), -e))] += 1
    return copies
