"""The sums of kernels/kv_digest.py, of KV where it lies: units scattered over the pool's blocks.

A GPU computes what takes time, `same` and `next` of each chunk of 64 lines: 16 bytes for 4 KiB.
The polynomials over them are left to the host, which gets them with one copy for a whole offer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.kv_digest import CHUNK_LINES, KEY_LINES, LINE_BYTES
from baton.kernels.triton.numbers import ceil_div

_WORDS = LINE_BYTES // 4


def chunk_sums(part: Tensor, blocks: Tensor, labels: Tensor, key: Tensor) -> Tensor:
    """Return [units, chunks, 2] int64, `same` and `next` of each chunk, for units part[blocks].

    `part` is a view of the pool, [num_blocks, layers, parts, heads, block_size, head_dim], cut to
    the layers and heads that a unit has; its runs of heads are in whole lines of 64 bytes, and
    begin at whole words. `blocks` [units] is int32; `labels` [units, 16] and `key` [66 * 16], the
    lines of `expand_key`, are int32 and contiguous.
    """
    _, layers, parts, heads, block_size, head_dim = part.shape
    assert part.stride()[3:] == (block_size * head_dim, head_dim, 1), "only whole heads"
    run_bytes = heads * block_size * head_dim * part.element_size()
    assert run_bytes % LINE_BYTES == 0, f"runs of {run_bytes} bytes are not in whole lines"
    assert labels.is_contiguous()
    assert key.numel() == KEY_LINES * _WORDS
    words = part.view(torch.int32)
    lines = layers * parts * run_bytes // LINE_BYTES + 1
    chunks = ceil_div(lines, CHUNK_LINES)
    sums = torch.empty(len(blocks), chunks, 2, dtype=torch.int64, device=part.device)
    _sums[(len(blocks), chunks)](
        words,
        blocks,
        labels,
        key,
        sums,
        lines,
        run_bytes // LINE_BYTES,
        parts,
        words.stride(0),
        words.stride(1),
        words.stride(2),
        LINES=CHUNK_LINES,
        WORDS=_WORDS,
        num_warps=4,
    )
    return sums


@triton.jit
def _sums(
    words,
    blocks,
    labels,
    key,
    sums,
    lines,
    run,
    parts,
    s_block,
    s_layer,
    s_part,
    LINES: tl.constexpr,
    WORDS: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    pool = words + tl.load(blocks + unit).to(tl.int64) * s_block
    labels += unit * WORDS
    i = tl.arange(0, LINES)
    line = chunk * LINES + i
    count = tl.minimum(lines - chunk * LINES, LINES)
    # Low words of each line, high words, and low words of the line before.
    a = _keyed(pool, labels, key, line, i + 1, lines, run, parts, s_layer, s_part, 0)
    b = _keyed(pool, labels, key, line, i + 1, lines, run, parts, s_layer, s_part, 1)
    before = _keyed(pool, labels, key, line - 1, i, lines, run, parts, s_layer, s_part, 0)
    lane = 2 * tl.arange(0, WORDS // 2)[None, :]
    first = tl.load(key + lane).to(tl.uint32, bitcast=True).to(tl.uint64)
    before = tl.where((i == 0)[:, None], first, before)
    after = tl.load(key + (count + 1) * WORDS + lane + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    inside = (i < count)[:, None]
    nothing = tl.zeros([LINES, WORDS // 2], tl.uint64)
    same = tl.where(inside, a * b, nothing)
    beside = tl.where(inside, before * b, nothing)
    beside += tl.where((i == count - 1)[:, None], a * after, nothing)
    place = sums + (unit * tl.num_programs(1) + chunk) * 2
    tl.store(place, tl.sum(tl.sum(same, 1), 0).to(tl.int64, bitcast=True))
    tl.store(place + 1, tl.sum(tl.sum(beside, 1), 0).to(tl.int64, bitcast=True))


@triton.jit
def _keyed(
    pool, labels, key, line, key_line, lines, run, parts, s_layer, s_part, HIGH: tl.constexpr
):
    """Return the low or high words of lines [n, 8] plus those of the key's lines, modulo 2³²."""
    lane = 2 * tl.arange(0, 8)[None, :] + HIGH
    in_pool = (line >= 0) & (line < lines - 1)
    side = tl.where(in_pool, line, 0) // run
    place = side // parts * s_layer + side % parts * s_part + tl.where(in_pool, line, 0) % run * 16
    word = tl.load(pool + place[:, None] + lane, mask=in_pool[:, None], other=0)
    own = tl.load(labels + lane + tl.zeros_like(line)[:, None])
    word = tl.where((line == lines - 1)[:, None], own, word)
    by = tl.load(key + key_line[:, None] * 16 + lane)
    keyed = word.to(tl.uint32, bitcast=True) + by.to(tl.uint32, bitcast=True)
    return keyed.to(tl.uint64)
