"""The transfer plan: which bytes of which pool go where. Pure arithmetic, no I/O.

The two sides may differ in tensor- and pipeline-parallel sizes, in block size and in dtype. A
target rank reads from each source rank that holds some of its layers and heads; what the two have
in common is a *link*. It is read in *units* of as many tokens as the smaller block has:

    source, TP 2, blocks of 16           target, TP 1, blocks of 32
    rank 0 │ heads 0 1 │ block 7 ────────▶ heads 0 1 │ slots  0 to 16 │
    rank 0 │ heads 0 1 │ block 9 ────────▶ heads 0 1 │ slots 16 to 32 │ block 4
    rank 1 │ heads 2 3 │ block 7 ────────▶ heads 2 3 │ slots  0 to 16 │
    rank 1 │ heads 2 3 │ block 9 ────────▶ heads 2 3 │ slots 16 to 32 │

All units of a link have one of a few patterns of runs, by their place in the larger block. The
patterns are worked out once; an offer only adds to them the places of its blocks.

Where bytes cannot land in place, because the dtype differs, because source blocks with a scale each
would have to share one, or because no transport can write the target's memory, the units land in
staging as they are, one after the other, and are converted once they are verified: see Conversion.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from baton.core.errors import Incompatible
from baton.core.hashing import hash_bytes
from baton.core.ids import BlockId, Ticket
from baton.core.kv_layout import HeadRange, KVLayout, LayerRange, SlotRange
from baton.core.sharded_layout import Rank, Shard, ShardedLayout
from baton.kv_transfer.runs import Columns, Ints, RunTable, merge

_CACHED = 512
"""Groups of layers whose patterns a plan keeps, counted by rank and turn."""


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Tokens of a prompt from `start` up to, not including, `end`."""

    start: int
    end: int


@dataclass(frozen=True, slots=True, order=True)
class Link:
    """What a target rank reads from one source rank."""

    source: Rank
    layers: LayerRange
    """Of the model."""
    heads: HeadRange
    """Of the model."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What remains to be done with units that lie in staging; kernels/kv_convert.py does it."""

    staging: KVLayout
    """One unit: the layers that were read and the rank's heads, in the source's dtype."""
    target: KVLayout
    """The target rank's blocks."""
    first_layer: int
    """The layer of the target rank's blocks that staging begins with."""
    tokens: int
    """How many are staged; the last unit may have slots beyond them, which hold nothing."""
    blocks: tuple[BlockId, ...]
    """The target rank's blocks for them, in order."""
    first_slot: int
    """Where in the first block the first unit begins; 0 if the target has scales."""


def plan_between(
    source: ShardedLayout, target: ShardedLayout, *, staged: bool = False
) -> "TransferPlan":
    """Return the plan of a pair of layouts, which all handovers between them share.

    Raises Incompatible as TransferPlan does.
    """
    return _plan(source, target, staged)


@lru_cache(64)
def _plan(source: ShardedLayout, target: ShardedLayout, staged: bool) -> "TransferPlan":
    return TransferPlan(source, target, staged=staged)


