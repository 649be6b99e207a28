"""The floors of an 8B model's work, beside figures computed by hand."""

import pytest

from bench.gpu import floors
from bench.gpu.clock import input_sets, timing
from bench.gpu.floors import LLAMA_8B, Ceilings, ModelShape, Work

H200 = Ceilings(read_bytes_s=4.8e12, flops_s=989e12)
"""By its datasheet."""


def test_a_step_of_8b_reads_fifteen_gigabytes_of_weights():
    # A layer: 4096 x (4096 + 2 x 1024) q, k, v; 4096 x 4096 o; 3 x 4096 x 14336 gate, up, down.
    assert LLAMA_8B.layer_weights == 25_165_824 + 16_777_216 + 176_160_768
    assert LLAMA_8B.head_weights == 128_256 * 4096
    assert floors.weight_bytes(LLAMA_8B) == 2 * (32 * 218_103_808 + 525_336_576) == 15_009_316_864
    assert floors.weight_bytes(LLAMA_8B, item=1) == 7_504_658_432


def test_a_token_of_8b_has_131_kilobytes_of_kv():
    assert floors.kv_bytes_per_token(LLAMA_8B) == 2 * 32 * 2 * 8 * 128 == 131_072


@pytest.mark.parametrize(
    ("batch", "context", "milliseconds"),
    [(1, 1024, 3.15), (32, 1024, 4.02), (128, 1024, 6.71), (128, 4096, 17.44), (256, 1024, 10.28)],
)
def test_decode_steps_are_bound_by_memory(batch, context, milliseconds):
    work = floors.decode_step(LLAMA_8B, batch, context)
    assert work.bytes == 15_009_316_864 + batch * context * 131_072
    assert 1e3 * work.seconds(H200) == pytest.approx(milliseconds, abs=0.006)
    assert work.seconds(H200) == work.bytes / 4.8e12


def test_weights_in_eight_bits_halve_the_floor_of_one_sequence():
    work = floors.decode_step(LLAMA_8B, 1, 0, weight_item=1)
    assert 1e3 * work.seconds(H200) == pytest.approx(1.56, abs=0.01)


def test_a_prompt_is_bound_by_arithmetic_and_its_last_token_alone_meets_the_head():
    tokens = 1024
    matrices = 2 * (tokens * 32 * 218_103_808 + 525_336_576)
    # Each of 32 heads in 32 layers: 2 x 128 for a score and as much for its value, per pair.
    attention = 32 * 32 * 4 * 128 * (tokens * (tokens + 1) // 2)
    work = floors.prefill(LLAMA_8B, tokens)
    assert work.flops == matrices + attention
    assert work.seconds(H200) == work.flops / 989e12


def test_attention_of_a_layer_is_its_share_of_the_step():
    work = floors.decode_attention(LLAMA_8B, 128, 4096)
    assert 32 * work.bytes == 128 * 4096 * 131_072
    assert work.flops == 128 * 4096 * 32 * 4 * 128


def test_a_linear_layer_reads_its_weights_in_the_bits_they_have():
    work = floors.linear(rows=16, outputs=28672, inputs=4096, weight_bits=4)
    assert work == Work(28672 * 4096 // 2 + 2 * 16 * (4096 + 28672), 2 * 16 * 28672 * 4096)


def test_grouped_heads_count_as_many_as_they_are():
    shape = ModelShape(
        layers=1, hidden=8, heads=4, kv_heads=1, head_dim=2, intermediate=3, vocabulary=5
    )
    assert shape.qkv_rows == 12
    assert shape.layer_weights == 8 * 12 + 8 * 8 + 3 * 8 * 3
    assert floors.kv_bytes_per_token(shape, item=4) == 4 * 2 * 2


def test_inputs_that_a_cache_could_hold_are_made_several_times():
    cache = 50 << 20
    assert input_sets(bytes_per_call=1 << 30, cache_bytes=cache) == 1
    assert input_sets(bytes_per_call=10 << 20, cache_bytes=cache) == 20
    assert input_sets(bytes_per_call=1, cache_bytes=cache) == 64
    assert input_sets(bytes_per_call=1, cache_bytes=0) == 1


def test_a_timing_is_of_one_call_and_says_how_far_it_spreads():
    found = timing([4.0, 2.0, 30.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0], calls=2)
    assert (found.low_s, found.median_s, found.high_s) == (2.0, 5.5, 9.0)
    assert found.repeats == 10
