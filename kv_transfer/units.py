"""The units of an offer: what has a digest of its own, and where its bytes lie on either side.

A unit is what some target rank reads as a whole: of one source block and group of layers, the
tokens of one unit of the plan and the heads that a source and a target rank have in common. So
whoever reads only some heads, or only a part of a block, can check just what it has read. Between
equal layouts a unit is a whole block of a group of layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from baton.core.kv_layout import HeadRange, LayerRange, SlotRange
from baton.core.sharded_layout import Rank, Shard
from baton.kernels.kv_digest import Pieces
from baton.kv_transfer.plan import TransferPlan
from baton.kv_transfer.runs import Ints

_CACHED = 1024


@dataclass(frozen=True, slots=True, order=True)
class Unit:
    """A part of a source block; sorted by the rank that holds it."""

    source: Rank
    slots: SlotRange
    """Of the source block."""
    layers: LayerRange
    """Of the model."""
    heads: HeadRange
    """Of the model."""


@dataclass(frozen=True, slots=True)
class PlacedUnits:
    """Units of a block, and where their bytes lie in it, in an order that both sides share."""

    units: tuple[Unit, ...]
    offsets: Ints
    """Of pieces, in bytes from the start of the block; none continues the one before it."""
    lengths: Ints
    """Of pieces, in bytes."""
    counts: Ints
    """Pieces of each unit."""
    facts: NDArray[np.uint32]
    """Where layers, heads and slots of each unit start and end [units, 6]."""


@lru_cache(_CACHED)
def units_of_block(
    plan: TransferPlan, layers: LayerRange, used_slots: int, turn: int
) -> tuple[Unit, ...]:
    """Return the units of a source block with so many slots in use, as an offer orders them."""
    links = {link for rank in plan.target.ranks for link in plan.links(rank, layers, turn)}
    size = plan.source.model.block_size
    slots = [plan.slots(n, size) for n in range(-(-used_slots // plan.unit_tokens))]
    units = [Unit(link.source, slot, link.layers, link.heads) for link in links for slot in slots]
    return tuple(sorted(units))


@lru_cache(_CACHED)
def held_units(
    plan: TransferPlan, rank: Rank, layers: LayerRange, used_slots: int, turn: int
) -> PlacedUnits:
    """Return those of them that a source rank holds, as they lie in its blocks, in order."""
    shard = plan.source.shard(rank)
    whole = units_of_block(plan, layers, used_slots, turn)
    units = tuple(unit for unit in whole if unit.source == rank)
    return _placed(shard, [(unit, unit.slots) for unit in units])


@lru_cache(_CACHED)
def read_units(
    plan: TransferPlan, rank: Rank, layers: LayerRange, place: int, turn: int
) -> PlacedUnits:
    """Return what a target rank reads of a prompt's unit number `place`, as it lies where it lands.

    The same for all numbers that differ by a multiple of the units of the larger block.
    """
    shard = plan.landing(rank, layers)
    slots = plan.slots(place, shard.layout.block_size)
    of_source = plan.slots(place, plan.source.model.block_size)
    units = [
        Unit(link.source, of_source, link.layers, link.heads)
        for link in plan.links(rank, layers, turn)
    ]
    return _placed(shard, [(unit, slots) for unit in units])


@lru_cache(_CACHED)
def read_facts(
    plan: TransferPlan, rank: Rank, source: Rank, layers: LayerRange, turn: int
) -> NDArray[np.uint32]:
    """Return the facts of what a target rank reads from one source rank.

    Of the unit at each place in the larger block [places, 6]; see PlacedUnits.
    """
    facts = []
    for place in range(plan.offer_tokens // plan.unit_tokens):
        read = read_units(plan, rank, layers, place, turn)
        (of_source,) = (n for n, unit in enumerate(read.units) if unit.source == source)
        facts.append(read.facts[of_source])
    return np.array(facts)


@lru_cache(_CACHED)
def offered_places(
    plan: TransferPlan, rank: Rank, layers: LayerRange, place: int, used_slots: int, turn: int
) -> tuple[int, Ints]:
    """Return how many units a source block offers, and which of them `read_units` has, in order."""
    offered = units_of_block(plan, layers, used_slots, turn)
    number = {unit: index for index, unit in enumerate(offered)}
    read = read_units(plan, rank, layers, place, turn)
    return len(offered), np.array([number[unit] for unit in read.units], np.int64)


def in_memory(placed: PlacedUnits, begins: Ints) -> Pieces:
    """Return where units lie in memory, block after block that they lie alike in."""
    counts = np.tile(placed.counts, begins.size)
    return Pieces(
        (begins[:, None] + placed.offsets).ravel(),
        np.tile(placed.lengths, begins.size),
        np.cumsum(counts),
    )


def _placed(shard: Shard, units: Sequence[tuple[Unit, SlotRange]]) -> PlacedUnits:
    pieces = [_pieces(shard, unit, slots) for unit, slots in units]
    columns = np.array([piece for of_unit in pieces for piece in of_unit], np.int64).reshape(-1, 2)
    counts = np.array([len(of_unit) for of_unit in pieces], np.int64)
    facts = [
        [each for part in (unit.layers, unit.heads, unit.slots) for each in (part.start, part.end)]
        for unit, _ in units
    ]
    return PlacedUnits(
        tuple(unit for unit, _ in units),
        columns[:, 0],
        columns[:, 1],
        counts,
        np.array(facts, np.uint32).reshape(-1, 6),
    )


def _pieces(shard: Shard, unit: Unit, slots: SlotRange) -> list[tuple[int, int]]:
    pieces: list[tuple[int, int]] = []
    for offset, length in shard.pieces(unit.layers, unit.heads, slots):
        if pieces and sum(pieces[-1]) == offset:
            pieces[-1] = pieces[-1][0], pieces[-1][1] + length
        else:
            pieces.append((offset, length))
    return pieces
