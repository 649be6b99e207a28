"""Chooses the next tokens from logits without the host: penalties, temperature, cuts and a race.

Four small kernels, and scores in float32 between them:

    scores   penalties and temperature; the highest score of each part of a row
    cuts     where top-k and top-p cut; rows without either end at once
    race     exponential noise against what is left; the winner of each part of a row
    choose   the winner of the row, counted in its history

What it computes is what executor/sampler.py, truncation.py and logit_changes.py compute. What it
does not is typical-p, which sorts, and log-probabilities, for which torch's operations do.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.cuts import bits_to_float, least_kept, mass_over, ordered_bits
from baton.kernels.triton.noise import exponential, row_key
from baton.kernels.triton.numbers import ceil_div, power_of_2

_PART = 4096
_CUT_BLOCK = 1024
_GREEDY_BELOW = 1e-5


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """The parameters of a batch's rows, on the device: each is [rows]."""

    temperature: Tensor
    """float32; a row under 1e-5 is greedy"""
    top_k: Tensor
    """int32; 0 for none"""
    top_p: Tensor
    """float32; 1 for none"""
    min_p: Tensor
    """float32; 0 for none"""
    seeds: Tensor
    """int64"""
    positions: Tensor
    """int64: where the new tokens stand in their sequences"""


@dataclass(frozen=True, slots=True)
class Penalties:
    """What rows have said so far, and what that costs them."""

    seen: Tensor
    """[sequences, vocabulary] int32: 0, or 1 + how often the token is in the output"""
    sequences: Tensor
    """[rows] int32: the row of `seen`; -1 for rows without penalties"""
    repetition: Tensor
    """[rows] float32, like the next two; 1, 0 and 0 for none"""
    frequency: Tensor
    presence: Tensor


@dataclass(frozen=True, slots=True)
class LogitChanges:
    """What is added to single logits, and when: biases, and -inf to forbid.

    They are written once, when a sequence joins: which of them count in a step, the device finds.
    """

    rows: Tensor
    """[changes] int32; -1 for padding"""
    tokens: Tensor
    """[changes] int32"""
    amounts: Tensor
    """[changes] float32"""
    until: Tensor
    """[changes] int64: counts only for tokens at positions before that. The stop tokens of a
    sequence with `min_tokens` have the end of its prompt and that many."""
    after: Tensor | None = None
    """[changes, n] int32: counts only where these tokens have just been said, of which -1 is any.
    The last token of a bad word has the others, at the end of its row."""


def change_logits_(
    logits: Tensor, changes: LogitChanges, positions: Tensor, recent: Tensor | None = None
) -> None:
    """Change float32 logits [rows, vocabulary] of tokens at `positions` [rows] int64.

    `recent` [rows, n] int32 are the n tokens before each, wanted by changes that come after some.
    """
    assert logits.dtype == torch.float32
    after = changes.after
    assert (after is None) == (recent is None)
    assert after is None or recent is None or after.shape[1] == recent.shape[1]
    _change[(changes.rows.shape[0],)](
        logits, changes.rows, changes.tokens, changes.amounts, changes.until, after, positions,
        recent, logits.stride(0), AFTER=0 if after is None else after.shape[1], num_warps=1,
    )  # fmt: skip


def sample(logits: Tensor, params: SamplingTensors, penalties: Penalties | None = None) -> Tensor:
    """Return a token [rows] int64 for each row of logits [rows, vocabulary] of any float dtype.

    With penalties, the tokens are counted in `seen`. Nothing is read on the host.
    """
    rows, vocabulary = logits.shape
    assert logits.stride(1) == 1
    parts = ceil_div(vocabulary, _PART)
    device, kind = logits.device, torch.float32
    scores = torch.empty(rows, vocabulary, dtype=kind, device=device)
    maxima = torch.empty(rows, parts, dtype=kind, device=device)
    limits = torch.empty(rows, 2, dtype=kind, device=device)
    best = torch.empty(rows, parts, dtype=kind, device=device)
    winners = torch.empty(rows, parts, dtype=torch.int32, device=device)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    said: tuple[Tensor | None, ...] = (None,) * 5
    if penalties is not None:
        p = penalties
        said = (p.seen, p.sequences, p.repetition, p.frequency, p.presence)
    _scores[(rows, parts)](
        logits, scores, maxima, params.temperature, *said, vocabulary, logits.stride(0),
        GREEDY_BELOW=_GREEDY_BELOW, PART=_PART, num_warps=8,
    )  # fmt: skip
    _cuts[(rows,)](
        scores, maxima, limits, params.temperature, params.top_k, params.top_p, vocabulary, parts,
        GREEDY_BELOW=_GREEDY_BELOW, PARTS=power_of_2(parts), BLOCK=_CUT_BLOCK, num_warps=8,
    )  # fmt: skip
    _race[(rows, parts)](
        scores, limits, best, winners, params.temperature, params.min_p, params.seeds,
        params.positions, vocabulary, GREEDY_BELOW=_GREEDY_BELOW, PART=_PART, num_warps=8,
    )  # fmt: skip
    _choose[(rows,)](
        best, winners, tokens, said[0], said[1], vocabulary, parts, PARTS=power_of_2(parts),
        num_warps=1,
    )  # fmt: skip
    return tokens


