"""Which part of a model one rank computes."""

from dataclasses import dataclass, field

from baton.core.kv_layout import LayerRange
from baton.core.sharded_layout import Rank, Shard, ShardedLayout
from baton.models.spec import ModelSpec
from baton.parallel.expert_placement import Placement, even_placement
from baton.parallel.group import Ranks
from baton.parallel.mesh import AXES, Mesh
from baton.parallel.split import uneven

SCATTER_FROM = 1024
"""Tokens of a step from which on norms are spread over the tensor-parallel ranks: where, over Gloo
on one host, it began to pay (bench/RESULTS.md)."""


@dataclass(frozen=True, slots=True)
class Share:
    """A rank's part; by default there is one rank and it has all.

    All ranks of an instance are given the same stages and placements.
    """

    ranks: Ranks = field(default_factory=Ranks)
    stages: tuple[int, ...] = ()
    """The first layer of each stage but the first, as in ShardedLayout."""
    placements: tuple[Placement | None, ...] = ()
    """By layer of the model, where its experts are; evenly where nothing is said."""
    scatter_from: int = SCATTER_FROM

    def __post_init__(self) -> None:
        assert len(self.stages) + 1 == self.ranks.pp.size, f"{self.stages} for {self.ranks.pp}"

    @property
    def mesh(self) -> Mesh:
        """The mesh that the rank is in."""
        ranks = self.ranks
        return Mesh(**{axis: getattr(ranks, axis).size for axis in AXES})

    @property
    def first(self) -> bool:
        """Whether the rank is in the first stage, which has the embedding."""
        return self.ranks.pp.rank == 0

    @property
    def last(self) -> bool:
        """Whether the rank is in the last stage, which has the output matrix."""
        return self.ranks.pp.rank == self.ranks.pp.size - 1

    def layers(self, spec: ModelSpec) -> LayerRange:
        """Return the layers of the rank's stage."""
        borders = (0, *self.stages, spec.layers)
        return LayerRange(borders[self.ranks.pp.rank], borders[self.ranks.pp.rank + 1])

    def vocabulary(self, spec: ModelSpec) -> slice:
        """Return the tokens whose rows of the embedding and the output matrix the rank has."""
        return uneven(spec.vocab_size, self.ranks.tp.rank, self.ranks.tp.size)

    def placement(self, layer: int, experts: int) -> Placement:
        """Return where the experts of a layer are."""
        given = self.placements[layer] if self.placements else None
        return given or even_placement(experts, self.ranks.ep.size)

    def kv(self, spec: ModelSpec, block_size: int, dtype: str) -> Shard:
        """Return the layout of the rank's KV pool, and what of the model it holds."""
        whole = spec.kv_layout(block_size, dtype)
        layout = ShardedLayout(whole, self.ranks.tp.size, self.stages)
        return layout.shard(Rank(self.ranks.pp.rank, self.ranks.tp.rank))