class TransferPlan:
    """How KV comes from the ranks of one instance to those of another; made once per pair.

    Raises Incompatible, with both values, if KV of one side cannot become KV of the other.
    """

    def __init__(
        self, source: ShardedLayout, target: ShardedLayout, *, staged: bool = False
    ) -> None:
        """`staged`: the target's blocks are where no transport can write, as on some devices."""
        _check_pair(source.model, target.model)
        self.source = source
        self.target = target
        sizes = source.model.block_size, target.model.block_size
        self.unit_tokens = min(sizes)
        """Tokens that are read, and digested, together."""
        self.offer_tokens = max(sizes)
        """Offers end at multiples of it, or with the prompt: none leaves a target block half."""
        same = source.model.dtype == target.model.dtype
        scales_fit = not source.model.scaled or sizes[0] >= sizes[1]
        self.in_place = same and scales_fit and not staged
        """Whether bytes land in the target's blocks; else they land in staging."""
        sides = json.dumps([source.describe(), target.describe()])
        self.identity = hash_bytes(sides.encode())
        """Names both layouts, whatever lands where; digests are bound to it."""
        self._routes = lru_cache(_CACHED)(self._make_routes)

    def __repr__(self) -> str:
        return f"TransferPlan({self.source} → {self.target})"

    def links(self, rank: Rank, layers: LayerRange, turn: int = 0) -> tuple[Link, ...]:
        """Return what a target rank reads of `layers` of the model, and from whom.

        Of source ranks that hold the same heads it reads from one; target ranks that hold the
        same heads are spread over those. `turn` spreads requests too.
        """
        replicas = self.source.replicas
        chosen = (rank.tp % self.target.replicas + turn) % replicas
        wanted = self.target.layers(rank).within(layers)
        links = []
        for pp in range(self.source.pp):
            held = self.source.layers(Rank(pp)).within(wanted)
            for tp in range(chosen, self.source.tp, replicas):
                heads = self.source.heads(Rank(pp, tp)).within(self.target.heads(rank))
                if len(held) and len(heads):
                    links.append(Link(Rank(pp, tp), held, heads))
        return tuple(links)

    def turn(self, ticket: Ticket) -> int:
        """Return the turn of a handover, the same on both sides."""
        return int.from_bytes(ticket, "big") % self.source.replicas

    def landing(self, rank: Rank, layers: LayerRange) -> Shard:
        """Return where `layers` of the model land: a target rank's blocks, or units in staging."""
        shard = self.target.shard(rank)
        if self.in_place:
            return shard
        held = shard.layers.within(layers)
        dtype = self.source.model.dtype
        unit = replace(shard.layout, layers=len(held), block_size=self.unit_tokens, dtype=dtype)
        return Shard(unit, held, shard.heads)

    def num_units(self, tokens: TokenRange) -> int:
        """Return how many units hold `tokens`, which begin where a unit does."""
        assert tokens.start % self.unit_tokens == 0, f"{tokens} begin inside a unit"
        return -(-(tokens.end - tokens.start) // self.unit_tokens)

    def slots(self, unit: int, block_size: int) -> SlotRange:
        """Return where unit number `unit` of a prompt lies in blocks of `block_size`."""
        start = unit * self.unit_tokens % block_size
        return SlotRange(start, start + self.unit_tokens)

    def reads(
        self,
        rank: Rank,
        layers: LayerRange,
        tokens: TokenRange,
        source_blocks: Sequence[BlockId],
        landing_blocks: Sequence[int],
        *,
        landing_offset: int = 0,
        turn: int = 0,
    ) -> "dict[Rank, UnitReads]":
        """Return, by source rank, the runs that bring `layers` of the model to a target rank.

        Each list of blocks begins with the one that holds `tokens.start`, which begins a unit;
        the last unit travels whole, slots beyond `tokens.end` included. `landing_blocks` are the
        target's if bytes land in place, else numbers of units in staging. Remote offsets count
        from the start of the source rank's pool, local ones from `landing_offset` bytes before
        the first landing block. Over all target ranks, every byte is written exactly once.
        """
        first, count = tokens.start // self.unit_tokens, self.num_units(tokens)
        units = np.arange(first, first + count)
        landing, routes = self._routes(rank, layers, turn)
        local = landing_offset + landing.places(units, landing_blocks)
        return {
            source: UnitReads(_spread(patterns, first, local, blocks.places(units, source_blocks)))
            for source, blocks, patterns in routes
        }

    def conversion(
        self, rank: Rank, layers: LayerRange, tokens: TokenRange, blocks: Sequence[BlockId]
    ) -> Conversion:
        """Return how units read into staging, numbered from 0, become KV of the target's blocks.

        Of layouts with scales, `tokens` begin where a target block does.
        """
        shard, landing = self.target.shard(rank), self.landing(rank, layers)
        slot = tokens.start % shard.layout.block_size
        assert slot == 0 or not shard.layout.scaled, f"a scale is of a whole block, not of {tokens}"
        return Conversion(
            staging=landing.layout,
            target=shard.layout,
            first_layer=landing.layers.start - shard.layers.start,
            tokens=tokens.end - tokens.start,
            blocks=tuple(blocks),
            first_slot=slot,
        )

    def _make_routes(self, rank: Rank, layers: LayerRange, turn: int) -> "tuple[_Blocks, _Routes]":
        """Return where reads land, and from where they come: what all offers of `layers` share."""
        assert 0 <= layers.start < layers.end <= self.source.model.layers, layers
        landing = self.landing(rank, layers)
        routes: _Routes = []
        for link in self.links(rank, layers, turn):
            source = self.source.shard(link.source)
            larger = max(source.layout.block_size, landing.layout.block_size)
            places = range(larger // self.unit_tokens)
            patterns = [self._pattern(link, source, landing, place) for place in places]
            routes.append((link.source, self._blocks(source.layout), patterns))
        return self._blocks(landing.layout), routes

    def _blocks(self, layout: KVLayout) -> "_Blocks":
        return _Blocks(layout.block_size // self.unit_tokens, layout.block_bytes)

    def _pattern(self, link: Link, source: Shard, landing: Shard, unit: int) -> Columns:
        remote, length = self._unit_columns(link, source, unit)
        local, _ = self._unit_columns(link, landing, unit)
        return merge(local, remote, length)

    def _unit_columns(self, link: Link, shard: Shard, unit: int) -> tuple[Ints, Ints]:
        slots = self.slots(unit, shard.layout.block_size)
        pieces = np.array(list(shard.pieces(link.layers, link.heads, slots)), np.int64)
        return pieces[:, 0], pieces[:, 1]


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Blocks of one pool, as reads need to know them."""

    units: int
    """Per block."""
    bytes: int
    """Per block."""

    def places(self, units: Ints, blocks: Sequence[int]) -> Ints:
        """Return where the block of each unit begins in its pool, in bytes [units]."""
        places: Ints = np.array(blocks, np.int64) * self.bytes
        if self.units > 1:
            index = units // self.units
            places = places[index - index[:1]]
        assert places.size >= units.size, f"{len(blocks)} blocks for {units.size} units"
        return places[: units.size]


_Routes = list[tuple[Rank, _Blocks, list[Columns]]]
"""Source rank, its blocks, and the runs of a unit at each of its places in the larger block."""


_Placed = tuple[Ints, Columns]
"""Units, counted from the first that is read, and their runs, as many of each."""


def _spread(patterns: Sequence[Columns], first: int, local: Ints, remote: Ints) -> list[_Placed]:
    """Return the runs of units that begin with number `first`, at their blocks' places [units]."""
    places = len(patterns)
    parts: list[_Placed] = []
    units = np.arange(local.size)
    for place, (within_local, within_remote, length) in enumerate(patterns):
        at = slice((place - first) % places, None, places)
        offsets = local[at, None] + within_local
        lengths = np.broadcast_to(length, offsets.shape)
        columns = offsets.ravel(), (remote[at, None] + within_remote).ravel(), lengths.ravel()
        parts.append((units[at], columns))
    return parts


class UnitReads(RunTable):
    """The runs of units, as few as can be, for whoever copies; and one by one, for who hashes."""

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[_Placed]) -> None:
        super().__init__(*merge(*_joined([columns for _, columns in parts])))
        self._parts = parts

    def by_unit(self) -> tuple[Columns, Ints]:
        """Return the runs unit after unit, and where those of each end [units].

        Those of a unit are in the order of its bytes (see units.py).
        """
        if len(self._parts) == 1:
            ((units, columns),) = self._parts
            each = columns[0].size // max(units.size, 1)
            return columns, np.arange(1, units.size + 1) * each
        unit = np.concatenate(
            [np.repeat(u, columns[0].size // max(u.size, 1)) for u, columns in self._parts]
        )
        order = np.argsort(unit, kind="stable")
        local, remote, length = _joined([columns for _, columns in self._parts])
        return (local[order], remote[order], length[order]), np.cumsum(np.bincount(unit))


def _joined(parts: Sequence[Columns]) -> Columns:
    if len(parts) == 1:
        return parts[0]
    local, remote, length = map(np.concatenate, zip(*parts, strict=True))
    return local, remote, length


def _check_pair(source: KVLayout, target: KVLayout) -> None:
    for field in ("layers", "kv_heads", "head_dim", "parts"):
        theirs, ours = getattr(source, field), getattr(target, field)
        if theirs != ours:
            raise Incompatible(f"KV {field} must be equal: prefill has {theirs}, decode {ours}")
    sizes = source.block_size, target.block_size
    if max(sizes) % min(sizes):
        raise Incompatible(
            f"one block_size must divide the other: prefill has {sizes[0]}, decode {sizes[1]}"
        )
    if target.dtype == "float16" != source.dtype:
        raise Incompatible(
            f"KV dtype float16 of decode cannot hold all values of prefill's {source.dtype}; "
            "allowed for decode: prefill's own, float32, bfloat16, float8_e4m3fn"
        )
