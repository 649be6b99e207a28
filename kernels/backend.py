"""Who computes operations, torch or Triton's kernels: chosen once, when a process starts.

An operation's public function in kernels/<op>.py asks `triton_serves` and calls the one or the
other; nobody else needs to know. Triton's kernels are for GPUs. On the CPU only its interpreter
runs them, for tests (TRITON_INTERPRET=1). They are imported where they are called: where torch
computes, Triton need not be installed.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from baton.core.errors import InvalidConfig


class Backend(StrEnum):
    """Who computes."""

    TORCH = "torch"
    TRITON = "triton"


@dataclass(frozen=True, slots=True)
class Choice:
    """What `choose_backend` found."""

    backend: Backend
    why: str
    """In words, for people."""


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, and so on the CPU."""

_active = Backend.TORCH


def choose_backend(device: str | torch.device, *, batch_invariant: bool = False) -> Choice:
    """Return who is to compute on `device`.

    Raises InvalidConfig where results may not depend on the batch and would: on a GPU both the
    kernels and torch's products choose how they add up by the sizes of the batch.
    """
    kind = torch.device(device).type
    if kind == "cpu" and not INTERPRETED:
        return Choice(Backend.TORCH, "on the CPU torch computes")
    if batch_invariant:
        allowed = f"false on {kind}: there, sums are split by the sizes of the batch"
        raise InvalidConfig("batch_invariant", "true", allowed)
    if importlib.util.find_spec("triton") is None:
        return Choice(Backend.TORCH, "Triton is not installed: slow, and without CUDA graphs")
    return Choice(Backend.TRITON, f"Triton's kernels, for {kind}")


def use_backend(backend: Backend) -> None:
    """Have `backend` compute in this process from now on; to be called before weights are read.

    Tensors on the CPU are torch's whatever is used, unless kernels are interpreted.
    """
    global _active
    _active = backend


@contextmanager
def using_backend(backend: Backend) -> Iterator[None]:
    """Have `backend` compute for a while, and then who did before."""
    before = _active
    use_backend(backend)
    try:
        yield
    finally:
        use_backend(before)


def triton_serves(x: Tensor) -> bool:
    """Return whether Triton's kernels compute what is asked of x."""
    return triton_on(x.device)


def triton_on(device: torch.device) -> bool:
    """Return whether Triton's kernels compute what is asked of tensors on `device`."""
    return _active is Backend.TRITON and (INTERPRETED or device.type != "cpu")
