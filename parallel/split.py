"""How a dimension is cut over ranks: evenly, or as evenly as it goes."""

from itertools import accumulate


def even(count: int, rank: int, size: int) -> slice:
    """Return the part of `count` that one of `size` ranks has; `size` divides `count`."""
    assert count % size == 0, f"{count} over {size} ranks"
    part = count // size
    return slice(rank * part, (rank + 1) * part)


def sizes(count: int, size: int) -> tuple[int, ...]:
    """Return `size` parts of `count` that differ by one at most, larger ones first."""
    part, larger = divmod(count, size)
    return tuple(part + (rank < larger) for rank in range(size))


def uneven(count: int, rank: int, size: int) -> slice:
    """Return the part of `count` that one rank has, of parts as `sizes` has them."""
    ends = (0, *accumulate(sizes(count, size)))
    return slice(ends[rank], ends[rank + 1])
