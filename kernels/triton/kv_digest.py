"""The sums of kernels/kv_digest.py, of KV where it lies: units scattered over the pool's blocks.

A GPU computes what takes time, `same` and `next` of each chunk of 64 lines: 16 bytes for 4 KiB.
The polynomials over them are left to the host, which gets them with one copy for a whole offer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.kv_digest import CHUNK_LINES, LINE_BYTES

_WORDS = LINE_BYTES // 4


def unit_sums(
    words: Tensor,
    offsets: Tensor,
    units: Tensor,
    labels: Tensor,
    key: Tensor,
    chunks: int,
    *,
    grain: int,
) -> Tensor:
    """Return [units, chunks, 2] int64, `same` and `next` of each chunk, 0 where a unit has fewer.

    `words` is the memory (int32). A unit's bytes are its pieces, one after the other, and then its
    label on a line of its own; `chunks` is what the longest unit has. The rest is as the fields of
    kv_digest_device.UnitTable.
    """
    assert grain in (1, _WORDS)
    sums = torch.empty(len(units), chunks, 2, dtype=torch.int64, device=words.device)
    _sums[(len(units), chunks)](
        words,
        offsets,
        units,
        labels,
        key,
        sums,
        LINES=CHUNK_LINES,
        WORDS=_WORDS,
        GRAIN=grain,
        num_warps=4,
    )
    return sums


@triton.jit
def _sums(
    words,
    offsets,
    units,
    labels,
    key,
    sums,
    LINES: tl.constexpr,
    WORDS: tl.constexpr,
    GRAIN: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    offsets += tl.load(units + unit * 3)
    piece = tl.load(units + unit * 3 + 1)
    total = tl.load(units + unit * 3 + 2)
    lines = (total + WORDS - 1) // WORDS + 1
    labels += unit * WORDS
    i = tl.arange(0, LINES)
    line = chunk * LINES + i
    count = tl.minimum(lines - chunk * LINES, LINES)
    # Low words of each line, high words, and low words of the line before.
    a = _keyed(words, offsets, labels, key, line, i + 1, lines, piece, total, GRAIN, 0)
    b = _keyed(words, offsets, labels, key, line, i + 1, lines, piece, total, GRAIN, 1)
    before = _keyed(words, offsets, labels, key, line - 1, i, lines, piece, total, GRAIN, 0)
    lane = 2 * tl.arange(0, WORDS // 2)[None, :]
    first = tl.load(key + lane).to(tl.uint32, bitcast=True).to(tl.uint64)
    before = tl.where((i == 0)[:, None], first, before)
    last = tl.maximum(count, 0) + 1
    after = tl.load(key + last * WORDS + lane + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
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
    words,
    offsets,
    labels,
    key,
    line,
    key_line,
    lines,
    piece,
    total,
    GRAIN: tl.constexpr,
    HIGH: tl.constexpr,
):
    """Return the low or high words of lines [n, 8] plus those of the key's lines, modulo 2³²."""
    lane = 2 * tl.arange(0, 8)[None, :] + HIGH
    word = line[:, None] * 16 + lane
    there = (line >= 0)[:, None] & (word < total)
    if GRAIN == 16:  # no line has words of two pieces
        first = tl.where((line >= 0) & (line < lines - 1), line * 16, 0)
        at = tl.load(offsets + first // piece, mask=line < lines - 1, other=0) + first % piece
        place = at[:, None] + lane
    else:
        safe = tl.where(there, word, 0)
        place = tl.load(offsets + safe // piece, mask=there, other=0) + safe % piece
    data = tl.load(words + place, mask=there, other=0)
    own = tl.load(labels + lane + tl.zeros_like(line)[:, None])
    data = tl.where((line == lines - 1)[:, None], own, data)
    by = tl.load(key + key_line[:, None] * 16 + lane)
    keyed = data.to(tl.uint32, bitcast=True) + by.to(tl.uint32, bitcast=True)
    return keyed.to(tl.uint64)
