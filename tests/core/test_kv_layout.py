import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.compatibility import compatibility_hash
from baton.core.errors import InvalidConfig
from baton.core.ids import BlockId
from baton.core.kv_layout import (
    ITEM_BYTES,
    SCALE_BYTES,
    HeadRange,
    KVLayout,
    LayerRange,
    SlotRange,
)

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}  # by size

layouts = st.builds(
    KVLayout,
    layers=st.integers(1, 5),
    kv_heads=st.integers(1, 4),
    block_size=st.sampled_from([1, 8, 16]),
    head_dim=st.sampled_from([1, 4, 8]),
    dtype=st.sampled_from(sorted(ITEM_BYTES)),
    parts=st.sampled_from([1, 2]),
)


@given(layouts, st.integers(1, 4), st.data())
def test_a_run_is_the_bytes_of_its_layers(layout: KVLayout, blocks: int, data: st.DataObject):
    pool = np.zeros(layout.shape(blocks), NUMPY[layout.dtype])
    block = data.draw(st.integers(0, blocks - 1))
    start = data.draw(st.integers(0, layout.layers - 1))
    layers = LayerRange(start, data.draw(st.integers(start + 1, layout.layers)))
    pool[block, layers.start : layers.end] = 1
    offset, length = layout.run(BlockId(block), layers)
    marked = np.flatnonzero(pool.reshape(-1)) * pool.itemsize
    assert (offset, offset + length) == (marked[0], marked[-1] + pool.itemsize)
    assert length == len(marked) * pool.itemsize


@given(layouts)
def test_sizes_are_those_of_the_tensor(layout: KVLayout):
    pool = np.zeros(layout.shape(2), NUMPY[layout.dtype])
    assert layout.block_bytes == pool.strides[0] == pool[0].nbytes
    assert layout.layer_bytes == pool[0, 0].nbytes
    assert layout.run(BlockId(1), layout.all_layers) == (layout.block_bytes, layout.block_bytes)


@given(layouts, st.integers(0, 1000))
def test_blocks_for_is_the_least_that_holds(layout: KVLayout, tokens: int):
    blocks = layout.blocks_for(tokens)
    assert (blocks - 1) * layout.block_size < tokens <= blocks * layout.block_size or tokens == 0


def test_a_latent_takes_the_room_of_one_part():
    latent = KVLayout(3, 1, 16, 576, "bfloat16", parts=1)
    assert latent.shape(7) == (7, 3, 1, 1, 16, 576)
    assert latent.layer_bytes == 16 * 576 * 2


def test_a_layer_range_has_a_length():
    assert len(LayerRange(2, 5)) == 3


BASE = {
    "layers": 2,
    "kv_heads": 2,
    "block_size": 16,
    "head_dim": 8,
    "dtype": "float32",
    "parts": 2,
}
FACTS = {"model": "m", "revision": "r", "compute_dtype": "float32", "rope": "a"}


def test_compatibility_is_a_function_of_the_facts():
    first = compatibility_hash(**FACTS, layout=KVLayout(**BASE))
    assert first == compatibility_hash(**FACTS, layout=KVLayout(**BASE))
    assert len(bytes.fromhex(first)) == 16


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 3},
        {"kv_heads": 1},
        {"head_dim": 4},
        {"parts": 1},
        {"model": "n"},
        {"revision": "s"},
        {"compute_dtype": "bfloat16"},
        {"rope": "b"},
    ],
)
def test_any_other_fact_gives_another_hash(change: dict[str, object]):
    def hash_with(change: dict[str, object]) -> str:
        layout = KVLayout(**{k: change.get(k, v) for k, v in BASE.items()})
        return compatibility_hash(**{k: change.get(k, v) for k, v in FACTS.items()}, layout=layout)

    assert hash_with(change) != hash_with({})


@pytest.mark.parametrize("change", [{"block_size": 8}, {"dtype": "float16"}])
def test_what_may_differ_is_left_out(change: dict[str, object]):
    layouts = KVLayout(**BASE), KVLayout(**(BASE | change))
    first, second = (compatibility_hash(**FACTS, layout=layout) for layout in layouts)
    assert first == second


def test_a_scale_lies_behind_each_heads_values():
    layout = KVLayout(2, 3, 8, 6, "float8_e4m3fn")
    assert layout.scaled
    assert layout.value_bytes == 48
    assert layout.head_bytes == 48 + SCALE_BYTES
    assert layout.block_bytes == 2 * 2 * 3 * 64
    pieces = layout.pieces(LayerRange(1, 2), HeadRange(2, 3), SlotRange(2, 4))
    assert list(pieces) == [(512 + 12, 12), (512 + 48, 16), (704 + 12, 12), (704 + 48, 16)]


@given(layouts)
def test_pieces_of_everything_are_the_block(layout: KVLayout):
    end = 0
    for offset, length in layout.pieces(layout.all_layers, layout.all_heads, layout.all_slots):
        assert offset == end
        end += length
    assert end == layout.block_bytes


def test_what_has_no_layout_is_refused():
    with pytest.raises(InvalidConfig, match=r"dtype: 'int4'.*float32, bfloat16"):
        KVLayout(1, 1, 8, 4, "int4")
    with pytest.raises(InvalidConfig, match=r"block_size \* head_dim: 24 .* a multiple of 16"):
        KVLayout(1, 1, 8, 3, "float8_e4m3fn")


@pytest.mark.parametrize("kind", [LayerRange, HeadRange])
def test_ranges_are_cut_and_renumbered(kind: type[LayerRange] | type[HeadRange]):
    assert kind(2, 6).within(kind(4, 9)) == kind(4, 6)  # type: ignore[arg-type]
    assert len(kind(2, 4).within(kind(5, 9))) == 0  # type: ignore[arg-type]
    assert kind(4, 6).counted_from(3) == kind(1, 3)
