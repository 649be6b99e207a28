import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.handover import BlockRef
from baton.core.ids import BlockId, Epoch, RequestId, SeqId
from baton.core.request import GenerateRequest
from baton.engine.sequence import Phase, RankOrder, Sequence


def rank_of(seq_id: int) -> int:
    """Ranks that tie, and that run against the order of arrival."""
    return -(seq_id // 3)


def sequence(seq_id: int = 0, *, prompt: int = 3, max_tokens: int = 4, hold: bool = False):
    request = GenerateRequest(RequestId("r"), tuple(range(prompt)), max_tokens)
    return Sequence(
        SeqId(seq_id), request, hold, Phase.QUEUED, list(request.prompt), rank_of(seq_id)
    )


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20))))
def test_rank_order_is_a_sorted_set(changes: list[tuple[bool, int]]):
    order, model = RankOrder(), {}
    for add, key in changes:
        if add and key not in model:
            model[key] = sequence(key)
            order.add(model[key])
        elif not add and key in model:
            order.remove(model.pop(key))
        wanted = [model[k] for k in sorted(model, key=lambda key: (rank_of(key), key))]
        assert list(order) == wanted
        assert list(order.last_first()) == wanted[::-1]
        assert order.first is (wanted[0] if wanted else None)
        assert len(order) == len(wanted)


def test_removing_what_is_not_there_is_a_bug():
    order = RankOrder()
    order.add(sequence(1))
    with pytest.raises(AssertionError):
        order.remove(sequence(1))


def test_the_last_token_needs_no_kv():
    assert sequence(prompt=3, max_tokens=4).max_kv_tokens == 6
    assert sequence(prompt=3, max_tokens=1).max_kv_tokens == 3
    assert sequence(prompt=3, max_tokens=4, hold=True).max_kv_tokens == 3


def test_blocks_and_table_change_together():
    seq = sequence()
    refs = tuple(BlockRef(BlockId(b), Epoch(1)) for b in (4, 2))
    seq.extend(refs[:1])
    seq.extend(refs[1:])
    seq.computed = 3
    assert (seq.blocks, seq.table) == (refs, (4, 2))
    assert seq.drop_blocks() == refs
    assert (seq.blocks, seq.table, seq.computed) == ((), (), 0)