@triton.jit
def _change(
    logits, rows, tokens, amounts, until, after, positions, recent, s_row, AFTER: tl.constexpr
):
    i = tl.program_id(0)
    row = tl.load(rows + i)
    if row < 0:
        return
    if tl.load(positions + row) >= tl.load(until + i):
        return
    matches = 1
    for j in range(AFTER):
        wanted = tl.load(after + i * AFTER + j)
        said = tl.load(recent + row * AFTER + j)
        matches = tl.where((wanted < 0) | (wanted == said), matches, 0)
    if matches > 0:
        at = logits + row.to(tl.int64) * s_row + tl.load(tokens + i)
        tl.atomic_add(at, tl.load(amounts + i))


@triton.jit
def _scores(
    logits,
    scores,
    maxima,
    temperature,
    seen,
    sequences,
    repetition,
    frequency,
    presence,
    vocabulary,
    s_row,
    GREEDY_BELOW: tl.constexpr,
    PART: tl.constexpr,
):
    row = tl.program_id(0)
    part = tl.program_id(1)
    token = part * PART + tl.arange(0, PART)
    there = token < vocabulary
    at = logits + row.to(tl.int64) * s_row + token
    score = tl.load(at, mask=there, other=-float("inf")).to(tl.float32)
    if seen is not None:
        sequence = tl.load(sequences + row).to(tl.int64)
        if sequence >= 0:
            count = tl.load(seen + sequence * vocabulary + token, mask=there, other=0)
            factor = tl.load(repetition + row)
            changed = tl.where(score > 0, score / factor, score * factor)
            changed -= tl.load(frequency + row) * tl.maximum(count - 1, 0).to(tl.float32)
            changed -= tl.load(presence + row) * (count > 1).to(tl.float32)
            score = tl.where(count > 0, changed, score)
    heat = tl.load(temperature + row)
    score = tl.where(heat >= GREEDY_BELOW, score / heat, score)
    tl.store(scores + row.to(tl.int64) * vocabulary + token, score, mask=there)
    tl.store(maxima + row * tl.num_programs(1) + part, tl.max(score, 0))


@triton.jit
def _cuts(
    scores,
    maxima,
    limits,
    temperature,
    top_k,
    top_p,
    vocabulary,
    parts,
    GREEDY_BELOW: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the highest score of a row, and the least that is kept."""
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    highest = tl.max(
        tl.load(maxima + row * parts + part, mask=part < parts, other=-float("inf")), 0
    )
    scores += row.to(tl.int64) * vocabulary
    drawn = tl.load(temperature + row) >= GREEDY_BELOW
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    floor = ordered_bits(tl.full([], -float("inf"), tl.float32))
    if drawn & (k > 0) & (k < vocabulary):
        floor = least_kept(scores, vocabulary, highest, floor, k.to(tl.float32), False, BLOCK)
    if drawn & (p < 1):
        bound = p * mass_over(scores, vocabulary, highest, floor, BLOCK)
        # At least the likeliest is kept, whatever p rounds to.
        found = least_kept(scores, vocabulary, highest, floor, bound, True, BLOCK)
        floor = tl.minimum(found, ordered_bits(highest))
    tl.store(limits + 2 * row, highest)
    tl.store(limits + 2 * row + 1, bits_to_float(floor))


@triton.jit
def _race(
    scores,
    limits,
    best,
    winners,
    temperature,
    min_p,
    seeds,
    positions,
    vocabulary,
    GREEDY_BELOW: tl.constexpr,
    PART: tl.constexpr,
):
    row = tl.program_id(0)
    part = tl.program_id(1)
    token = part * PART + tl.arange(0, PART)
    there = token < vocabulary
    at = scores + row.to(tl.int64) * vocabulary + token
    result = tl.load(at, mask=there, other=-float("inf"))
    if tl.load(temperature + row) >= GREEDY_BELOW:
        share = tl.exp(result - tl.load(limits + 2 * row))
        kept = (result >= tl.load(limits + 2 * row + 1)) & (share >= tl.load(min_p + row))
        noise = exponential(row_key(tl.load(seeds + row), tl.load(positions + row)), token)
        result = tl.where(kept & there, share / noise, -float("inf"))
    value, winner = tl.max(result, 0, return_indices=True)
    place = row * tl.num_programs(1) + part
    tl.store(best + place, value)
    # Of scores that are not numbers any may win, even one beyond the row.
    tl.store(winners + place, tl.minimum(part * PART + winner, vocabulary - 1))


@triton.jit
def _choose(best, winners, tokens, seen, sequences, vocabulary, parts, PARTS: tl.constexpr):
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    value = tl.load(best + row * parts + part, mask=part < parts, other=-float("inf"))
    _, winner = tl.max(value, 0, return_indices=True)
    # So may any part, even one that is not there.
    winner = tl.minimum(winner, parts - 1)
    token = tl.load(winners + row * parts + winner).to(tl.int64)
    tl.store(tokens + row, token)
    if seen is not None:
        sequence = tl.load(sequences + row).to(tl.int64)
        if sequence >= 0:
            at = seen + sequence * vocabulary + token
            tl.store(at, tl.maximum(tl.load(at), 1) + 1)
