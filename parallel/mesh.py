"""The ranks of one instance as a mesh, and the arithmetic between a rank and its place in it.

    pp   the layers, in stages                                             (slowest axis)
    dp   the sequences; what is beside them, experts too, is there as often
    ep   the experts, and the sequences
    cp   a long prompt's tokens
    tp   heads, columns and rows of matrices, the vocabulary               (fastest axis)

The fastest axis talks most, so its ranks are neighbours: with pp 2 and tp 2, ranks 0 and 1 are
stage 0. Along dp nobody talks. Attention is data-parallel along dp and ep: a sequence has its KV at
one of dp x ep places. The same as torch has it is device_mesh.py.
"""

from dataclasses import astuple, dataclass, replace
from itertools import product
from math import prod
from typing import Literal

from baton.core.errors import InvalidConfig

Axis = Literal["pp", "dp", "ep", "cp", "tp"]
AXES: tuple[Axis, ...] = ("pp", "dp", "ep", "cp", "tp")
"""From the slowest to the fastest."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is, along each axis."""

    pp: int = 0
    dp: int = 0
    ep: int = 0
    cp: int = 0
    tp: int = 0


@dataclass(frozen=True, slots=True)
class Mesh:
    """The sizes of the axes; raises InvalidConfig for one below 1."""

    pp: int = 1
    dp: int = 1
    ep: int = 1
    cp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if self.length(axis) < 1:
                raise InvalidConfig(axis, self.length(axis), "a whole number of at least 1")

    def __str__(self) -> str:
        return "".join(f"{a}{self.length(a)}" for a in AXES if self.length(a) > 1) or "tp1"

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return prod(astuple(self))

    @property
    def places(self) -> tuple[Place, ...]:
        """All places, by rank."""
        return tuple(Place(*at) for at in product(*(range(n) for n in astuple(self))))

    def length(self, axis: Axis) -> int:
        """Return the size of one axis."""
        found: int = getattr(self, axis)
        return found

    def place(self, rank: int) -> Place:
        """Return where a rank is."""
        assert 0 <= rank < self.size, f"rank {rank} of {self.size}"
        rank, tp = divmod(rank, self.tp)
        rank, cp = divmod(rank, self.cp)
        rank, ep = divmod(rank, self.ep)
        pp, dp = divmod(rank, self.dp)
        return Place(pp, dp, ep, cp, tp)

    def rank(self, place: Place) -> int:
        """Return the rank at a place."""
        rank = place.pp * self.dp + place.dp
        return ((rank * self.ep + place.ep) * self.cp + place.cp) * self.tp + place.tp

    def line(self, rank: int, axis: Axis) -> tuple[int, ...]:
        """Return the ranks that differ from `rank` along `axis` only, itself included, in order."""
        place = self.place(rank)
        return tuple(self.rank(replace(place, **{axis: i})) for i in range(self.length(axis)))

    def lines(self, axis: Axis) -> tuple[tuple[int, ...], ...]:
        """Return all lines along `axis`; every rank is on one."""
        return tuple(dict.fromkeys(self.line(rank, axis) for rank in range(self.size)))
