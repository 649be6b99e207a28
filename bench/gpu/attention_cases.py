"""The attention kernels and the handover's copies, at the shapes of a model in production."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from baton.kernels.attention_scores import Scoring
from baton.kernels.triton.block_copy import gather_blocks, scatter_blocks
from baton.kernels.triton.decode_attention import decode_attention, decode_programs
from baton.kernels.triton.decode_plan import plan_decode
from baton.kernels.triton.mla_decode import mla_decode, mla_programs
from baton.kernels.triton.prefill_attention import prefill_attention
from baton.kernels.triton.rope_kv_write import rope_kv_write_
from bench.gpu import floors
from bench.gpu.clock import Call
from bench.gpu.floors import ModelShape, Work
from bench.gpu.kernel_case import KernelCase, Maker
from bench.gpu.scale import Latent, Scale

BLOCK_SIZE = 16


def attention_cases(scale: Scale, maker: Maker) -> Iterator[KernelCase]:
    """Yield decode, prefill, MLA, rope and the kernels of the handover."""
    shape, item = scale.shape, scale.item
    stored = [maker.dtype] if scale.device == "cpu" else [maker.dtype, torch.float8_e4m3fn]
    for batch, context in scale.decode:
        for dtype in stored:
            case = f"decode_attention {_name(dtype)} batch {batch} at {context}"
            work = floors.decode_attention(shape, batch, context, dtype.itemsize)
            yield KernelCase(case, work, partial(_decode, maker, shape, batch, context, dtype))
    for tokens in scale.prefill:
        work = floors.prefill_attention(shape, tokens, item)
        yield KernelCase(
            f"prefill_attention {tokens} tokens", work, partial(_prefill, maker, shape, tokens)
        )
    latent, (batch, context) = scale.latent, scale.decode[-1]
    width = latent.rank + latent.turned
    work = Work(
        batch * context * width * item, 2 * batch * context * latent.heads * (width + latent.rank)
    )
    yield KernelCase(
        f"mla_decode batch {batch} at {context}",
        work,
        partial(_latent, maker, latent, batch, context),
    )
    rows = shape.heads + 2 * shape.kv_heads
    for tokens in (scale.decode[-1][0], scale.chunk_tokens):
        # q is read and written, k and v are read and go to the pool.
        moved = tokens * (2 * rows * shape.head_dim * item + 4 * shape.head_dim)
        yield KernelCase(
            f"rope_kv_write {tokens} tokens",
            Work(moved, 0),
            partial(_rope, maker, shape, tokens),
            weights=False,
        )
    yield from _handover_cases(scale, maker)


def _decode(maker: Maker, shape: ModelShape, batch: int, context: int, stored: torch.dtype) -> Call:
    tables = maker.tables(batch, context, BLOCK_SIZE)
    kv = maker.pool(tables.numel(), shape.kv_heads, BLOCK_SIZE, shape.head_dim, dtype=stored)
    q = maker.normal(batch, shape.heads, shape.head_dim)
    lengths = maker.full(context, batch, dtype=torch.int32)
    plan = plan_decode(lengths, decode_programs(shape.heads, shape.kv_heads))
    scales = maker.full(0.5, len(kv), 2, shape.kv_heads) if stored != maker.dtype else None
    scoring = Scoring(shape.head_dim**-0.5)
    return lambda: decode_attention(q, kv, tables, plan, scoring, scales)


def _prefill(maker: Maker, shape: ModelShape, tokens: int) -> Call:
    tables = maker.tables(1, tokens, BLOCK_SIZE)
    kv = maker.pool(tables.numel(), shape.kv_heads, BLOCK_SIZE, shape.head_dim)
    q = maker.normal(tokens, shape.heads, shape.head_dim)
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=maker.device)
    lengths = maker.full(tokens, 1, dtype=torch.int32)
    scoring = Scoring(shape.head_dim**-0.5)
    return lambda: prefill_attention(q, kv, tables, starts, lengths, scoring)


def _latent(maker: Maker, latent: Latent, batch: int, context: int) -> Call:
    width = latent.rank + latent.turned
    tables = maker.tables(batch, context, BLOCK_SIZE)
    kv = maker.pool(tables.numel(), 1, BLOCK_SIZE, width, parts=1)
    q = maker.normal(batch, latent.heads, width)
    lengths = maker.full(context, batch, dtype=torch.int32)
    plan = plan_decode(lengths, mla_programs(latent.heads, maker.dtype))
    return lambda: mla_decode(q, kv, tables, plan, Scoring(width**-0.5), rank=latent.rank)


def _rope(maker: Maker, shape: ModelShape, tokens: int) -> Call:
    blocks = -(-tokens // BLOCK_SIZE)
    kv = maker.pool(blocks, shape.kv_heads, BLOCK_SIZE, shape.head_dim)
    qkv = maker.normal(tokens, shape.heads + 2 * shape.kv_heads, shape.head_dim)
    slots = torch.randperm(blocks * BLOCK_SIZE, device=maker.device)[:tokens]
    angles = maker.normal(2, tokens, shape.head_dim // 2, dtype=torch.float32)
    cos, sin = angles.cos().unbind()
    return lambda: rope_kv_write_(qkv, kv, slots, cos, sin)


def _handover_cases(scale: Scale, maker: Maker) -> Iterator[KernelCase]:
    """Half of the heads of all layers of many blocks: what a decode rank of another size reads."""
    shape = scale.shape
    blocks = max(1, scale.handed_over[1] // BLOCK_SIZE)
    pieces = blocks * shape.layers * 2
    moved = pieces * shape.kv_heads // 2 * BLOCK_SIZE * shape.head_dim * scale.item
    for copy in (gather_blocks, scatter_blocks):
        yield KernelCase(
            f"block_copy {copy.__name__} {blocks} blocks",
            Work(2 * moved, 0),
            partial(_block_copy, maker, shape, blocks, copy),
        )
    yield KernelCase(
        f"kv_digest {blocks} blocks", Work(moved, 0), partial(_digest, maker, shape, blocks)
    )


def _half_pool(maker: Maker, shape: ModelShape, blocks: int) -> Tensor:
    """Return half of the heads of a pool, as a view."""
    sizes = (blocks, shape.layers, 2, shape.kv_heads, BLOCK_SIZE, shape.head_dim)
    return maker.normal(*sizes)[:, :, :, : shape.kv_heads // 2]


def _block_copy(
    maker: Maker, shape: ModelShape, blocks: int, copy: Callable[[Tensor, Tensor, Tensor], None]
) -> Call:
    part = _half_pool(maker, shape, blocks)
    order = torch.randperm(blocks, device=maker.device, dtype=torch.int32)
    staged = maker.normal(*part.shape)
    return lambda: copy(part, order, staged)


def _digest(maker: Maker, shape: ModelShape, blocks: int) -> Call:
    """A unit is half of the heads of all layers of a block: a piece a layer and part."""
    from baton.kernels.triton.kv_digest import unit_sums  # which wants a log

    part = _half_pool(maker, shape, blocks)
    pieces, words = shape.layers * 2, part[0, 0, 0].nbytes // 4
    whole = shape.kv_heads * BLOCK_SIZE * shape.head_dim * part.element_size() // 4
    offsets = torch.arange(blocks * pieces, device=maker.device) * whole
    firsts = torch.arange(blocks, device=maker.device) * pieces
    sizes = torch.tensor([words, words * pieces], device=maker.device).expand(blocks, 2)
    units = torch.cat([firsts[:, None], sizes], 1).to(torch.int32)
    labels, key = maker.whole(1 << 30, blocks, 16), maker.whole(1 << 30, 66 * 16)
    chunks = -(-(words * pieces // 16 + 1) // 64)
    memory = part.as_strided((blocks * pieces * whole * 4 // part.element_size(),), (1,))
    memory = memory.view(torch.int32)
    return lambda: unit_sums(memory, offsets, units, labels, key, chunks, grain=16)


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8"}.get(dtype, str(dtype)[6:])
