"""How dimensions are cut over ranks."""

import pytest

from baton.parallel.split import even, sizes, uneven


def test_even_parts_follow_each_other() -> None:
    assert [even(12, rank, 3) for rank in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    with pytest.raises(AssertionError, match="10 over 3 ranks"):
        even(10, 0, 3)


@pytest.mark.parametrize(("count", "size"), [(10, 3), (3, 3), (2, 5), (0, 2), (7, 1)])
def test_uneven_parts_differ_by_one_at_most(count: int, size: int) -> None:
    parts = [range(count)[uneven(count, rank, size)] for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(count))
    assert tuple(len(part) for part in parts) == sizes(count, size)
    assert max(sizes(count, size)) - min(sizes(count, size)) <= 1
