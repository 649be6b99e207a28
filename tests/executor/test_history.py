from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.ids import SeqId
from baton.core.request import SamplingParams
from baton.engine.step import SamplingContext
from baton.executor.batch import SampledRow
from baton.executor.history import Histories, History

LOOKS_BACK = SamplingParams(presence_penalty=1.0)


@given(
    st.lists(st.lists(st.integers(0, 300), max_size=150), max_size=4),
    st.integers(0, 300),
)
def test_tokens_are_counted_however_they_come(pieces: list[list[int]], prompt_len: int) -> None:
    history = History(prompt_len)
    for piece in pieces:
        history.extend(piece)
    tokens = [token for piece in pieces for token in piece]
    counted = Counter(tokens[prompt_len:])
    assert history.tokens == tokens
    assert len(set(history.ids.tolist())) == len(history.ids)
    found = dict(zip(history.ids.tolist(), history.counts.tolist(), strict=True))
    assert found == {token: counted[token] for token in tokens}


def row(seq: int, tokens: tuple[int, ...], before: tuple[int, ...] | None, end: int) -> SampledRow:
    context = SamplingContext(2, (), before)
    return SampledRow(SeqId(seq), end, LOOKS_BACK, tokens, context)


def test_only_the_sequences_of_the_last_step_are_kept() -> None:
    histories = Histories()
    histories.advance([row(1, (1, 2), (), 2), row(2, (9,), (7, 8), 3)])
    assert len(histories) == 2
    found = histories.advance([row(2, (9,), None, 4)])
    assert len(histories) == 1
    assert found[SeqId(2)].tokens == [7, 8, 9, 9]
    with pytest.raises(KeyError):
        histories.advance([row(1, (3,), None, 3)])


def test_a_history_that_is_told_again_is_rebuilt() -> None:
    histories = Histories()
    histories.advance([row(1, (1, 2, 3), (), 3)])
    found = histories.advance([row(1, (5, 6, 5), (4,), 4)])
    assert found[SeqId(1)].tokens == [4, 5, 6, 5]


def test_a_step_that_does_not_follow_the_last_is_a_bug() -> None:
    histories = Histories()
    histories.advance([row(1, (1, 2, 3), (), 3)])
    with pytest.raises(AssertionError):
        histories.advance([row(1, (5,), None, 5)])
