"""How the KV of a whole model lies on the ranks of one instance.

    tp   a layer's KV heads over ranks, evenly; with fewer heads than ranks each rank holds one,
         and neighbours hold the same:        2 heads, tp 4 → ranks 0 1 | 2 3
    pp   the layers over stages, in any sizes: 7 layers, pp 3 → 0 1 2 | 3 4 | 5 6

A latent (multi-head latent attention) is one head, so that every rank of a stage holds it whole.
All ranks of an instance share one block table: block 5 is block 5 on each.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

from baton.core.errors import InvalidConfig
from baton.core.kv_layout import HeadRange, KVLayout, LayerRange, SlotRange


@dataclass(frozen=True, slots=True, order=True)
class Rank:
    """One rank of an instance: its stage, and its place in the stage's tensor-parallel group."""

    pp: int = 0
    tp: int = 0


@dataclass(frozen=True, slots=True)
class Shard:
    """The blocks of one pool, and which part of the model they hold."""

    layout: KVLayout
    layers: LayerRange
    """Of the model; as many as the layout has."""
    heads: HeadRange
    """Of the model; as many as the layout has."""

    def pieces(
        self, layers: LayerRange, heads: HeadRange, slots: SlotRange
    ) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) in bytes of a part of a block; layers and heads of the model."""
        layers = layers.counted_from(self.layers.start)
        heads = heads.counted_from(self.heads.start)
        return self.layout.pieces(layers, heads, slots)


def held_heads(kv_heads: int, tp: int, place: int) -> HeadRange:
    """Return the KV heads that the rank at a place of a tensor-parallel group of `tp` holds.

    One number is a multiple of the other.
    """
    size = max(1, kv_heads // tp)
    start = place * size // max(1, tp // kv_heads)
    return HeadRange(start, start + size)


@dataclass(frozen=True, slots=True)
class ShardedLayout:
    """The layout of every rank's pool; raises InvalidConfig for what cannot be split so."""

    model: KVLayout
    """All layers and all heads, as a single rank would hold them."""
    tp: int = 1
    """Ranks over which the heads of a layer are split."""
    stages: tuple[int, ...] = ()
    """The first layer of each stage but the first, rising; empty for one stage."""

    def __post_init__(self) -> None:
        heads = self.model.kv_heads
        if self.tp < 1 or (heads % self.tp and self.tp % heads):
            raise InvalidConfig("tp", self.tp, f"a divisor or a multiple of {heads} KV heads")
        borders = (0, *self.stages, self.model.layers)
        if any(start >= end for start, end in pairwise(borders)):
            allowed = f"rising layers from 1 to {self.model.layers - 1}"
            raise InvalidConfig("stages", self.stages, allowed)

    @classmethod
    def even(cls, model: KVLayout, *, tp: int = 1, pp: int = 1) -> "ShardedLayout":
        """Return the layout with `pp` stages that differ by one layer at most, larger ones first.

        Raises InvalidConfig if there are fewer layers than stages.
        """
        if not 1 <= pp <= model.layers:
            raise InvalidConfig("pp", pp, f"1 to {model.layers}, the number of layers")
        size, larger = divmod(model.layers, pp)
        stages = tuple(stage * size + min(stage, larger) for stage in range(1, pp))
        return cls(model, tp, stages)

    @property
    def pp(self) -> int:
        """How many stages there are."""
        return len(self.stages) + 1

    @property
    def replicas(self) -> int:
        """How many ranks of a stage hold the same heads."""
        return max(1, self.tp // self.model.kv_heads)

    @property
    def ranks(self) -> tuple[Rank, ...]:
        """All ranks, stage by stage."""
        return tuple(Rank(pp, tp) for pp in range(self.pp) for tp in range(self.tp))

    def layers(self, rank: Rank) -> LayerRange:
        """Return the layers of the model that a rank holds."""
        borders = (0, *self.stages, self.model.layers)
        return LayerRange(borders[rank.pp], borders[rank.pp + 1])

    def heads(self, rank: Rank) -> HeadRange:
        """Return the KV heads of the model that a rank holds."""
        return held_heads(self.model.kv_heads, self.tp, rank.tp)

    def shard(self, rank: Rank) -> Shard:
        """Return the layout of a rank's pool, and what it holds."""
        layers, heads = self.layers(rank), self.heads(rank)
        layout = replace(self.model, layers=len(layers), kv_heads=len(heads))
        return Shard(layout, layers, heads)

    def describe(self) -> dict[str, object]:
        """Return the fields by name, for hashes and the log."""
        return asdict(self)
