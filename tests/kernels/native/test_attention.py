"""Native attention against attention written out, and bit for bit against itself."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

SPAN = 1024
"""Keys that are gathered together."""


@dataclass(frozen=True)
class How:
    """What attention is like, whatever the batch."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    value_dim: int = 0
    """0: head_dim."""
    parts: int = 2
    block_size: int = 16
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    layers: int = 2
    dtype: torch.dtype = torch.float32

    @property
    def values(self) -> int:
        return self.value_dim or self.head_dim


@dataclass(frozen=True)
class Row:
    """The last tokens of a sequence are new."""

    q: Tensor
    """[rows, heads, head_dim]"""
    k: Tensor
    """[length, kv_heads, head_dim]"""
    v: Tensor

    @property
    def rows(self) -> int:
        return self.q.shape[0]

    @property
    def length(self) -> int:
        return self.k.shape[0]


def make_row(how: How, rows: int, length: int, seed: int = 0) -> Row:
    """Return a sequence of noise."""
    noise = torch.Generator().manual_seed(1000 * length + seed)
    k = torch.randn(length, how.kv_heads, how.head_dim, generator=noise)
    v = torch.randn(length, how.kv_heads, how.head_dim, generator=noise)
    q = torch.randn(rows, how.heads, how.head_dim, generator=noise) * 2
    return Row(q, k, k if how.parts == 1 else v)


