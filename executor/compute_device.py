"""Where an instance computes, and how many steps it has under way: decided once, at start."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from baton.core.errors import InvalidConfig

if TYPE_CHECKING:  # what only computes on a device, as bench/gpu does, needs no configs
    from baton.core.config import ParallelConfig, WorkerConfig


@dataclass(frozen=True, slots=True)
class StepsUnderWay:
    """How many steps may be under way at once."""

    depth: int
    ahead: bool
    """Whether they may have the same sequences: see engine/scheduler.py."""


def compute_device(config: "WorkerConfig") -> torch.device:
    """Return the device that this rank computes on.

    Raises InvalidConfig if what is asked for cannot be had.
    """
    engine = config.engine
    if engine.device == "cpu" or (engine.device == "auto" and not _gpu_suits(config)):
        if engine.attention_skip_below:
            allowed = "0 on the CPU: only a GPU's kernel leaves keys out"
            raise InvalidConfig("attention_skip_below", engine.attention_skip_below, allowed)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InvalidConfig("device", engine.device, "cpu or auto: torch finds no CUDA device here")
    if led_by_host(config.parallel) and engine.attention_skip_below:
        allowed = (
            "0 with pp, dp, ep or cp: only the kernel of steps that no host leads leaves keys out"
        )
        raise InvalidConfig("attention_skip_below", engine.attention_skip_below, allowed)
    if engine.executor == "native":
        raise InvalidConfig("executor", engine.executor, "auto or torch on a GPU")
    if engine.batch_invariant:
        allowed = "false on a GPU: there, sums are split by the sizes of the batch"
        raise InvalidConfig("batch_invariant", "true", allowed)
    return torch.device("cuda", _own_gpu(config.rank))


def led_by_host(parallel: "ParallelConfig") -> bool:
    """Return whether on GPUs the host leads steps kernel by kernel, as on CPUs, and waits for each.

    Streams and tokens pass between stages, the exchange of experts must know on the host how many
    rows it has, and rings of context are made there: neither graphs nor seats serve these meshes.
    """
    return parallel.pp * parallel.places * parallel.cp > 1


def _own_gpu(rank: int) -> int:
    """Return which of the GPUs that this process sees is the rank's.

    A process that sees one, as CUDA_VISIBLE_DEVICES lets it, has that. Of several, ranks take one
    after the other, and begin anew on each host that they fill: NCCL refuses two ranks on one.
    """
    return rank % torch.cuda.device_count()


@contextmanager
def current_device(device: torch.device) -> Iterator[None]:
    """Let what is run in this thread, and does not say where, run on `device`."""
    if device.type == "cpu":
        yield
        return
    with torch.cuda.device(device):
        yield


def steps_under_way(config: "WorkerConfig", *, on_gpu: bool) -> StepsUnderWay:
    """Return it; raises InvalidConfig if `run_ahead` is asked for and cannot be had."""
    parallel, wanted = config.parallel, config.engine.run_ahead
    possible = parallel.pp == parallel.cp == 1
    if wanted and not possible:
        allowed = "false with stages or context parallelism: not all ranks have the last tokens"
        raise InvalidConfig("run_ahead", "true", allowed)
    ahead = possible and (on_gpu and not led_by_host(parallel) if wanted is None else wanted)
    return StepsUnderWay(2 if ahead else parallel.pp, ahead)


def _gpu_suits(config: "WorkerConfig") -> bool:
    engine = config.engine
    suits = engine.executor != "native" and not engine.batch_invariant
    return suits and torch.cuda.is_available()
