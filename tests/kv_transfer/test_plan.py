from hypothesis import given
from hypothesis import strategies as st

from baton.core.ids import BlockId
from baton.core.kv_layout import KVLayout, LayerRange
from baton.kv_transfer.plan import plan_reads

NUM_BLOCKS = 12


@given(
    layers=st.integers(1, 6),
    heads=st.sampled_from([1, 2, 3]),
    block_size=st.sampled_from([8, 16, 32]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    parts=st.sampled_from([1, 2]),
    data=st.data(),
)
def test_every_byte_of_the_target_is_written_once_from_the_right_source(
    layers: int, heads: int, block_size: int, dtype: str, parts: int, data: st.DataObject
) -> None:
    layout = KVLayout(layers, heads, block_size, 4, dtype, parts)
    pair = st.permutations(range(NUM_BLOCKS))
    count = data.draw(st.integers(0, NUM_BLOCKS))
    source = [BlockId(b) for b in data.draw(pair)[:count]]
    target = [BlockId(b) for b in data.draw(pair)[:count]]
    start = data.draw(st.integers(0, layers - 1))
    wanted = LayerRange(start, data.draw(st.integers(start + 1, layers)))

    # A pool whose every byte is unique in (block, offset) by position, read run by run.
    came_from: dict[int, int] = {}
    for run in plan_reads(layout, wanted, source, target):
        for i in range(0, run.length, 4):
            assert run.local_offset + i not in came_from, "written twice"
            came_from[run.local_offset + i] = run.remote_offset + i

    expected = {}
    for theirs, ours in zip(source, target, strict=True):
        for layer in range(wanted.start, wanted.end):
            for i in range(0, layout.layer_bytes, 4):
                inside = layer * layout.layer_bytes + i
                expected[ours * layout.block_bytes + inside] = theirs * layout.block_bytes + inside
    assert came_from == expected