def run(
    operations: Any, how: How, batch: list[Row], *, threads: int, seed: int = 0
) -> list[Tensor]:
    """Return outputs [rows, heads, value_dim]; what nobody may read of the pool is NaN."""
    blocks = sum(-(-row.length // how.block_size) for row in batch) + 3
    free = random.Random(seed).sample(range(blocks), blocks)
    shape = (blocks, how.layers, how.parts, how.kv_heads, how.block_size, how.head_dim)
    pool, layer, tables = torch.full(shape, float("nan"), dtype=how.dtype), how.layers - 1, []
    for row in batch:
        table = torch.tensor([free.pop() for _ in range(-(-row.length // how.block_size))])
        first = max(0, row.length - row.rows + 1 - how.window) if how.window else 0
        position = torch.arange(first, row.length)
        block, offset = table[position // how.block_size], position % how.block_size
        pool[block, layer, 0, :, offset] = row.k[first:].to(how.dtype)
        pool[block, layer, -1, :, offset] = row.v[first:].to(how.dtype)
        tables.append(table.int())
    q = torch.cat([row.q for row in batch])
    q = torch.cat([q, torch.zeros(q.shape[0], 1, how.head_dim)], dim=1)  # room after the heads
    out = torch.full((q.shape[0], how.heads, how.values), float("nan"))
    operations.attend(
        threads,
        sequences=operations.sequences([(row.rows, row.length) for row in batch], tables),
        count=len(batch),
        heads=how.heads,
        value_dim=how.values,
        window=how.window,
        scale=how.head_dim**-0.5,
        softcap=how.softcap,
        sinks=sinks_of(how) if how.sinks else None,
        q=q,
        q_stride=q.stride(0),
        pool=pool[0, layer],
        shape=operations.shape(pool),
        pairs=how.dtype == torch.bfloat16,
        out=out,
        out_stride=out.stride(0),
    )
    return list(out.split([row.rows for row in batch]))


def sinks_of(how: How) -> Tensor:
    return torch.linspace(-1, 3, how.heads)


def written_out(how: How, row: Row) -> Tensor:
    """Return attention in float64, with all scores in memory, of inputs rounded as `how` says."""
    group = how.heads // how.kv_heads
    q = (row.q * how.head_dim**-0.5).to(how.dtype).double().transpose(0, 1)
    k, v = (
        kv.to(how.dtype).double().repeat_interleave(group, dim=1).transpose(0, 1)
        for kv in (row.k, row.v)
    )
    scores = q @ k.transpose(1, 2)
    if how.softcap:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    position = torch.arange(row.length - row.rows, row.length)[:, None]
    key = torch.arange(row.length)
    hidden = key > position
    if how.window:
        hidden |= key <= position - how.window
    scores = scores.masked_fill(hidden, float("-inf"))
    if how.sinks:
        column = sinks_of(how).double().view(-1, 1, 1)
        scores = torch.cat([scores, column.expand(-1, row.rows, 1)], dim=-1)
    shares = scores.softmax(-1)[..., : row.length]
    return (shares @ v[..., : how.values]).transpose(0, 1).float()


def check(operations: Any, how: How, sizes: Iterable[tuple[int, int]], threads: int = 1) -> None:
    batch = [make_row(how, *size, seed=seed) for seed, size in enumerate(sizes)]
    for row, found in zip(batch, run(operations, how, batch, threads=threads), strict=True):
        expected = written_out(how, row)
        if how.dtype == torch.float32:
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=5e-6)
            continue
        # What is left are the shares: each is off by up to 1 in 512 of itself, either way.
        torch.testing.assert_close(found, expected, rtol=0, atol=6e-3)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """What the pool holds and products are computed in."""
    found: torch.dtype = request.param
    return found


RAGGED = [(1, 1), (1, 64), (1, 65), (5, 5), (70, 130), (1, 200), (3, 127), (129, 129), (2, 63)]


@pytest.mark.parametrize("head_dim", [1, 6, 8, 16, 20, 32, 64, 80, 96, 128, 256])
def test_head_sizes(operations: Any, dtype: torch.dtype, head_dim: int) -> None:
    check(operations, How(dtype=dtype, head_dim=head_dim), RAGGED)


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (3, 3), (4, 1), (7, 1), (10, 2), (16, 1), (24, 3), (130, 1)]
)
def test_groups_of_heads(operations: Any, dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    check(operations, How(dtype=dtype, heads=heads, kv_heads=kv_heads), RAGGED, threads=2)


@pytest.mark.parametrize("block_size", [1, 8, 16, 32, 48])
def test_block_sizes(operations: Any, dtype: torch.dtype, block_size: int) -> None:
    check(operations, How(dtype=dtype, block_size=block_size), RAGGED)


@pytest.mark.parametrize("window", [1, 5, 63, 64, 65, 100, 5000])
def test_windows(operations: Any, dtype: torch.dtype, window: int) -> None:
    check(
        operations,
        How(dtype=dtype, window=window, sinks=window % 2 == 0, block_size=8),
        RAGGED,
        threads=2,
    )


def test_softcap_and_sinks(operations: Any, dtype: torch.dtype) -> None:
    check(operations, How(dtype=dtype, softcap=2.0), RAGGED)
    check(operations, How(dtype=dtype, softcap=0.7, sinks=True, window=20), RAGGED)


def test_one_latent_for_all_heads(operations: Any, dtype: torch.dtype) -> None:
    how = How(dtype=dtype, heads=128, kv_heads=1, parts=1, head_dim=72, value_dim=56, block_size=32)
    check(operations, how, [(1, 70), (1, 1500), (3, 9)], threads=2)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_several_spans(operations: Any, dtype: torch.dtype, threads: int) -> None:
    sizes = [(1, SPAN), (1, 2 * SPAN + 1), (9, SPAN + 4), (1, 3 * SPAN)]
    check(operations, How(dtype=dtype), sizes, threads)
    check(operations, How(dtype=dtype, window=SPAN + 70, sinks=True), sizes, threads)


HOWS = [
    How(head_dim=32),
    How(head_dim=20, heads=6, kv_heads=1, window=150, sinks=True, block_size=8),
    How(head_dim=64, heads=3, kv_heads=3, softcap=5.0),
    How(heads=20, kv_heads=1, parts=1, head_dim=40, value_dim=32),
]


@pytest.mark.parametrize("how", HOWS)
def test_bits_do_not_depend_on_the_batch_or_the_threads(
    operations: Any, dtype: torch.dtype, how: How
) -> None:
    how = replace(how, dtype=dtype)
    sizes = [(1, 2 * SPAN + 77), (40, 300), (1, 90), (150, 150), (1, 1)]
    batch = [make_row(how, *size, seed=seed) for seed, size in enumerate(sizes)]
    together = run(operations, how, batch, threads=1)
    for threads in (2, 3):
        for one, other in zip(together, run(operations, how, batch, threads=threads), strict=True):
            assert torch.equal(one, other)
    for row, found in zip(batch, together, strict=True):
        for threads in (1, 2, 5):
            (alone,) = run(operations, how, [row], threads=threads, seed=threads)
            assert torch.equal(alone, found)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("cut", [1, 64, 129, 200])
def test_bits_do_not_depend_on_how_a_prompt_is_cut(
    operations: Any, dtype: torch.dtype, how: How, cut: int
) -> None:
    """A cut into single rows is what decoding the same tokens would compute."""
    how = replace(how, dtype=dtype)
    length = 20 if cut == 1 else 331
    past = SPAN - 10
    whole = make_row(how, length, past + length)
    (expected,) = run(operations, how, [whole], threads=1)
    for start in range(0, length, cut):
        end = min(start + cut, length)
        part = Row(whole.q[start:end], whole.k[: past + end], whole.v[: past + end])
        (found,) = run(operations, how, [part], threads=2, seed=start)
        assert torch.equal(found, expected[start:end])
