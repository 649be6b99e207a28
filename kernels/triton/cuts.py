"""Where top-k and top-p cut a row of scores, without sorting it.

Both cuts keep the scores that are no less than the least x for which

    weight of all scores over x  <  bound

With weights of 1 and the bound k that is top-k; with probabilities and the bound p it is top-p.
Either keeps all that tie with the least likely one kept, as executor/truncation.py does. x is found
digit by digit: floats, seen as integers, keep their order, and each pass over the row settles
four of their bits.
"""

import triton
import triton.language as tl


@triton.jit
def ordered_bits(x):
    """Return uint32 numbers that are in the order of float32 x."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def bits_to_float(bits):
    """Return the float32 whose ordered_bits these are."""
    raw = tl.where((bits >> 31) != 0, bits ^ 0x80000000, bits ^ 0xFFFFFFFF)
    return raw.to(tl.float32, bitcast=True)


@triton.jit
def least_kept(
    scores, vocabulary, highest, floor, bound, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """Return ordered_bits of the least x over which the weight is under `bound`.

    Scores under `floor` (in ordered_bits) weigh nothing; others weigh 1 or, by mass, their share
    of the likeliest one's probability.
    """
    prefix = tl.zeros([], tl.uint32)
    shift = tl.full([], 32, tl.uint32)
    for _ in range(8):
        shift -= 4
        last = prefix + (((tl.arange(0, 16) + 1).to(tl.uint32) << shift) - 1)
        over = tl.zeros([16], tl.float32)
        for start in range(0, vocabulary, BLOCK):
            token = start + tl.arange(0, BLOCK)
            score = tl.load(scores + token, mask=token < vocabulary, other=-float("inf"))
            bits = ordered_bits(score)
            weight = tl.full([BLOCK], 1.0, tl.float32)
            if BY_MASS:
                weight = tl.exp(score - highest)
            weight = tl.where((bits >= floor) & (token < vocabulary), weight, 0.0)
            over += tl.sum(tl.where(bits[:, None] > last[None, :], weight[:, None], 0.0), 0)
        found = tl.sum((over >= bound).to(tl.uint32), 0)
        prefix += found << shift
    return prefix


@triton.jit
def mass_over(scores, vocabulary, highest, floor, BLOCK: tl.constexpr):
    """Return the sum of shares of scores that are no less than `floor` (in ordered_bits)."""
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        score = tl.load(scores + token, mask=token < vocabulary, other=-float("inf"))
        share = tl.where(ordered_bits(score) >= floor, tl.exp(score - highest), 0.0)
        total += tl.sum(share, 0)
    return total
