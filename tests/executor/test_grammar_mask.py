"""What may come next where a grammar, bad words, stop tokens and their minimum meet."""

from collections.abc import Sequence

import numpy as np
import pytest

from baton.executor.grammar_mask import GrammarMask

EOS = 0
VOCABULARY = 70


def allowed(
    tokens: Sequence[int],
    *,
    accepts: bool = False,
    forbidden: Sequence[int] = (),
    stops: Sequence[int] = (EOS,),
) -> list[int]:
    """Of a grammar that allows `tokens`; like the library's, it allows EOS where it accepts."""
    bits = np.zeros(96, dtype=bool)
    bits[[*tokens, *([EOS] if accepts else [])]] = True
    words = np.packbits(bits, bitorder="little").view(np.int32)
    found = GrammarMask(words, accepts, (EOS,), VOCABULARY).allowed(iter(forbidden), tuple(stops))
    assert found.shape == (VOCABULARY,)
    again = GrammarMask(words, accepts, (EOS,), VOCABULARY).allowed(iter(forbidden), tuple(stops))
    assert (again == found).all(), "the mask itself has changed"
    return np.flatnonzero(found).tolist()


@pytest.mark.parametrize(
    ("expected", "tokens", "options"),
    [
        ([3, 69], [3, 69], {}),
        # Stop tokens where the text may end, and only there.
        ([EOS, 3], [3], {"accepts": True}),
        ([EOS, 3, 7], [3], {"accepts": True, "stops": (EOS, 7)}),
        ([3], [3, 7], {"stops": (EOS, 7)}),
        ([EOS], [], {"accepts": True}),
        # Other reasons.
        ([3], [3, 5], {"forbidden": [5]}),
        ([3], [3], {"accepts": True, "forbidden": [EOS]}),
        ([EOS], [5], {"accepts": True, "forbidden": [5]}),
        # The grammar goes before: something must come.
        ([5], [5], {"forbidden": [5]}),
        ([7], [7], {"stops": (EOS, 7)}),
        ([EOS], [], {"accepts": True, "forbidden": [EOS]}),
        ([EOS, 7], [5], {"accepts": True, "forbidden": [5, EOS, 7], "stops": (EOS, 7)}),
        # A request that no token ends.
        ([3], [3], {"accepts": True, "stops": ()}),
        ([EOS], [], {"accepts": True, "stops": ()}),
    ],
)
def test_what_may_come_next(expected: list[int], tokens: list[int], options: dict) -> None:
    assert allowed(tokens, **options) == expected
