"""What a change has done to the machine code of a launch, in words for whoever made it."""

from collections.abc import Mapping

from tests.kernels.triton.ahead_of_time import SHARED_MEMORY, Fitness

RENEW = "if that is meant: python -m tests.kernels.triton.compile --renew"
_LIMITS = {"spills": 0, "shared": SHARED_MEMORY}


def differences(before: Mapping[str, Fitness], after: Mapping[str, Fitness]) -> list[str]:
    """Return a line for each kernel of a launch that is compiled to something else than before."""
    lines = [f"{kernel}: is launched no more" for kernel in before if kernel not in after]
    for kernel, fitness in after.items():
        if kernel not in before:
            lines.append(f"{kernel}: is new, {_words({}, fitness)}")
        elif before[kernel] != fitness:
            lines.append(f"{kernel}: {_words(before[kernel], fitness)}")
    return lines


def faults(found: Mapping[str, Fitness], *, spills: bool) -> list[str]:
    """Return a line for each number over what a kernel may have; spills only if asked for."""
    return [
        f"{kernel}: {name} {fitness[name]}, at most {most}"
        for kernel, fitness in found.items()
        for name, most in _LIMITS.items()
        if fitness[name] > most and (spills or name != "spills")
    ]


def _words(before: Fitness, after: Fitness) -> str:
    changed = []
    for name in {**before, **after}:
        old, new = before.get(name), after.get(name)
        if old != new:
            changed.append(f"{name} {new}" if old is None else f"{name} {old} → {new}")
    return ", ".join(changed)
