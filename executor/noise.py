"""Noise that is a pure function of (seed, position, token), made of 64-bit integer steps.

No state is kept and none is shared, so a token's noise does not depend on the batch, the process
or the device it is computed on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from baton.core.request import SamplingParams

# The increment and the two multipliers of SplitMix64 (Steele, Lea and Flood, 2014), as signed
# 64-bit numbers: torch's int64 wraps around.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)
_BITS = 40


def exponential(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Return noise of the standard exponential distribution, over 0 and finite, in float32.

    seeds and positions are int64 [rows], tokens int64 [rows or 1, candidates]; the result is
    [rows, candidates]. Small values keep full precision: they decide an exponential race.
    """
    keys = mix(mix(seeds) + positions)[:, None]
    uniform = (_shifted(mix(keys + tokens * _STEP), 64 - _BITS) + 0.5).mul_(2.0**-_BITS)
    return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()


def race(
    rates: Tensor, tokens: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> Tensor:
    """Return where in each row [rows, n] of rates the winner of an exponential race stands.

    Of independent exponential times with rates p, the first to end is token i with probability
    p[i]. It is the Gumbel-max trick with one logarithm less. Rates count in proportion only;
    `tokens` [rows or 1, n] say which tokens they are of.
    """
    seeds = torch.tensor([p.seed for p in params], device=rates.device)
    places = torch.tensor(positions, device=rates.device)
    return (rates / exponential(seeds, places, tokens)).argmax(-1)


def mix(values: Tensor) -> Tensor:
    """Return SplitMix64's output for the state `values` (int64): every bit depends on every bit."""
    state = values + _STEP
    state ^= _shifted(state, 30)
    state *= _FIRST
    state ^= _shifted(state, 27)
    state *= _SECOND
    state ^= _shifted(state, 31)
    return state


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Shift right with zeros coming in, which torch has for int64 only by way of a mask."""
    return (values >> bits).bitwise_and_((1 << (64 - bits)) - 1)
