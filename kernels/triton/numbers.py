"""Small numbers that launchers and kernels share."""

from typing import NamedTuple

import triton
import triton.language as tl

PROCESSORS = 132
"""Streaming multiprocessors of an H100 or H200: what grids are sized for."""
FP8_MAX = 448.0
"""The largest float8_e4m3fn; conversion saturates there."""
LOG2E = 1.4426950408889634


class Tile(NamedTuple):
    """How a kernel is cut: a configuration chosen by shape, measured or compiled for sm_90."""

    block: int
    """Keys, columns or values that a program takes at a time."""
    warps: int
    stages: int
    """Depth of the software pipeline of its loads."""


def power_of_2(number: int) -> int:
    """Return the least power of 2 that is no less than `number`."""
    return 1 << max(0, number - 1).bit_length()


def ceil_div(number: int, by: int) -> int:
    """Return number / by, rounded up."""
    return -(-number // by)


@triton.jit
def tanh(x):
    """tanh in float32 by one exponential: libdevice's has no meaning to the interpreter."""
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def to_fp8(x):
    """Round float32 to float8_e4m3fn, saturating as torch's own scaled products expect."""
    return tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.float8e4nv)
