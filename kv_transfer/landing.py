"""Where decode has the bytes land that it reads: in its blocks, or in pages of staging memory.

Staging is needed where bytes must be converted, and where no transport can write the pool. A read
then takes one page at a time: the units of a piece of the offer land in it, are verified there, and
are put from there into the pool's blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from baton.core.errors import Incompatible
from baton.core.kv_layout import KVLayout, LayerRange
from baton.core.sharded_layout import Rank, ShardedLayout
from baton.kv_transfer.plan import TokenRange, TransferPlan, plan_between

LARGEST_BLOCK = 32
"""Tokens of the largest block that a peer is expected to have; offers end at multiples of it."""


@dataclass(frozen=True, slots=True)
class Landing:
    """What a decode instance has to read into."""

    in_pool: bool = True
    """Whether transports can write its blocks."""
    page_bytes: int = 0
    """Size of a page of the leader's staging memory; 0 if no rank has any.

    Other ranks may have pages of other sizes, each of its own `least_page` at least.
    """


def least_page(layout: KVLayout) -> int:
    """Return the bytes that a page needs for KV of any dtype and block size that a peer may have.

    That is one block of the largest, in float32: the smallest part of an offer that can be
    converted by itself.
    """
    tokens = max(LARGEST_BLOCK, layout.block_size)
    return layout.layers * layout.runs_per_layer * tokens * layout.head_dim * 4


def landing_plan(source: ShardedLayout, target: ShardedLayout, landing: Landing) -> TransferPlan:
    """Return the plan by which decode reads.

    Raises Incompatible, with both values, if KV cannot get from one to the other.
    """
    plan = plan_between(source, target, staged=not landing.in_pool)
    if plan.in_place:
        return plan
    sides = (
        f"prefill has KV of {source.model.dtype} in blocks of {source.model.block_size}, "
        f"decode of {target.model.dtype} in blocks of {target.model.block_size}, and "
    )
    if not landing.page_bytes:
        raise Incompatible(f"{sides}no staging memory to convert it in")
    for rank in target.ranks:
        unit = plan.landing(rank, source.model.all_layers).layout
        needed = unit.block_bytes * plan.offer_tokens // plan.unit_tokens
        page_bytes = max(landing.page_bytes, least_page(target.shard(rank).layout))
        if needed > page_bytes:
            raise Incompatible(
                f"{sides}pages of {page_bytes} bytes of staging memory; {needed} bytes must fit"
            )
    return plan


def pieces(
    plan: TransferPlan, rank: Rank, layers: LayerRange, tokens: TokenRange, page_bytes: int
) -> Iterator[TokenRange]:
    """Cut `tokens` into parts whose units fit a page; all but the last end where both blocks do.

    So no part leaves a block of the target half converted, which matters where it has a scale.
    """
    unit_bytes = plan.landing(rank, layers).layout.block_bytes
    step = page_bytes // unit_bytes * plan.unit_tokens // plan.offer_tokens * plan.offer_tokens
    assert step > 0, f"a page of {page_bytes} bytes for units of {unit_bytes}"
    start = tokens.start
    while start < tokens.end:
        end = min(tokens.end, start // plan.offer_tokens * plan.offer_tokens + step)
        yield TokenRange(start, end)
        start = end
