import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.errors import InvalidConfig
from baton.core.kv_layout import HeadRange, KVLayout, LayerRange, SlotRange
from baton.core.sharded_layout import Rank, ShardedLayout

MODEL = KVLayout(layers=7, kv_heads=2, block_size=8, head_dim=4, dtype="float32")


def test_fewer_heads_than_ranks_are_held_by_neighbours() -> None:
    layout = ShardedLayout(MODEL, tp=4)
    assert [layout.heads(rank).start for rank in layout.ranks] == [0, 0, 1, 1]
    assert layout.replicas == 2
    assert layout.shard(Rank(tp=3)).layout.kv_heads == 1


def test_stages_may_differ_in_size() -> None:
    layout = ShardedLayout(MODEL, tp=2, stages=(1, 5))
    assert [layout.layers(Rank(pp)) for pp in range(3)] == [
        LayerRange(0, 1),
        LayerRange(1, 5),
        LayerRange(5, 7),
    ]
    assert layout.ranks == tuple(Rank(pp, tp) for pp in range(3) for tp in range(2))
    shard = layout.shard(Rank(1, 1))
    assert (shard.layout.layers, shard.layout.kv_heads) == (4, 1)
    assert (shard.layers, shard.heads) == (LayerRange(1, 5), HeadRange(1, 2))


@given(layers=st.integers(1, 9), pp=st.integers(1, 9))
def test_even_stages_differ_by_one_layer_at_most(layers: int, pp: int) -> None:
    model = KVLayout(layers, 2, 8, 4, "float32")
    if pp > layers:
        with pytest.raises(InvalidConfig, match="pp"):
            ShardedLayout.even(model, pp=pp)
        return
    layout = ShardedLayout.even(model, pp=pp)
    sizes = [len(layout.layers(Rank(stage))) for stage in range(pp)]
    assert layout.pp == pp
    assert sum(sizes) == layers
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def test_pieces_are_found_by_the_numbers_of_the_model() -> None:
    shard = ShardedLayout(MODEL, tp=2, stages=(3,)).shard(Rank(1, 1))
    pieces = list(shard.pieces(LayerRange(4, 5), HeadRange(1, 2), SlotRange(2, 4)))
    assert pieces == [(shard.layout.layer_bytes + part * 128 + 2 * 16, 32) for part in range(2)]


@pytest.mark.parametrize(
    ("field", "tp", "stages"),
    [("tp", 0, ()), ("tp", 3, ()), ("stages", 1, (0,)), ("stages", 1, (7,)), ("stages", 1, (3, 3))],
)
def test_what_cannot_be_split_is_refused(field: str, tp: int, stages: tuple[int, ...]) -> None:
    with pytest.raises(InvalidConfig) as raised:
        ShardedLayout(MODEL, tp, stages)
    assert raised.value.field == field


def test_a_description_names_every_field() -> None:
    described = ShardedLayout(MODEL, tp=2, stages=(3,)).describe()
    assert described == {"model": MODEL.describe(), "tp": 2, "stages": (3,)}
