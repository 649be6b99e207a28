import random

import pytest

from baton.core.errors import Unavailable
from baton.core.handover import BlockRef
from baton.kv_transfer.staging_pool import Claim, StagingPool

Pages = tuple[BlockRef, ...]


def numbers(pages: Pages) -> list[tuple[int, int]]:
    return [(page.block, page.epoch) for page in pages]


def test_pages_are_granted_all_or_nothing_and_in_order_of_arrival() -> None:
    pool, told = StagingPool(4), list[tuple[str, Pages]]()
    first = pool.claim(3, lambda pages: told.append(("first", pages)))
    second = pool.claim(2, lambda pages: told.append(("second", pages)))
    third = pool.claim(1, lambda pages: told.append(("third", pages)))
    assert [name for name, _ in told] == ["first"]  # the third would fit, and has come later
    assert pool.stats().waiting == 2
    assert "waiting=2" in repr(pool)
    pool.give_back(first)
    assert [(name, numbers(pages)) for name, pages in told] == [
        ("first", [(0, 0), (1, 0), (2, 0)]),
        ("second", [(0, 1), (1, 1)]),
        ("third", [(2, 1)]),
    ]
    for claim in (second, third, third):
        pool.give_back(claim)
    pool.check(idle=True)


def test_who_gives_up_waiting_lets_the_next_one_in() -> None:
    pool, told = StagingPool(2), list[Pages]()
    held = pool.claim(1, told.append)
    waiting = pool.claim(2, told.append)
    last = pool.claim(1, told.append)
    pool.give_back(waiting)
    assert told == [held.pages, last.pages]
    with pytest.raises(AssertionError, match="staging leaked"):
        pool.check(idle=True)


def test_more_than_there_is_at_all_is_refused() -> None:
    with pytest.raises(Unavailable, match="3 pages of staging memory are needed, and there are 2"):
        StagingPool(2).claim(3, print)


@pytest.mark.parametrize("seed", range(20))
def test_no_page_has_two_owners_and_none_is_lost(seed: int) -> None:
    draw, pool = random.Random(seed), StagingPool(7)
    claims: list[Claim] = []
    granted: list[Pages] = []
    for _ in range(200):
        if claims and draw.random() < 0.5:
            pool.give_back(claims.pop(draw.randrange(len(claims))))
        else:
            claims.append(pool.claim(draw.randint(1, 7), granted.append))
        pool.check()
        held = [page.block for claim in claims for page in claim.pages]
        assert len(held) == len(set(held)) == 7 - pool.stats().free
    for claim in claims:
        pool.give_back(claim)
    pool.check(idle=True)
    assert len(set(map(id, granted))) == len(granted)
    everything = [ref for pages in granted for ref in pages]
    assert len(set(everything)) == len(everything), "a reference was given out twice"
