"""What is aimed at, as fractions of what the machine was measured to do."""

from typing import NamedTuple


class Target(NamedTuple):
    """Three fractions; of overhead, less is better."""

    first: float
    parity: float
    """Level with the best engines."""
    stretch: float | None = None


DECODE: dict[tuple[int, int], Target] = {
    (1, 1024): Target(0.50, 0.62, 0.75),
    (32, 1024): Target(0.48, 0.62, 0.70),
    (128, 1024): Target(0.55, 0.68, 0.75),
    (256, 1024): Target(0.52, 0.66, 0.72),
}
"""By batch and context."""
ATTENTION: dict[tuple[int, int], Target] = {(128, 4096): Target(0.80, 0.90)}
"""The attention kernel of decode, by batch and context."""
PREFILL = Target(0.50, 0.62, 0.68)
OVERHEAD = Target(0.15, 0.03, 0.01)
"""Of a decode step: the part in which the device waits for the host."""


def verdict(fraction: float, target: Target) -> str:
    """Say which target a fraction reaches."""
    reached = "none"
    for name, wanted in zip(target._fields, target, strict=True):
        if wanted is not None and fraction >= wanted:
            reached = name
    return reached


def overhead_verdict(share: float) -> str:
    """Say which target an overhead keeps to."""
    reached = "none"
    for name, most in zip(OVERHEAD._fields, OVERHEAD, strict=True):
        if most is not None and share <= most:
            reached = name
    return reached
