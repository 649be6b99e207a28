"""The noise of sampling, on the device: a pure function of (seed, position, token).

The integers are those of executor/noise.py bit for bit, so a token is drawn alike wherever its
sequence is; the one logarithm may differ from another library's in its last bit.
"""

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """Return SplitMix64's output for the state x (uint64; Steele, Lea and Flood, 2014)."""
    x += 0x9E3779B97F4A7C15
    x ^= x >> 30
    x *= 0xBF58476D1CE4E5B9
    x ^= x >> 27
    x *= 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def row_key(seed, position):
    """Return what a row's noise is made of, for an int64 seed and position."""
    return mix(mix(seed.to(tl.uint64)) + position.to(tl.uint64))


@triton.jit
def exponential(key, tokens):
    """Return noise of the standard exponential distribution for tokens, over 0 and finite."""
    bits = mix(key + tokens.to(tl.uint64) * 0x9E3779B97F4A7C15) >> 24
    uniform = (bits.to(tl.int64).to(tl.float32) + 0.5) * 9.094947017729282e-13  # 2 ** -40
    uniform = tl.minimum(uniform, 1 - 5.960464477539063e-08)  # 2 ** -24
    # log(1 - u), with what rounding 1 - u has lost put back: small values keep full precision.
    rest = 1 - uniform
    lost = (1 - rest) - uniform
    return -(tl.log(rest) + lost / rest)
